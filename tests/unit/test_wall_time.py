"""The end of a job's time in the training loop, on a simulated clock."""

from dataclasses import dataclass
from typing import Any

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


def run(
    clock: Clock, wall_time: WallTime, *, first: int, step_s: float, save_s: float, validation_s: float
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
            wall_time.timed(lambda progress: setattr(clock, "now", clock.now + save_s))(Progress(step=step))
        wall_time.after_step(Step(progress=Progress(step=step), result=RESULT, time_s=step_s, is_last=stop))
        if stop:
            return step


def test_the_run_stops_saved_before_the_end() -> None:
    for end in range(300, 900, 7):
        clock = Clock()
        wall_time = WallTime(
            Signals(),
            Governor(start=0, end=end),
            start=Progress(),
            saves=Due(FEED, every_steps=15),
            validates=Due(FEED, every_steps=10),
            clock=clock,
        )
        run(clock, wall_time, first=0, step_s=2, save_s=11, validation_s=30)
        assert end - 120 < clock.now <= end


def test_a_signal_stops_without_an_end() -> None:
    signals = Signals()
    wall_time = WallTime(
        signals,
        Governor(start=0, end=None),
        start=Progress(),
        saves=Due(FEED),
        validates=Due(FEED),
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
