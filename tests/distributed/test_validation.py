"""The loss of held-back rows that a whole run logs: whatever the global batch, and not at all where nobody asks."""

import json
from functools import cache
from pathlib import Path

import pytest

from megaswift.config.parse import parse_run
from tests.distributed.test_rlhf_runs import train_all
from tests.harness.distributed import run_distributed
from tests.harness.tiny_run import make_tiny_run
from tests.harness.training import temporary_folder

RUNS = {
    "mean filled": ("--global_batch_size", "16", "--calculate_per_token_loss", "false"),
    "mean": ("--global_batch_size", "1", "--calculate_per_token_loss", "false"),
    "tokens filled": ("--global_batch_size", "16"),
    "tokens": ("--global_batch_size", "1"),
    "none": ("--global_batch_size", "1", "--eval_strategy", "no"),
}
EPOCHS = (
    "--global_batch_size",
    "6",
    "--num_train_epochs",
    "2",
    "--save_strategy",
    "epoch",
    "--logging_steps",
    "1",
)  # of 15 rows
ALL = {name: ("--train_iters", "1", *words) for name, words in RUNS.items()} | {"epochs": EPOCHS}


@cache
def lines() -> dict[str, list[dict[str, float]]]:
    """Return the log of every run: one step that moves nothing."""
    folder = temporary_folder()
    make_tiny_run(folder, rows=20)

    def flags(name: str) -> list[str]:
        return [
            "--model", str(folder / "model"), "--dataset", str(folder / "rows.jsonl"), "--split_dataset_ratio", "0.25",
            "--output_dir", str(folder / name), "--learning_rate", "1e-12", "--report_to", "none", *ALL[name],
        ]  # fmt: skip

    run_distributed(train_all, 1, [parse_run("sft", flags(name)) for name in ALL])
    assert all((folder / name / "latest").read_text() == "checkpoint-1\n" for name in RUNS)
    logs = {name: Path(folder / name / "logging.jsonl").read_text() for name in ALL}
    return {name: [json.loads(line) for line in log.splitlines()] for name, log in logs.items()}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mean", "tokens"])
def test_rows_that_fill_no_global_batch_count_as_they_are(kind: str) -> None:
    (found,), (expected,) = (
        [line["eval_loss"] for line in lines()[name] if "eval_loss" in line]
        for name in (f"{kind} filled", kind)
    )
    assert found == pytest.approx(expected, rel=1e-6)  # float32 sums in another order


@pytest.mark.slow
def test_run_without_validations_keeps_its_rows_back_and_saves() -> None:
    assert [line["step"] for line in lines()["none"]] == [1]
    assert "eval_loss" not in lines()["none"][0]


@pytest.mark.slow
def test_each_epoch_ends_with_a_validation_where_it_ends_with_a_checkpoint() -> None:
    """Fifteen rows, six a step: epochs end in the third and the fifth step, and so does the run."""
    assert [line["step"] for line in lines()["epochs"] if "eval_loss" in line] == [3, 5]
