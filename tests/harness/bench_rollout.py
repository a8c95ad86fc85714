"""GRPO with vLLM: samples per second beside TRL with the same vLLM in the same run, `make bench-rollout`.

    python -m tests.harness.bench_rollout [--steps 6] [--rounds 2] [--only NAME ...]

SmolLM2-135M-Instruct in float32, sums of two digits as prompts; each step generates a batch of completions and takes one
optimizer step on it. Every contender runs in a process of its own, one after the other, round after round; a sample is a
completion, from prompt to gradient. The first step, in which kernels are compiled, is left out. Where other programs share the
processors, compare the processor time: that of the trainer's process, which does not hold a server's.
"""

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tests.harness.bench import BENCH, ROOT
from tests.harness.distributed import free_port
from tests.harness.smollm2 import fetch_smollm2

BATCH, GROUP, LONGEST, ROOM = 16, 8, 24, 128
ENGINE = {"enforce_eager": True, "worker_extension_cls": "megaswift.rollout.vllm_worker.WeightReceiver", "kv_cache_memory_bytes": 2**28}  # fmt: skip
OURS = ("--vllm_enforce_eager", "true", "--vllm_engine_kwargs", json.dumps({"kv_cache_memory_bytes": 2**28}))
CONTENDERS = ("megaswift embedded", "megaswift colocated", "megaswift served", "TRL colocated")
REWARD = """
def brief(completions, **columns):
    return [-0.01 * len(text) for text in completions]
"""
SURROUNDINGS = {"HF_HUB_OFFLINE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_LOGGING_LEVEL": "ERROR"}


def main() -> None:
    """Run the contenders and print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--only", nargs="*", default=[], choices=CONTENDERS)
    options = parser.parse_args()
    folder = BENCH / "rollout"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    model = fetch_smollm2(ROOT / ".demo" / "SmolLM2-135M-Instruct")
    data = write_prompts(folder / "prompts.jsonl")
    found: dict[str, list[dict[str, float]]] = {}
    for _ in range(options.rounds):
        for name in options.only or CONTENDERS:
            shutil.rmtree(folder / "output", ignore_errors=True)
            times = RUNNERS[name](model, data, folder, options.steps)
            found.setdefault(name, []).append(times)
            Console().print(f"{name}: {times}")
    show(found)


def write_prompts(file: Path) -> Path:
    draw = random.Random(0)
    with file.open("w") as lines:
        for _ in range(400):
            text = f"{draw.randint(1, 9)} + {draw.randint(1, 9)} ="
            messages = [
                {"role": "system", "content": "Answer with one number."},
                {"role": "user", "content": text},
            ]
            lines.write(json.dumps({"messages": messages}) + "\n")
    return file


def run_ours(model: Path, data: Path, folder: Path, steps: int, *words: str) -> dict[str, float]:
    """Return the seconds of a step and of its parts, each a median."""
    (folder / "reward.py").write_text(REWARD)
    output = folder / "output"
    command = [
        sys.executable, "-m", "tests.harness.bench_rollout_ours", "rlhf", "--rlhf_type", "grpo", "--model", model, "--dataset", data,
        "--output_dir", output, "--train_iters", steps, "--global_batch_size", BATCH, "--micro_batch_size", BATCH,
        "--num_generations", GROUP, "--max_completion_length", LONGEST, "--max_length", ROOM, "--temperature", 1, "--beta", 0,
        "--learning_rate", "1e-6", "--lr_decay_style", "constant", "--external_plugins", folder / "reward.py", "--reward_funcs",
        "brief", "--report_to", "none", "--logging_steps", 1, "--save_steps", 10**6, "--save_optim", "false", *words,
    ]  # fmt: skip
    parts = last_line(command)
    lines = [json.loads(line) for line in (output / "logging.jsonl").read_text().splitlines()]
    return medians({"step": [line["step_time_s"] for line in lines[1:]], **parts})


def embedded(model: Path, data: Path, folder: Path, steps: int) -> dict[str, float]:
    return run_ours(model, data, folder, steps)


def colocated(model: Path, data: Path, folder: Path, steps: int) -> dict[str, float]:
    return run_ours(model, data, folder, steps, "--use_vllm", "true", *OURS)


def served(model: Path, data: Path, folder: Path, steps: int) -> dict[str, float]:
    port = free_port()
    with (folder / "server.log").open("w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "megaswift.cli.main", "rollout", "--model", str(model), "--port", str(port),
             "--vllm_max_model_len", str(ROOM), *OURS],
            env={**os.environ, **SURROUNDINGS}, cwd=ROOT, stdout=log, stderr=log,
        )  # fmt: skip
    try:
        mode = ("--use_vllm", "true", "--vllm_mode", "server", "--vllm_server_timeout", "600")
        return run_ours(model, data, folder, steps, *mode, "--vllm_server_port", str(port))
    finally:
        server.terminate()
        server.wait()


def trl(model: Path, data: Path, folder: Path, steps: int) -> dict[str, float]:
    settings = {
        "model": str(model), "data": str(data), "output": str(folder / "output"), "steps": steps, "batch": BATCH, "group": GROUP,
        "longest": LONGEST, "room": ROOM, "engine": ENGINE,
    }  # fmt: skip
    (folder / "trl.json").write_text(json.dumps(settings))
    found = last_line([sys.executable, "-m", "tests.harness.peers.trl_grpo", folder / "trl.json"])
    return medians({**found, "sync": found["sync"][1:], "generate": found["generate"][1:]})


RUNNERS: dict[str, Callable[[Path, Path, Path, int], dict[str, float]]] = dict(
    zip(CONTENDERS, (embedded, colocated, served, trl), strict=True)
)


def last_line(command: list[Any]) -> dict[str, list[float]]:
    """Run a program and return the JSON that it prints last."""
    began = time.perf_counter()
    done = subprocess.run(
        list(map(str, command)), env={**os.environ, **SURROUNDINGS}, cwd=ROOT, capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(f"{command[2]} failed after {time.perf_counter() - began:.0f} s:\n{done.stderr[-3000:]}")
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    found: dict[str, list[float]] = json.loads(lines[-1])
    return found


def medians(times: dict[str, list[float]]) -> dict[str, float]:
    return {name: round(statistics.median(values), 3) for name, values in times.items()}


def show(found: dict[str, list[dict[str, float]]]) -> None:
    """Print the better round of each contender."""
    table = Table(
        title=f"{BATCH} completions of {LONGEST} tokens a step, groups of {GROUP}; seconds are medians of a round's steps"
    )
    for column in ("", "samples/s", "s/step", "s/generation", "s/new weights", "processor s/step"):
        table.add_column(column)
    for name, rounds in found.items():
        best = min(rounds, key=lambda one: one["step"])
        cells = [
            f"{BATCH / best['step']:.2f}",
            *(f"{best.get(part, 0):.2f}" for part in ("step", "generate", "sync", "cpu")),
        ]
        table.add_row(name, *cells)
    Console().print(table)


if __name__ == "__main__":
    main()
