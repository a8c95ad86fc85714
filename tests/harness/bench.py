"""`make bench`: SFT of SmolLM2-135M packed to 1024 tokens, beside TRL, LLaMA-Factory and ms-swift on the same machine.

    python -m tests.harness.bench [--data alpaca.json] [--only NAME ...] [--steps 6] [--rounds 2]

Every peer runs in a venv of its own below .bench/, with its own command and its own defaults; where a peer can keep its
activations instead of computing them again, it runs both ways. The cases take turns in every round and the best round of
each counts, since a shared machine is never quiet for long. LoRA is rank 8 on all linears without dropout everywhere.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tests.harness.smollm2 import fetch_smollm2

ROOT = Path(__file__).resolve().parents[2]
BENCH = ROOT / ".bench"
PEERS = ROOT / "tests" / "harness" / "peers"
LENGTH = 1024
TORCH = "torch==2.13.0"
PACKAGES = {
    "trl": ["trl==1.16.0", "peft"],
    "llamafactory": ["llamafactory==0.9.5"],
    "ms-swift": ["ms-swift==4.6.0"],
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One run: whose, and of what kind."""

    name: str
    system: str  # megaswift or a key of PACKAGES
    lora: bool
    checkpointing: bool = False


CASES = (
    Case(name="megaswift full", system="megaswift", lora=False),
    Case(name="megaswift lora", system="megaswift", lora=True),
    *(
        Case(
            name=f"{system} {kind}{' +recompute' if again else ''}",
            system=system,
            lora=kind == "lora",
            checkpointing=again,
        )
        for system in ("llamafactory", "trl")
        for kind in ("full", "lora")
        for again in (False, True)
    ),
    Case(name="ms-swift full", system="ms-swift", lora=False),
    Case(name="ms-swift lora", system="ms-swift", lora=True),
)


def main() -> None:
    """Run the cases one after the other and print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--data", type=Path, help="alpaca rows (json list); default: rows written here, of lognormal length"
    )
    parser.add_argument("--only", nargs="*", default=[], help="names of cases or systems")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    BENCH.mkdir(exist_ok=True)
    model = fetch_smollm2(ROOT / ".demo" / "SmolLM2-135M-Instruct")
    data = prepare_rows(options.data)
    cases = [case for case in CASES if not options.only or {case.name, case.system} & set(options.only)]
    results: dict[Case, dict[str, Any]] = {}
    for case in cases * options.rounds:
        found = _run(case, model, data, options.steps)
        Console().print(f"{case.name}: {found}")
        results[case] = max(results.get(case, found), found, key=lambda one: float(one["tokens_per_s"]))
    _print(results)


def prepare_rows(given: Path | None) -> Path:
    """Write the rows once in each peer's layout and return the alpaca file."""
    rows = json.loads(given.read_text()) if given else _rows()
    alpaca = BENCH / "alpaca.json"
    alpaca.write_text(json.dumps(rows))
    turns = [
        [
            {
                "role": "user",
                "content": "\n".join(part for part in (row["instruction"], row.get("input")) if part),
            },
            {"role": "assistant", "content": row["output"]},
        ]
        for row in rows
    ]
    (BENCH / "messages.jsonl").write_text("".join(json.dumps({"messages": one}) + "\n" for one in turns))
    (BENCH / "dataset_info.json").write_text(json.dumps({"bench": {"file_name": "alpaca.json"}}))
    return alpaca


def _rows() -> list[dict[str, str]]:
    draw = random.Random(0)
    words = "the model reads a document and answers with care because every token of it was counted before".split()
    text = lambda mean: " ".join(draw.choices(words, k=max(3, int(draw.lognormvariate(mean, 0.7)))))  # noqa: E731
    return [{"instruction": text(2.8), "input": "", "output": text(4.5)} for _ in range(1000)]


def _run(case: Case, model: Path, data: Path, steps: int) -> dict[str, Any]:
    runner: dict[str, Callable[..., dict[str, Any]]] = {
        "megaswift": _megaswift, "trl": _trl, "llamafactory": _llamafactory, "ms-swift": _ms_swift,
    }  # fmt: skip
    output = BENCH / "runs" / case.name.replace(" ", "-")
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    return runner[case.system](case, model, data, output, steps)


def _megaswift(case: Case, model: Path, data: Path, output: Path, steps: int) -> dict[str, Any]:
    command = [
        sys.executable, "-m", "megaswift.cli.main", "sft", "--model", model, "--dataset", data, "--packing", "true",
        "--max_length", LENGTH, "--train_iters", steps, "--global_batch_size", 1, "--learning_rate", "1e-5",
        "--tuner_type", "lora" if case.lora else "full", "--lora_dropout", 0, "--save_strategy", "no", "--save_safetensors", "false",
        "--output_dir", output, "--resume", "never", "--logging_steps", 1, "--nproc_per_node", 1,
    ]  # fmt: skip
    _call(command, output)
    lines = [json.loads(line) for line in (output / "logging.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "tokens_per_s" in line][-steps + 1 :]
    tokens = sum(line["tokens"] for line in lines)
    seconds = sum(line["step_time_s"] for line in lines)
    return {
        "tokens_per_s": tokens / seconds,
        "seconds_per_step": seconds / len(lines),
        "peak_rss_mib": max(line["memory_gib"] for line in lines) * 1024,
    }


def _trl(case: Case, model: Path, data: Path, output: Path, steps: int) -> dict[str, Any]:
    settings = {
        "model": str(model), "data": str(BENCH / "messages.jsonl"), "output": str(output), "lora": case.lora,
        "checkpointing": case.checkpointing, "steps": steps, "length": LENGTH,
    }  # fmt: skip
    (output / "settings.json").write_text(json.dumps(settings))
    return _probe(case, "trl_sft:main", [output / "settings.json"], output)


def _llamafactory(case: Case, model: Path, data: Path, output: Path, steps: int) -> dict[str, Any]:
    settings = {
        "model_name_or_path": str(model), "stage": "sft", "do_train": True, "template": "chatml",
        "finetuning_type": "lora" if case.lora else "full", "lora_rank": 8, "lora_alpha": 32, "lora_target": "all",
        "dataset": "bench", "dataset_dir": str(BENCH), "cutoff_len": LENGTH, "packing": True, "neat_packing": True,
        "per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "max_steps": steps, "learning_rate": 1e-5,
        "disable_gradient_checkpointing": not case.checkpointing, "save_strategy": "no", "report_to": "none",
        "output_dir": str(output), "overwrite_output_dir": True, "overwrite_cache": True, "use_cpu": True, "infer_dtype": "float32",
    }  # fmt: skip
    path = output / "settings.yaml"  # JSON is YAML; its reader of .json files takes no path
    path.write_text(json.dumps(settings))
    return _probe(case, "llamafactory.train.tuner:run_exp", [path], output)


def _ms_swift(case: Case, model: Path, data: Path, output: Path, steps: int) -> dict[str, Any]:
    # It refuses --packing without flash attention, so that its rows are padded.
    arguments = [
        "--model", model, "--model_type", "llama", "--template", "chatml", "--dataset", data, "--max_length", LENGTH,
        "--tuner_type", "lora" if case.lora else "full", "--per_device_train_batch_size", 4, "--gradient_accumulation_steps", 1,
        "--max_steps", steps, "--learning_rate", "1e-5", "--lora_dropout", 0, "--torch_dtype", "float32", "--save_strategy", "no",
        "--gradient_checkpointing", "false", "--report_to", "none", "--output_dir", output, "--use_cpu", "true", "--use_hf", "true",
    ]  # fmt: skip
    return _probe(case, "swift.pipelines:sft_main", arguments, output)


def _probe(case: Case, target: str, arguments: list[object], output: Path) -> dict[str, Any]:
    result = output / "result.json"
    result.unlink(missing_ok=True)
    _call([peer_python(case.system), PEERS / "probe.py", result, target, *arguments], output)
    found: dict[str, Any] = json.loads(result.read_text())
    return found


def peer_python(peer: str) -> Path:
    """Return the interpreter of the peer's venv, made at first use; torch first, so that nothing pulls another build."""
    venv = BENCH / peer
    if not (venv / "ready").exists():
        subprocess.run([sys.executable, "-m", "venv", venv], check=True)
        for packages in ([TORCH], PACKAGES[peer]):
            subprocess.run([venv / "bin" / "pip", "install", "--quiet", *packages], check=True)
        (venv / "ready").touch()
    return venv / "bin" / "python"


def _call(command: list[object], output: Path) -> None:
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(PEERS),
        "DISABLE_VERSION_CHECK": "1",
    }
    with (output / "log.txt").open("w") as log:
        subprocess.run(
            [str(part) for part in command],
            check=True,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            cwd=ROOT,
        )


def _print(results: dict[Case, dict[str, Any]]) -> None:
    table = Table(
        "run",
        "real tokens/s",
        "s/step",
        "peak RSS MiB",
        title=f"SFT of SmolLM2-135M, float32, {LENGTH} tokens",
    )
    for case, found in results.items():
        table.add_row(
            case.name,
            f"{found['tokens_per_s']:.1f}",
            f"{found['seconds_per_step']:.1f}",
            f"{found['peak_rss_mib']:.0f}",
        )
    console = Console()
    console.print(table)
    for lora in (False, True):
        ours = [
            r["tokens_per_s"]
            for case, r in results.items()
            if case.system == "megaswift" and case.lora is lora
        ]
        theirs = {
            case.name: r["tokens_per_s"]
            for case, r in results.items()
            if case.system != "megaswift" and case.lora is lora
        }
        if ours and theirs:
            best = max(theirs, key=lambda name: theirs[name])
            console.print(
                f"{'LoRA' if lora else 'full'}: {ours[0] / theirs[best]:.2f}x of the best peer ({best})"
            )


if __name__ == "__main__":
    main()
