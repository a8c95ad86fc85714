"""Predicted peak memory against what CPU runs take: `make bench-memory`.

    python -m tests.harness.bench_memory [--default_malloc] [CASE ...]

Each case trains two steps of a random model in fresh processes. Measured is the highest resident memory (VmHWM) of the
fullest rank while it trains, less what the process held before it built its model; predicted is what the planner counts in
tensors on the fullest rank, with the allocator's share. Exit code 1 where a prediction is off by more than LIMIT.

glibc keeps freed memory below a threshold that it raises to 32 MiB by itself (mallopt(3)), and tensors of changing sizes
leave holes in it: the resident memory is then not what is in tensors. The threshold is held at 1 MiB here; with
--default_malloc it is not.
"""

import gc
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoConfig

from megaswift.config.rules import resolve
from megaswift.data.encode import EncodedSet
from megaswift.launch.profile import profile_here
from megaswift.metadata.read import get_model_meta
from megaswift.parity.reference import save_random
from megaswift.planner.ask import software_on
from megaswift.planner.costs import Costs
from megaswift.planner.job import Candidate, job_of
from megaswift.planner.memory import Memory
from tests.harness.distributed import run_distributed
from tests.harness.tiny import SIZES
from tests.harness.training import Case, prepared, steps

LIMIT = 10.0  # percent
MIB = 2**20
STEPS = 2


@dataclass(frozen=True, kw_only=True)
class Model:
    """One run: a model, its layout and its length."""

    kind: str  # model_type of transformers
    config: dict[str, Any]
    seq_len: int
    micro_batch: int = 1
    ranks: int = 1
    parallel: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    tuner: dict[str, Any] = field(default_factory=dict)


def _dense(**changes: Any) -> dict[str, Any]:
    wide = {
        "hidden_size": 512,
        "intermediate_size": 1536,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "vocab_size": 8192,
        "max_position_embeddings": 4096,
    }
    return {**SIZES, **wide, **changes}


EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 512}
CASES = {
    "llama": Model(kind="llama", config=_dense(), seq_len=1024),
    "llama tp2": Model(kind="llama", config=_dense(), seq_len=1024, ranks=2, parallel={"tp": 2}),
    "llama full recompute": Model(
        kind="llama",
        config=_dense(),
        seq_len=2048,
        training={"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    ),
    "qwen3 wide, large vocabulary": Model(
        kind="qwen3",
        config=_dense(
            hidden_size=768,
            intermediate_size=2304,
            num_attention_heads=12,
            num_hidden_layers=6,
            vocab_size=32000,
        ),
        seq_len=512,
        micro_batch=2,
    ),
    "qwen3_moe": Model(kind="qwen3_moe", config=_dense(**EXPERTS, num_hidden_layers=6), seq_len=1024),
    "llama lora": Model(kind="llama", config=_dense(), seq_len=1024, tuner={"tuner_type": "lora"}),
}


def settings(model: Model) -> Case:
    """Return the run of a case: two micro batches a step and data-parallel rank."""
    replicas = model.ranks // model.parallel.get("tp", 1)
    batch = {"global_batch_size": 2 * model.micro_batch * replicas, "micro_batch_size": model.micro_batch}
    return Case(
        name="memory",
        settings={
            "data": {"max_length": model.seq_len},
            "training": {**batch, "train_iters": STEPS, **model.training},
            "parallel": model.parallel,
            "tuner": model.tuner,
        },
    )


def predicted(model: Model, folder: Path) -> Memory:
    """Return what the planner says of the fullest rank."""
    meta, case = get_model_meta(folder), settings(model)
    resolved = resolve(case.run_config(folder), meta, model.ranks, "cpu")
    training, tuner = resolved.config.training, resolved.config.tuner
    machine = profile_here(ranks=model.ranks, gpus=()).machine
    job = job_of(
        meta,
        seq_len=model.seq_len,
        global_batch=training.global_batch_size or 1,
        trained=tuner.tuner_type,
        lora_rank=tuner.lora_rank,
        lora_dropout=tuner.lora_dropout > 0,
        use_dora=tuner.use_dora,
    )
    candidate = Candidate(
        layout=resolved.layout,
        micro_batch=model.micro_batch,
        precision="fp32",
        recompute=training.recompute_granularity,
    )
    costs = Costs(job, machine, software_on(machine.device))
    return costs.memory(candidate, costs.stages(candidate.layout))


def rows_of(model: Model, ranks: int) -> EncodedSet:
    """Return enough documents of the case's length for two steps."""
    rows, length = 4 * model.micro_batch * ranks, model.seq_len
    return EncodedSet(
        input_ids=np.random.default_rng(0).integers(3, 100, rows * length).astype(np.int32),
        loss_weights=np.ones(rows * length, np.uint8),
        starts=np.arange(0, rows * length + 1, length, dtype=np.int64),
        samples=np.arange(rows, dtype=np.int64),
    )


def measured_bytes(rank: int, world_size: int, name: str, folder: Path) -> dict[str, int]:
    """Return this rank's resident bytes: with the model and its optimizer, and at the peak of training; the base taken off."""
    model = CASES[name]
    encoded = rows_of(model, world_size)
    gc.collect()
    base = _resident("VmRSS")
    with prepared(folder, settings(model), encoded=encoded) as trained:
        built = _resident("VmRSS") - base
        Path("/proc/self/clear_refs").write_text("5")  # the peak of loading is not that of training (proc(5))
        steps(trained, 0, STEPS)
        return {"built": built, "peak": _resident("VmHWM") - base}


def _resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) * 1024


def measure(name: str) -> tuple[Memory, dict[str, int]]:
    """Return what was predicted and what the fullest rank of one case took, in this process's own ranks."""
    model = CASES[name]
    with tempfile.TemporaryDirectory(prefix="megaswift-memory-") as place:
        folder = save_random(AutoConfig.for_model(model.kind, **model.config), Path(place) / "model")
        found = run_distributed(measured_bytes, model.ranks, name, folder)
        return predicted(model, folder), max(found, key=lambda one: one["peak"])


def main() -> int:
    """Print a line a case and return 1 where one is off."""
    if sys.argv[1:2] == ["--one"]:
        memory, found = measure(sys.argv[2])
        parts = {key: value for key, value in vars(memory).items() if key not in ("stage", "context")}
        print(json.dumps({"parts": parts, **found}))
        return 0
    names = [word for word in sys.argv[1:] if word != "--default_malloc"] or list(CASES)
    held = {} if "--default_malloc" in sys.argv else {"MALLOC_MMAP_THRESHOLD_": str(MIB)}
    worst = 0.0
    print(f"{'MiB a rank':30}{'predicted':>10}{'measured':>10}{'error %':>9}   predicted parts; built")
    for name in names:
        # Fresh processes: what an earlier case freed stays with the allocator.
        words = [sys.executable, "-m", "tests.harness.bench_memory", "--one", name]
        done = subprocess.run(
            words, stdout=subprocess.PIPE, text=True, check=True, env={**os.environ, **held}
        )
        found = json.loads(done.stdout.splitlines()[-1])
        total = sum(found["parts"].values())
        error = 100 * (total / found["peak"] - 1)
        worst = max(worst, abs(error))
        parts = " ".join(f"{part} {size / MIB:.0f}" for part, size in found["parts"].items())
        print(
            f"{name:30}{total / MIB:10.0f}{found['peak'] / MIB:10.0f}{error:9.1f}   {parts}; {found['built'] / MIB:.0f}",
            flush=True,
        )
    print(f"worst error {worst:.1f} %, limit {LIMIT:.0f} %")
    return int(worst > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
