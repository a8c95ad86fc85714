"""The guard against a loss that jumps."""

from dataclasses import replace

import pytest
import torch.distributed as dist

from megaswift.config.parse import parse
from megaswift.config.rules import check_request
from megaswift.errors import ConfigError, TrainingError
from megaswift.training.loop import Progress, Step
from megaswift.training.spikes import SpikeGuard
from tests.unit.test_wall_time import RESULT


def feed(guard: SpikeGuard, losses: list[float], *, first: int = 1) -> None:
    for number, loss in enumerate(losses, start=first):
        progress = Progress(step=number)
        guard.after_step(
            Step(progress=progress, result=replace(RESULT, loss=loss), time_s=1.0, is_last=False)
        )


def test_a_loss_that_stays_up_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    guard = SpikeGuard(2.0)
    feed(guard, [3.0] * 20 + [6.1] * 9)
    with pytest.raises(TrainingError, match=r"loss=6\.1 at step 30.*above 2 x 3.*before step 21 "):
        feed(guard, [6.1], first=30)


def test_single_jumps_and_a_high_start_do_not() -> None:
    feed(SpikeGuard(2.0), [11.0] * 5 + [5.0] * 30 + [20.0] * 9 + [5.0] + [20.0] * 9)
    feed(SpikeGuard(2.0), [1.0] * 9 + [9.0] * 30)  # too few low steps to be the usual


def test_a_factor_of_one_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"spike_factor=1\.0 is too small"):
        check_request(parse("sft", "--model m --dataset d --spike_factor 1".split()).config)
