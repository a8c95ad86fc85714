"""The loss curve of every emulated FP8 recipe beside that of bfloat16: `make bench-fp8`.

    python -m tests.harness.bench_fp8 [--steps 200] [--layers 30] [--max_length 256] [--only RECIPE ...]

SmolLM2-135M is trained with `megaswift sft` on the same rows in the same order. The final loss is that of the held-back
rows after the last step: the loss of one batch of a few rows varies by half of itself. `--layers` keeps the first layers
of its trained weights only, for a machine without hours to spare.
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.harness.bench import BENCH, ROOT, prepare_rows
from tests.harness.smollm2 import fetch_smollm2

RECIPES = ("delayed", "tensorwise", "blockwise", "mxfp8")
HELD_BACK = 0.06  # share of the rows


def shallow(model: Path, layers: int) -> Path:
    """Return a folder with the first `layers` layers of `model`."""
    folder = BENCH / f"{model.name}-{layers}-layers"
    if not (folder / "config.json").exists():
        AutoModelForCausalLM.from_pretrained(model, num_hidden_layers=layers).save_pretrained(folder)
        AutoTokenizer.from_pretrained(model).save_pretrained(folder)
    return folder


def losses(
    model: Path, data: Path, recipe: str | None, *, steps: int, max_length: int, rate: float
) -> tuple[float, float, float]:
    """Return the mean loss of the first and of the last tenth of the steps, and that of the held-back rows after them."""
    output = BENCH / "runs" / f"fp8-{recipe or 'bf16'}"
    shutil.rmtree(output, ignore_errors=True)
    command = [
        sys.executable, "-m", "megaswift.cli.main", "sft", "--model", model, "--dataset", data, "--packing", "true",
        "--max_length", max_length, "--train_iters", steps, "--global_batch_size", 1, "--learning_rate", rate,
        "--split_dataset_ratio", HELD_BACK, "--eval_steps", steps,
        "--tuner_type", "full", "--torch_dtype", "bfloat16", "--save_strategy", "no", "--save_safetensors", "false",
        "--output_dir", output, "--resume", "never", "--logging_steps", 1, "--nproc_per_node", 1,
    ]  # fmt: skip
    if recipe is not None:
        command += ["--fp8_format", "hybrid", "--fp8_recipe", recipe]
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in (output / "logging.jsonl").read_text().splitlines()]
    curve = [line["loss"] for line in lines if "loss" in line]
    (held_back,) = [line["eval_loss"] for line in lines if "eval_loss" in line]
    tenth = max(1, steps // 10)
    return sum(curve[:tenth]) / tenth, sum(curve[-tenth:]) / tenth, held_back


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--max_length", type=int, default=256)
    parser.add_argument("--learning_rate", type=float, default=2e-5)
    parser.add_argument("--data", type=Path, help="alpaca rows (json list); default: rows written here")
    parser.add_argument("--only", nargs="*", choices=RECIPES, default=RECIPES)
    chosen = parser.parse_args()
    BENCH.mkdir(exist_ok=True)
    model = fetch_smollm2(ROOT / ".demo" / "SmolLM2-135M-Instruct")
    if chosen.layers != 30:
        model = shallow(model, chosen.layers)
    data = prepare_rows(chosen.data)
    print(f"{model.name}, {chosen.steps} steps of {chosen.max_length} tokens, hybrid format\n")
    print("| products in | first tenth | last tenth | held-back rows | beside bf16 |\n|---|--:|--:|--:|--:|")
    plain = None
    for recipe in (None, *chosen.only):
        first, last, held_back = losses(
            model,
            data,
            recipe,
            steps=chosen.steps,
            max_length=chosen.max_length,
            rate=chosen.learning_rate,
        )
        plain = plain or held_back
        change = held_back / plain - 1
        print(
            f"| {recipe or 'bf16'} | {first:.4f} | {last:.4f} | {held_back:.4f} | {change:+.2%} |", flush=True
        )


if __name__ == "__main__":
    main()
