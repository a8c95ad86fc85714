"""Runs that held-back rows end early: where, what is kept, and that stopping before changes nothing."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from megaswift.checkpoint.store import Store
from megaswift.config.parse import parse_run
from tests.distributed.test_rlhf_runs import train_all
from tests.harness.distributed import run_distributed
from tests.harness.tiny_run import make_tiny_run
from tests.harness.training import temporary_folder

PATIENCE, STEPS = 2, 20


@cache
def folder() -> Path:
    made = temporary_folder()
    make_tiny_run(made, rows=24)
    return made


def train(output: str, *more: str, patience: int = PATIENCE) -> Path:
    """Run on two stages, with a learning rate at which held-back rows soon are the worse for it."""
    flags = [
        "--model", str(folder() / "model"), "--dataset", str(folder() / "rows.jsonl"), "--split_dataset_ratio", "0.2",
        "--output_dir", str(folder() / output), "--pipeline_model_parallel_size", "2", "--train_iters", str(STEPS),
        "--global_batch_size", "4", "--learning_rate", "1e-1", "--lr_decay_style", "constant", "--eval_steps", "1",
        "--save_steps", "1", "--report_to", "none", "--save_safetensors", "false", "--early_stop_interval", str(patience), *more,
    ]  # fmt: skip
    run_distributed(train_all, 2, [parse_run("sft", flags)])
    return folder() / output


def losses(output: Path) -> dict[int, float]:
    """Return what each validation found, by step."""
    lines = [json.loads(line) for line in (output / "logging.jsonl").read_text().splitlines()]
    return {line["step"]: line["eval_loss"] for line in lines if "eval_loss" in line}


def training_lines(output: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (output / "logging.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


def steps(output: Path) -> list[int]:
    return [one.manifest.step for one in Store(output).complete()]


@cache
def whole() -> Path:
    return train("whole")


@pytest.mark.slow
@pytest.mark.ranks(2)
def test_run_ends_after_so_many_validations_without_a_lower_loss() -> None:
    found = losses(whole())
    lowest = min(found, key=lambda step: found[step])
    assert PATIENCE < max(found) < STEPS, "choose another learning rate"
    assert max(found) == lowest + PATIENCE
    assert (whole() / "best").read_text() == f"checkpoint-{lowest}\n"
    assert steps(whole()) == list(range(1, max(found) + 1))


@cache
def limited() -> Path:
    return train("limited", "--save_total_limit", "1", "--logging_steps", "100")


@pytest.mark.slow
@pytest.mark.ranks(2)
def test_best_checkpoint_outlives_the_limit() -> None:
    last = max(losses(whole()))
    assert losses(limited()) == losses(whole())
    assert steps(limited()) == [last - PATIENCE, last]


@pytest.mark.slow
@pytest.mark.ranks(2)
def test_last_step_is_logged_where_a_validation_ends_the_run() -> None:
    *_, last = training_lines(whole())
    (found,) = training_lines(limited())
    assert found["step"] == max(losses(whole()))
    assert (found["step"], found["loss"], found["lr"]) == (last["step"], last["loss"], last["lr"])


@pytest.mark.slow
@pytest.mark.ranks(2)
def test_resumed_run_counts_on_and_an_ended_one_stays_ended() -> None:
    before, last = losses(whole()), max(losses(whole()))
    (whole() / f"checkpoint-{last}" / "manifest.json").unlink()
    assert losses(train("whole")) == before
    assert losses(train("whole")) == before
    assert steps(whole())[-1] == last
    assert max(losses(train("whole", patience=PATIENCE + 1))) == last + 1
