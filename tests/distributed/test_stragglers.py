"""A slow rank among two is named in the log lines; equal ranks are not. Links are measured by the groups that they join."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megaswift.launch.heartbeat import Heartbeat
from megaswift.training.allocation import measure_links
from megaswift.training.engine import StepResult
from megaswift.training.feed import TrainFeed
from megaswift.training.loop import Progress, train_loop
from megaswift.training.stragglers import Stragglers, places_of_ranks
from tests.harness.distributed import run_distributed

pytestmark = pytest.mark.alone

STEPS = 30


class Sleeper:
    """An engine whose step takes so long on this rank, and then meets the others."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def train_step(self, batches: list[Any], *, interrupted: bool) -> StepResult:
        time.sleep(self._seconds)
        dist.all_reduce(torch.zeros(1))
        return StepResult(
            loss=1.0,
            grad_norm=1.0,
            lr=0.0,
            updated=True,
            tokens=1,
            loss_tokens=1,
            flop=1.0,
            interrupted=False,
        )


class Feed:
    """A feed without rows."""

    phase, patient, items_per_step = TrainFeed.phase, TrainFeed.patient, 1

    def batch(self, consumed: int) -> list[Any]:
        return []


class Lines:
    """A reporter that keeps its lines."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []

    def report(self, line: Mapping[str, Any]) -> None:
        self.lines.append(dict(line))

    def close(self) -> None:
        """Nothing is open."""


class Never:
    """Nobody asks to stop."""

    seen = signalled = False


def reported(rank: int, world_size: int, folder: Path, slow: tuple[float, ...]) -> list[dict[str, Any]]:
    """Return the lines of a loop whose steps take `slow[rank]` seconds on this rank."""
    lines, cpu = Lines(), torch.device("cpu")
    with Heartbeat(folder, rank=rank, world_size=world_size, patience_s=0) as heartbeat:
        watch = Stragglers(
            lambda: heartbeat.work_s,
            [lines] if rank == 0 else [],
            peers=0,
            places=places_of_ranks(cpu),
            every=2,
            device=cpu,
            window_s=0.4,
        )
        train_loop(
            Sleeper(slow[rank]),  # type: ignore[arg-type]  # as much of an Engine as the loop uses
            Feed(),  # type: ignore[arg-type]
            start=Progress(),
            total_steps=STEPS,
            callbacks=[watch],
            interrupt=Never(),
            pulse=heartbeat,
        )
    return lines.lines


def test_the_slow_one_of_two_ranks_is_named_once(tmp_path: Path) -> None:
    found, nothing = run_distributed(reported, 2, tmp_path, (0.02, 0.1))
    (line,) = found
    assert line["straggler"] == 1 and line["place"] and 5 < line["step"] <= STEPS
    assert line["work_s"] > 1.4 * line["usual_work_s"]
    assert nothing == []


def test_equal_ranks_are_not_named(tmp_path: Path) -> None:
    assert run_distributed(reported, 2, tmp_path, (0.05, 0.05)) == [[], []]


def links(rank: int, world_size: int) -> list[tuple[str, ...]]:
    """Return the groups that this rank tells the links of, in a world of three nodes, the first of which has two ranks."""
    found = measure_links(["n0", "n0", "n1", "n2"], torch.device("cpu"))
    assert all(one.bytes_s > 0 for one in found)
    total = torch.ones(1)
    dist.all_reduce(total)  # the groups that were left behind disturb nothing
    assert total.item() == world_size
    return [one.hosts for one in found]


def test_links_are_measured_inside_each_node_and_with_both_neighbours() -> None:
    told = [group for groups in run_distributed(links, 4) for group in groups]
    assert sorted(told) == [("n0",), ("n0", "n1"), ("n1", "n2"), ("n2", "n0")]
