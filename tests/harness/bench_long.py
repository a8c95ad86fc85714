"""Peak memory of a rank that trains on one long document, for one rank and for more that share it: `make bench-long`.

    python -m tests.harness.bench_long [--tokens 65536] [--cp 1 2 4] [--cp_comm_type p2p]

The model is tiny (one layer of 256 with one head of 16) and trains in float32; what grows is its activations. Each number of ranks has fresh
processes of its own, and the figure is what a process adds to its resident memory once the model stands.
"""

import argparse
import json
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from megaswift.data.encode import EncodedSet
from tests.harness.distributed import run_distributed
from tests.harness.tiny import save_tiny
from tests.harness.training import Case, prepared, steps, temporary_folder

# One narrow head, so that a CPU is done with the square of the length; wide otherwise, so that activations are what grows.
MODEL = {
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "hidden_size": 256,
    "intermediate_size": 512,
}


def one_document(tokens: int) -> EncodedSet:
    """Return a set of one document of random tokens, every one of which carries loss."""
    return EncodedSet(
        input_ids=np.random.default_rng(0).integers(3, 131, tokens).astype(np.int32),
        loss_weights=np.ones(tokens, np.uint8),
        starts=np.array([0, tokens], np.int64),
        samples=np.zeros(1, np.int64),
    )


def worker(rank: int, world_size: int, folder: Path, tokens: int, kind: str) -> dict[str, Any]:
    """Make one optimizer step on the document with cp = world."""
    case = Case(
        name="long",
        settings={
            "parallel": {"cp": world_size, "cp_comm_type": kind},
            "data": {"max_length": tokens},
            "training": {"global_batch_size": 1, "train_iters": 1},
        },
    )
    with prepared(folder, case, encoded=one_document(tokens)) as trained:
        before, started = _peak_mib(), time.perf_counter()
        ((loss, grad_norm),) = steps(trained, 0, 1)
        seconds = time.perf_counter() - started
    return {"mib": _peak_mib() - before, "seconds": seconds, "loss": loss, "grad_norm": grad_norm}


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(tokens: int, cp: int, kind: str) -> list[dict[str, Any]]:
    """Return what every rank measured."""
    folder = temporary_folder()
    try:
        save_tiny("qwen3", folder, max_position_embeddings=tokens, **MODEL)
        return run_distributed(worker, cp, folder, tokens, kind, timeout_s=7200.0)
    finally:
        shutil.rmtree(folder)


def main() -> None:
    """Print a table, or one row's numbers as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=65536)
    parser.add_argument("--cp", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--cp_comm_type", default="p2p")
    parser.add_argument("--json", action="store_true", help="measure here, for one cp")
    chosen = parser.parse_args()
    if chosen.json:
        print(json.dumps(measure(chosen.tokens, chosen.cp[0], chosen.cp_comm_type)))
        return
    print(f"one document of {chosen.tokens} tokens, cp_comm_type={chosen.cp_comm_type}, float32\n")
    print("| ranks | most MiB of a rank for one step | s | loss | grad norm |\n|--:|--:|--:|--:|--:|")
    for cp in chosen.cp:
        command = [sys.executable, "-m", __spec__.name, "--json", f"--cp={cp}"]
        command += [f"--tokens={chosen.tokens}", f"--cp_comm_type={chosen.cp_comm_type}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        ranks = json.loads(done.stdout.splitlines()[-1])
        most = max(rank["mib"] for rank in ranks)
        seconds = max(rank["seconds"] for rank in ranks)
        print(
            f"| {cp} | {most:.0f} | {seconds:.0f} | {ranks[0]['loss']:.6f} | {ranks[0]['grad_norm']:.6f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
