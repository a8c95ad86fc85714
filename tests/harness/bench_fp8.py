"""The loss curve of every emulated FP8 recipe beside that of bfloat16: `make bench-fp8`.

    python -m tests.harness.bench_fp8 [--steps 200] [--layers 30] [--bf16_layers 0] [--max_length 256] [--random] [--only RECIPE ...]

SmolLM2-135M is trained with `megaswift sft` on the same rows in the same order. The final loss is that of the held-back
rows after the last step: the loss of one batch of a few rows varies by half of itself. It is given as the run computes it,
and for the weights that the run exports, in bfloat16. `--layers` keeps the first layers of the trained weights only, for a
machine without hours to spare; `--random` begins with weights that are drawn, as pre-training does.
"""

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from tests.harness.bench import BENCH, ROOT, prepare_rows
from tests.harness.smollm2 import fetch_smollm2

RECIPES = ("delayed", "tensorwise", "blockwise", "mxfp8")
HELD_BACK = 0.06  # share of the rows
NO_RATE = 1e-12  # far below what changes a weight in bfloat16


def shallow(model: Path, layers: int) -> Path:
    """Return a folder with the first `layers` layers of `model`."""
    folder = BENCH / f"{model.name}-{layers}-layers"
    if not (folder / "config.json").exists():
        AutoModelForCausalLM.from_pretrained(model, num_hidden_layers=layers).save_pretrained(folder)
        AutoTokenizer.from_pretrained(model).save_pretrained(folder)
    return folder


def untrained(model: Path) -> Path:
    """Return a folder with the same model and weights that are drawn."""
    folder = BENCH / f"{model.name}-random"
    if not (folder / "config.json").exists():
        torch.manual_seed(0)
        drawn = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model), dtype=torch.bfloat16)
        drawn.save_pretrained(folder)
        AutoTokenizer.from_pretrained(model).save_pretrained(folder)
    return folder


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What all runs share."""

    model: Path
    data: Path
    steps: int
    max_length: int
    rate: float
    bf16_layers: int  # at either end of the decoder; not with delayed scales


def losses(setting: Setting, recipe: str | None) -> tuple[float, float, float, float]:
    """Return the mean loss of the first and of the last tenth of the steps, and that of the held-back rows after them: as
    the run computes it, and in bfloat16."""
    flags: list[object] = []
    if recipe is not None:
        flags += ["--fp8_format", "hybrid", "--fp8_recipe", recipe]
        if setting.bf16_layers and recipe != "delayed":
            flags += ["--first_last_layers_bf16", "true"]
            flags += ["--num_layers_at_start_in_bf16", setting.bf16_layers]
            flags += ["--num_layers_at_end_in_bf16", setting.bf16_layers]
    name = recipe or "bf16"
    output, curve, held_back = train(setting, setting.model, name, [*flags, "--train_iters", setting.steps])
    exported = output / f"checkpoint-{setting.steps}" / "hf"
    still = replace(setting, rate=NO_RATE)
    _, _, in_bf16 = train(still, exported, f"{name}-exported", ["--train_iters", 1])
    tenth = max(1, setting.steps // 10)
    return sum(curve[:tenth]) / tenth, sum(curve[-tenth:]) / tenth, held_back, in_bf16


def train(
    setting: Setting, model: Path, name: str, flags: Sequence[object]
) -> tuple[Path, list[float], float]:
    """Return the folder of a run, its losses step by step, and that of the held-back rows after the last."""
    output = BENCH / "runs" / f"fp8-{name}"
    shutil.rmtree(output, ignore_errors=True)
    command = [
        sys.executable, "-m", "megaswift.cli.main", "sft", "--model", model, "--dataset", setting.data, "--packing", "true",
        "--max_length", setting.max_length, "--global_batch_size", 1, "--learning_rate", setting.rate,
        "--split_dataset_ratio", HELD_BACK, "--eval_steps", setting.steps, "--tuner_type", "full", "--torch_dtype", "bfloat16",
        "--save_strategy", "no", "--save_optim", "false", "--output_dir", output, "--resume", "never", "--logging_steps", 1,
        "--nproc_per_node", 1, *flags,
    ]  # fmt: skip
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in (output / "logging.jsonl").read_text().splitlines()]
    (held_back,) = [line["eval_loss"] for line in lines if "eval_loss" in line]
    return output, [line["loss"] for line in lines if "loss" in line], held_back


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--bf16_layers", type=int, default=0, help="at either end; not with delayed")
    parser.add_argument("--max_length", type=int, default=256)
    parser.add_argument("--learning_rate", type=float, default=2e-5)
    parser.add_argument("--data", type=Path, help="alpaca rows (json list); default: rows written here")
    parser.add_argument("--random", action="store_true", help="begin with weights that are drawn")
    parser.add_argument("--only", nargs="*", choices=RECIPES, default=RECIPES)
    chosen = parser.parse_args()
    BENCH.mkdir(exist_ok=True)
    model = fetch_smollm2(ROOT / ".demo" / "SmolLM2-135M-Instruct")
    if chosen.layers != 30:
        model = shallow(model, chosen.layers)
    if chosen.random:
        model = untrained(model)
    setting = Setting(
        model=model,
        data=prepare_rows(chosen.data),
        steps=chosen.steps,
        max_length=chosen.max_length,
        rate=chosen.learning_rate,
        bf16_layers=chosen.bf16_layers,
    )
    print(
        f"{model.name}, {chosen.steps} steps of {chosen.max_length} tokens, hybrid format, "
        f"{chosen.bf16_layers} layers at either end in bfloat16 (delayed: 0)\n"
    )
    print(
        "| products in | first tenth | last tenth | beside bf16 | held-back rows | beside bf16 | exported weights in bf16 | beside bf16 |"
    )
    print("|---|" + "--:|" * 7)
    plain: tuple[float, ...] = ()
    for recipe in (None, *chosen.only):
        first, *last = losses(setting, recipe)
        plain = plain or tuple(last)
        cells = [f"{loss:.4f} | {loss / beside - 1:+.2%}" for loss, beside in zip(last, plain, strict=True)]
        print(f"| {recipe or 'bf16'} | {first:.4f} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
