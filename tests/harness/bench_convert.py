"""`make bench-convert`: convert's wall time beside `cp` of the same bytes, and its memory, for a small and a large checkpoint.

    python -m tests.harness.bench_convert [--gigabytes 1 4] [--repeats 3] [--folder .bench/convert]

cp and both directions take turns, so that they meet the same machine; the figures are medians. Neither waits for the disk; with
`--fsync true` convert does, as cp with `sync -f` after it. No output of another is there when a command starts, and free memory has
just been in use: the page cache is a part of what is measured, and a virtual machine gives memory that lies idle back to its
host, from where a gigabyte can take seconds to come back. RssAnon is that of /proc/PID/status, sampled.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from megaswift.converters.plan import file_tensors
from megaswift.converters.shards import create, index_json, plan_files, write_at
from megaswift.converters.tensor_files import TensorInfo
from megaswift.metadata.read import meta_from_config

SHARD_BYTES = 200_000_000
SAMPLE_S = 0.005
# Per-expert and per-layer tensors of a few megabytes, as in files of many shards; layers are added up to the size.
CONFIG = {
    "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "hidden_size": 2048, "intermediate_size": 6144,
    "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 65536, "torch_dtype": "bfloat16",
    "tie_word_embeddings": False, "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0,
}  # fmt: skip
# What their sources say (releases of August 2026); neither is started here.
PEERS = {
    "mcore-bridge 1.6.5": "does not run on CPU as shipped: imports transformer_engine, device='cuda' in its export",
    "Megatron-Bridge 0.6.2": "does not run on CPU as shipped: imports transformer_engine",
}


# In a process of its own, which gives the memory back.
USE_MEMORY = """
import mmap, os
def use(num_bytes):
    free = os.sysconf("SC_AVPHYS_PAGES") * mmap.PAGESIZE
    memory = mmap.mmap(-1, min(num_bytes, int(0.9 * free)))
    memory.madvise(mmap.MADV_HUGEPAGE)
    for at in range(0, len(memory), mmap.PAGESIZE):
        memory[at] = 1
"""


@dataclass(kw_only=True)
class Runs:
    """What was measured of one command."""

    seconds: list[float] = field(default_factory=list)
    anonymous_mb: float = 0.0

    @property
    def median(self) -> float:
        """Seconds."""
        return statistics.median(self.seconds)


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(prog="bench_convert")
    parser.add_argument("--gigabytes", type=float, nargs="+", default=[1.0, 4.0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path(".bench") / "convert")
    chosen = parser.parse_args()
    table = Table("size", "way", "s", "GB/s", "x cp", "x cp + sync", "RssAnon MB", "allowed MB")
    console = Console()
    console.print(f"load before: {os.getloadavg()[0]:.2f}")
    for gigabytes in chosen.gigabytes:
        try:
            for row in measure(chosen.folder, gigabytes=gigabytes, repeats=chosen.repeats):
                table.add_row(*row)
        finally:
            shutil.rmtree(chosen.folder, ignore_errors=True)
    console.print(table)
    for peer, remark in PEERS.items():
        console.print(f"{peer} {remark}")
    console.print(f"load after: {os.getloadavg()[0]:.2f}")


def measure(folder: Path, *, gigabytes: float, repeats: int) -> list[tuple[str, ...]]:
    """Return the rows of one size."""
    source, fused_bytes = make_checkpoint(folder / "source", num_bytes=int(gigabytes * 1e9))
    num_bytes = sum(path.stat().st_size for path in source.iterdir())
    checkpoint, copy, mcore, back = (folder / name for name in ("checkpoint", "copy", "mcore", "hf"))
    convert = [sys.executable, "-m", "megaswift.cli.main", "convert", "--max_shard_size", str(SHARD_BYTES)]
    to_mcore = [*convert, "--model", str(source), "--to", "mcore", "--output_dir", str(mcore)]
    subprocess.run([*to_mcore[:-1], str(checkpoint)], check=True, capture_output=True)
    to_hf = [*convert, "--model", str(checkpoint), "--to", "hf", "--output_dir", str(back)]
    commands = {
        "cp": ["cp", "-r", str(source), str(copy)],
        "to mcore": [*to_mcore, "--fsync", "false"],
        "to hf": [*to_hf, "--fsync", "false"],
        "cp + sync": ["sh", "-c", f"cp -r '{source}' '{copy}' && sync -f '{copy}'"],
        "to mcore, fsync": [*to_mcore, "--fsync", "true"],
        "to hf, fsync": [*to_hf, "--fsync", "true"],
    }
    runs = {way: Runs() for way in commands}
    for _ in range(repeats):
        for way, command in commands.items():
            for path in (copy, mcore, back):
                shutil.rmtree(path, ignore_errors=True)
            os.sync()  # what others have left to write is not this run's to wait for
            subprocess.run([sys.executable, "-c", f"{USE_MEMORY}\nuse({2 * num_bytes})"], check=True)
            timed(command, runs[way])
    allowed = 1.5 * fused_bytes / 1e6 + 300
    return [
        (
            f"{num_bytes / 1e9:.2f} GB",
            way,
            f"{run.median:.2f}",
            f"{num_bytes / 1e9 / run.median:.2f}",
            f"{run.median / runs['cp'].median:.2f}",
            f"{run.median / runs['cp + sync'].median:.2f}",
            f"{run.anonymous_mb:.0f}",
            f"{allowed:.0f}" if way.startswith("to") else "",
        )
        for way, run in runs.items()
    ]


def timed(command: list[str], runs: Runs) -> None:
    """Run a command, and keep its wall time and the most anonymous memory that it was seen with."""
    started = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None:
            runs.anonymous_mb = max(runs.anonymous_mb, anonymous_mb(process.pid))
            time.sleep(SAMPLE_S)
    runs.seconds.append(time.perf_counter() - started)
    assert process.returncode == 0, f"{' '.join(command)} failed"


def anonymous_mb(pid: int) -> float:
    """Return a process's memory that is not of files, in MB; 0 when it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return sum(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith("RssAnon"))


def make_checkpoint(folder: Path, *, num_bytes: int) -> tuple[Path, int]:
    """Write a bfloat16 model of about `num_bytes`; return its folder and the bytes of its largest fused tensor."""
    layers = 1
    while _size(CONFIG | {"num_hidden_layers": layers + 1}) <= num_bytes:
        layers += 1
    config = CONFIG | {"num_hidden_layers": layers}
    shapes = file_tensors(meta_from_config(config))
    folder.mkdir(parents=True)
    infos = [
        TensorInfo(name=name, dtype="BF16", shape=shape, file=folder, begin=0)
        for name, shape in shapes.items()
    ]
    files = plan_files(infos, folder, max_bytes=SHARD_BYTES)
    draw = np.random.default_rng(0)
    for file in files:
        create(file)
        with file.path.open("r+b") as opened:
            for info in file.tensors:
                # Any bits but those of infinity and NaN: what cp and convert move does not matter, but is not all zero.
                bits = draw.integers(0, 0x7F00, info.num_bytes // 2, dtype=np.uint16)
                write_at(opened.fileno(), bits.data.cast("B"), info.begin)
    (folder / "model.safetensors.index.json").write_text(index_json(files))
    (folder / "config.json").write_text(json.dumps(config))
    fused = 2 * int(config["intermediate_size"]) * int(config["hidden_size"])
    return folder, 2 * max(fused, int(config["vocab_size"]) * int(config["hidden_size"]))


def _size(config: dict[str, object]) -> int:
    return sum(2 * int(np.prod(shape)) for shape in file_tensors(meta_from_config(config)).values())


if __name__ == "__main__":
    main()
