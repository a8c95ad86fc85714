"""Callbacks of one's own in whole runs: what they are told, how they end a run, and that ranks fail together."""

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch.distributed as dist

from megaswift.checkpoint.store import Store
from megaswift.config.parse import parse_run
from megaswift.config.run import RunConfig
from megaswift.errors import ConfigError, TrainingError, UserError
from megaswift.platforms.platform import select_platform
from megaswift.training.run import RunSummary, train_in_world
from megaswift.training.saver import Saver
from tests.distributed.test_rlhf_runs import train_all
from tests.harness.distributed import run_distributed
from tests.harness.tiny_run import make_tiny_run
from tests.harness.training import temporary_folder

PLUGIN = '''
import json
import torch.distributed as dist

class Watch:
    """Writes what it is told."""
    def __init__(self, run):
        self.path = f"{run.checkpoint.output_dir}.{dist.get_rank()}.jsonl"
    def write(self, *words):
        with open(self.path, "a") as file:
            file.write(json.dumps(words) + "\\n")
    def after_step(self, step):
        self.write("step", step.progress.step, step.result.loss, step.result.grad_norm)
    def after_validation(self, line):
        self.write("validation", line["step"], line["eval_loss"])
    def after_save(self, folder):
        self.write("save", folder.name, (folder / "manifest.json").exists())

class EndsOnOne:
    def __init__(self, run): pass
    def after_step(self, step):
        return dist.get_rank() == 1 and step.progress.step == 3

class EndsByValidation:
    def __init__(self, run): pass
    def after_validation(self, line):
        return line["step"] == 2

def on_one_rank(run):
    return EndsOnOne(run) if dist.get_rank() == 1 else None

class FailsOnOne:
    def __init__(self, run): pass
    def after_step(self, step):
        if dist.get_rank() == 1:
            raise ValueError("no more")

class FailsLater:
    def __init__(self, run): pass
    def after_step(self, step):
        if dist.get_rank() == 1 and step.progress.step == 3:
            raise ValueError("no more")

class LeavesOnOne:
    def __init__(self, run): pass
    def after_step(self, step):
        if dist.get_rank() == 1:
            raise SystemExit(0)

class FailsAfterSave:
    def __init__(self, run): pass
    def after_save(self, folder):
        if dist.get_rank() == 0:
            raise OSError("no route")

class Refuses:
    def __init__(self, run):
        raise KeyError("token")

def nothing(run):
    return object()
'''


@cache
def folder() -> Path:
    made = temporary_folder()
    make_tiny_run(made, rows=24)
    (made / "plugin.py").write_text(PLUGIN)
    return made


def run_of(output: str, *names: str) -> RunConfig:
    flags = [
        "--model", str(folder() / "model"), "--dataset", str(folder() / "rows.jsonl"), "--split_dataset_ratio", "0.2",
        "--output_dir", str(folder() / output), "--train_iters", "4", "--global_batch_size", "4", "--eval_steps", "2",
        "--save_steps", "2", "--report_to", "none", "--save_safetensors", "false", "--pipeline_model_parallel_size", "2",
        *(["--callbacks", *(name if name == "print" else f"{folder() / 'plugin.py'}:{name}" for name in names)] if names else []),
    ]  # fmt: skip
    return parse_run("sft", flags)


def lines(output: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder() / output / "logging.jsonl").read_text().splitlines()]


def figures(output: str) -> list[Any]:
    return [line.get("loss", line.get("eval_loss")) for line in lines(output)]


@pytest.mark.slow
@pytest.mark.ranks(2)
def test_callbacks_are_told_on_every_rank_and_change_nothing() -> None:
    run_distributed(train_all, 2, [run_of("plain"), run_of("watched", "Watch", "print")])
    assert figures("watched") == figures("plain")
    steps = [["step", one["step"], one["loss"], one["grad_norm"]] for one in lines("plain") if "loss" in one]
    valid = [["validation", one["step"], one["eval_loss"]] for one in lines("plain") if "eval_loss" in one]
    saves = [["save", f"checkpoint-{step}", True] for step in (2, 4)]
    expected = [*steps[:2], valid[0], saves[0], *steps[2:], valid[1], saves[1]]
    for rank in range(2):
        told = [json.loads(line) for line in (folder() / f"watched.{rank}.jsonl").read_text().splitlines()]
        assert told == expected


def summary_of(rank: int, world_size: int, run: RunConfig) -> RunSummary:
    return train_in_world(run, select_platform("cpu"))


@pytest.mark.slow
@pytest.mark.ranks(2)
@pytest.mark.parametrize(("name", "last"), [("EndsOnOne", 3), ("on_one_rank", 3), ("EndsByValidation", 2)])
def test_true_on_one_rank_ends_the_run_on_all(name: str, last: int) -> None:
    """The last step is logged, validated and saved, due or not."""
    for found in run_distributed(summary_of, 2, run_of(name, name)):
        assert (found.step, found.total_steps, found.interrupted) == (last, last, False)
        assert found.checkpoint == folder() / name / f"checkpoint-{last}"
    assert [line["step"] for line in lines(name)] == [1, 2, 2, 3, 3][: 2 * last - 1]


def message_of(rank: int, world_size: int, run: RunConfig) -> str:
    try:
        train_in_world(run, select_platform("cpu"))
    except (UserError, SystemExit) as error:
        dist.barrier()  # nobody waits elsewhere
        return str(error)
    return "trained"


def message_amid_a_save(rank: int, world_size: int, run: RunConfig) -> str:
    with patch.object(Saver, "is_written", lambda self: False):
        return message_of(rank, world_size, run)


@pytest.mark.slow
@pytest.mark.ranks(2)
def test_a_save_in_the_background_survives_an_error_after_it() -> None:
    run = run_of("amid", "FailsLater")
    run = replace(run, checkpoint=replace(run.checkpoint, async_save=True))
    ends = run_distributed(message_amid_a_save, 2, run)
    assert "FailsLater fails in after_step on rank 1: ValueError: no more" in ends[1]
    newest = Store(folder() / "amid").latest_complete()
    assert newest is not None and newest.manifest.step == 2


@pytest.mark.slow
@pytest.mark.ranks(2)
@pytest.mark.parametrize(
    ("name", "rank", "kind", "message"),
    [
        ("FailsOnOne", 1, TrainingError, "fails in after_step on rank 1: ValueError: no more. Mend it."),
        ("LeavesOnOne", 1, TrainingError, "fails in after_step on rank 1: SystemExit: 0. Mend it."),
        ("FailsAfterSave", 0, TrainingError, "fails in after_save on rank 0: OSError: no route. Mend it."),
        ("Refuses", 0, ConfigError, "fails when it gets the RunConfig: KeyError: 'token'. Mend it."),
        ("nothing", 0, ConfigError, "returned nothing with one of after_step, after_validation, after_save."),
        ("Wach", 0, ConfigError, "has no Wach. Did you mean Watch?"),
    ],
)
def test_ranks_fail_together_with_one_message(
    name: str, rank: int, kind: type[UserError], message: str
) -> None:
    found = run_distributed(message_of, 2, run_of(f"failing {name}", name))
    assert message in found[rank] and f"callbacks={folder() / 'plugin.py'}:{name}" in found[rank]
    assert found[1 - rank] == str(kind.exit_code)
    assert (folder() / f"failing {name}" / "checkpoint-2").exists() == (name == "FailsAfterSave")
