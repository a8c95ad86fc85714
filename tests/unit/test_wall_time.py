"""The end of a job's time in the training loop, on a simulated clock."""

from dataclasses import dataclass
from typing import Any

import pytest

from megaswift.launch.governor import Governor
from megaswift.training.due import Due
from megaswift.training.engine import StepResult
from megaswift.training.loop import Progress, Step
from megaswift.training.wall_time import WallTime

RESULT = StepResult(
    loss=1.0, grad_norm=1.0, lr=1.0, updated=True, tokens=1, loss_tokens=1, flop=1.0, interrupted=False
)


@dataclass
class Feed:
    """Six items a step, fifteen an epoch."""

    items_per_step: int = 6

    def epochs_done(self, consumed: int) -> int:
        return consumed // 15


FEED: Any = Feed()


@dataclass
class Clock:
    now: float = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Signals:
    seen: bool = False


@dataclass
class Disk:
    """Takes `save_s` for a save, of which training waits for `waited_s`, but for the one before."""

    clock: Clock
    save_s: float = 11.0
    waited_s: float = 11.0
    began: float | None = None

    def save(self, progress: Progress) -> float | None:
        before_s = self.finish(progress)
        self.began = self.clock.now
        self.clock.now += self.waited_s
        return before_s if self.waited_s < self.save_s else self.finish(progress)

    def finish(self, progress: Progress) -> float | None:
        if self.began is None:
            return None
        self.clock.now, began, self.began = max(self.clock.now, self.began + self.save_s), self.began, None
        return self.clock.now - began


def run(
    clock: Clock, wall_time: WallTime, disk: Disk, *, first: int, step_s: float, validation_s: float
) -> int:
    """Run the loop's order of events until the stop and return the last step."""
    step = first
    while True:
        step += 1
        stop = wall_time.seen
        clock.now += step_s
        if not stop and step % 10 == 0:
            clock.now += validation_s
        if stop or step % 15 == 0:
            wall_time.timed(disk.save)(Progress(step=step))
        if disk.began is not None and (stop or clock.now >= disk.began + disk.save_s):
            wall_time.timed(disk.finish)(Progress(step=step))
        wall_time.after_step(Step(progress=Progress(step=step), result=RESULT, time_s=step_s, is_last=stop))
        if stop:
            return step


# What is saved in the background counts until it is found written: here, at worst, after a step with a validation.
@pytest.mark.parametrize(("save_s", "waited_s", "unused_s"), [(11, 11, 120), (25, 1, 230), (55, 1, 350)])
def test_the_run_stops_saved_before_the_end(save_s: float, waited_s: float, unused_s: float) -> None:
    for end in range(300, 900, 7):
        clock = Clock()
        disk = Disk(clock, save_s, waited_s)
        wall_time = WallTime(
            Signals(),
            Governor(start=0, end=end),
            start=Progress(),
            saves=Due(FEED, every_steps=15),
            validates=Due(FEED, every_steps=10),
            under_way=lambda disk=disk: disk.began is not None,
            clock=clock,
        )
        run(clock, wall_time, disk, first=0, step_s=2, validation_s=30)
        assert disk.began is None
        assert end - unused_s < clock.now <= end


def test_a_signal_stops_without_an_end() -> None:
    signals = Signals()
    wall_time = WallTime(
        signals,
        Governor(start=0, end=None),
        start=Progress(),
        saves=Due(FEED),
        validates=Due(FEED),
        under_way=lambda: False,
        clock=Clock(),
    )
    assert not wall_time.seen
    signals.seen = True
    assert wall_time.seen


def test_it_is_due_by_steps_or_with_the_step_that_ends_an_epoch() -> None:
    steps = [Progress(step=step, consumed_samples=6 * step) for step in range(1, 11)]
    by_steps, by_epochs, never = Due(FEED, every_steps=4), Due(FEED, every_epoch=True), Due(FEED)
    assert [step.step for step in steps if by_steps.at(step)] == [4, 8]
    assert [step.step for step in steps if by_epochs.at(step)] == [3, 5, 8, 10]
    assert not any(never.at(step) or never.may_be_after(step) for step in steps)
    assert [step.step for step in steps if by_steps.may_be_after(step)] == [3, 7]
    assert all(by_epochs.may_be_after(step) for step in steps)
