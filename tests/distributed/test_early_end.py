"""Runs that held-back rows end early: where, what is kept, and that stopping before changes nothing."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from megaswift.checkpoint.store import Store
from megaswift.config.parse import parse_run
from megaswift.config.run import RunConfig
from megaswift.errors import ConfigError, UserError
from megaswift.platforms.platform import select_platform
from megaswift.training.run import train_in_world
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


def flags(output: str, *more: str, patience: int = PATIENCE) -> list[str]:
    """Two stages, with a learning rate at which held-back rows soon are the worse for it."""
    return [
        "--model", str(folder() / "model"), "--dataset", str(folder() / "rows.jsonl"), "--split_dataset_ratio", "0.2",
        "--output_dir", str(folder() / output), "--pipeline_model_parallel_size", "2", "--train_iters", str(STEPS),
        "--global_batch_size", "4", "--learning_rate", "1e-1", "--lr_decay_style", "constant", "--eval_steps", "1",
        "--save_steps", "1", "--report_to", "none", "--save_safetensors", "false", "--early_stop_interval", str(patience), *more,
    ]  # fmt: skip


def train(output: str, *more: str, patience: int = PATIENCE) -> Path:
    run_distributed(train_all, 2, [parse_run("sft", flags(output, *more, patience=patience))])
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
def test_another_figure_says_which_is_best_and_when_it_is_enough() -> None:
    output = train("accurate", "--metric_for_best_model", "eval_token_acc", "--save_total_limit", "1")
    lines = [json.loads(line) for line in (output / "logging.jsonl").read_text().splitlines()]
    found = {line["step"]: line["eval_token_acc"] for line in lines if "eval_loss" in line}
    highest = max(found, key=lambda step: found[step])
    lowest = min(losses(output), key=lambda step: losses(output)[step])
    assert PATIENCE < max(found) < STEPS and highest != lowest, "choose another learning rate"
    assert max(found) == highest + PATIENCE
    assert (output / "best").read_text() == f"checkpoint-{highest}\n"
    assert steps(output) == [highest, highest + PATIENCE]


@pytest.mark.slow
@pytest.mark.ranks(2)
def test_resumed_run_counts_on_and_an_ended_one_stays_ended() -> None:
    before, last = losses(whole()), max(losses(whole()))
    (whole() / f"checkpoint-{last}" / "manifest.json").unlink()
    assert losses(train("whole")) == before
    assert losses(train("whole")) == before
    assert steps(whole())[-1] == last
    assert max(losses(train("whole", patience=PATIENCE + 1))) == last + 1


def refused(rank: int, world_size: int, run: RunConfig) -> str:
    try:
        train_in_world(run, select_platform("cpu"))
    except (UserError, SystemExit) as error:
        return str(error)
    return "trained"


@pytest.mark.slow
@pytest.mark.ranks(2)
def test_figure_that_nobody_reports_ends_the_run_before_rows_are_read() -> None:
    run = parse_run("sft", flags("unknown", "--metric_for_best_model", "acc"))
    message = "metric_for_best_model=acc is not what validations report here. Choose from loss, token_acc."
    assert run_distributed(refused, 2, run) == [message, str(ConfigError.exit_code)]
    assert not (folder() / "unknown").exists()
