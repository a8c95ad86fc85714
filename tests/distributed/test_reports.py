"""A run on two ranks that reports to Weights & Biases without network, stops, and goes on: one run there, rank 0's."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from megaswift.config.parse import parse_run
from tests.distributed.test_rlhf_runs import train_all
from tests.harness.distributed import run_distributed
from tests.harness.tiny_run import make_tiny_run
from tests.unit.test_services import runs_below

ENVIRONMENT = {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}


def train_offline(rank: int, world_size: int, words: list[str]) -> None:
    import wandb

    before = {name: os.environ.get(name) for name in ENVIRONMENT}
    os.environ.update(ENVIRONMENT)
    train_all(rank, world_size, [parse_run("sft", words)])
    wandb.teardown()
    for name, value in before.items():  # the processes go on to other tests
        del os.environ[name]
        if value is not None:
            os.environ[name] = value


@pytest.mark.ranks(2)
def test_a_run_is_reported_with_its_channels_and_goes_on_after_a_stop(tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason="the extra `test` installs it")
    model, rows = make_tiny_run(tmp_path, rows=24)
    lines = [json.loads(line) for line in rows.read_text().splitlines()]
    named = [{**line, "channel": "ab"[number % 2]} for number, line in enumerate(lines)]
    rows.write_text("".join(json.dumps(line) + "\n" for line in named))
    output = tmp_path / "out"
    words = [
        "--model", str(model), "--dataset", str(rows), "--split_dataset_ratio", "0.2", "--output_dir", str(output),
        "--global_batch_size", "8", "--save_steps", "2", "--train_iters", "3", "--enable_channel_loss", "true",
        "--report_to", "wandb", "tensorboard", "--save_safetensors", "false", "--lr_decay_style", "constant",
    ]  # fmt: skip
    run_distributed(train_offline, 2, words)
    (output / "checkpoint-3" / "manifest.json").unlink()  # as if the run had been killed before
    run_distributed(train_offline, 2, words)
    first, second = runs_below(output)
    assert first.id == second.id
    told = [json.loads(line) for line in (output / "logging.jsonl").read_text().splitlines()]
    assert figures(second.points) == figures(line for line in told if line["step"] == 3)
    assert [point["step"] for point in first.points] == [1, 2, 2, 3, 3]
    last, valid = second.points
    assert {"train/loss", "train/loss_a", "train/loss_b", "train/token_acc"} <= last.keys()
    assert {"eval/eval_loss", "eval/eval_loss_a", "eval/eval_loss_b", "eval/eval_token_acc"} <= valid.keys()
    assert list((output / "runs").iterdir()), "TensorBoard, too"


def figures(lines: Any) -> list[dict[str, Any]]:
    """Return what does not depend on a clock, under the names of logging.jsonl."""
    wanted = (
        "step",
        "loss",
        "loss_a",
        "loss_b",
        "token_acc",
        "eval_loss",
        "eval_loss_a",
        "eval_loss_b",
        "eval_token_acc",
        "lr",
        "grad_norm",
    )
    short = [{name.partition("/")[2] or name: value for name, value in line.items()} for line in lines]
    return [{name: line[name] for name in wanted if name in line} for line in short]
