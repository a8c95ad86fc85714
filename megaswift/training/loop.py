"""The training loop."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from time import perf_counter
from typing import Protocol

from megaswift.errors import TrainingError
from megaswift.parallel.agreement import alike
from megaswift.training.engine import Engine, StepResult
from megaswift.training.feed import TrainFeed


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a run is; with the settings it is all that a resumed run needs to know."""

    step: int = 0  # optimizer steps done
    updates: int = 0  # of which changed the weights
    consumed_samples: int = 0  # items (samples or packs) taken from the training data

    def after(self, result: StepResult, *, items: int) -> "Progress":
        """Return the progress once `result` is in."""
        return Progress(
            step=self.step + 1,
            updates=self.updates + int(result.updated),
            consumed_samples=self.consumed_samples + items,
        )


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step that was made."""

    progress: Progress  # after it
    result: StepResult
    time_s: float
    is_last: bool  # of the run, as some rank was told to stop, or as a callback before this one ends it


class Callback(Protocol):
    """Something that happens between steps; every rank calls it."""

    def after_step(self, step: Step) -> bool:
        """Look at a step; returning True ends the run."""
        ...


class StopAsked(Protocol):
    """Whether this rank was told to stop, by a signal or by the clock."""

    @property
    def seen(self) -> bool:
        """True once it was, asked before each step; `train_loop` carries it to all ranks."""
        ...

    @property
    def signalled(self) -> bool:
        """True once a signal came, which may be amid a step."""
        ...


class Pulse(Protocol):
    """Hears where this rank is (launch/heartbeat.py)."""

    def move(self, step: int, phase: str, *, patient: bool = False) -> None:
        """This rank begins `phase` of `step`; a `patient` one may take long."""
        ...


def train_loop(
    engine: Engine,
    feed: TrainFeed,
    *,
    start: Progress,
    total_steps: int,
    callbacks: Sequence[Callback],
    interrupt: StopAsked,
    pulse: Pulse,
) -> Progress:
    """Train from `start` to `total_steps` and return how far it came; every rank of the world calls it.

    Raises TrainingError where the loss or the gradient norm is not a number any more; nothing is saved then.
    """
    progress, stop = start, start.step >= total_steps
    while not stop:
        began = perf_counter()
        pulse.move(progress.step + 1, feed.phase, patient=feed.patient)
        batches = alike(partial(feed.batch, progress.consumed_samples))
        pulse.move(progress.step + 1, "training")
        seen = interrupt.seen
        result = engine.train_step(batches, interrupted=lambda: seen or interrupt.signalled)  # noqa: B023  # asked at once
        progress = progress.after(result, items=feed.items_per_step)
        alike(partial(check_finite, progress.step, result))
        stop = result.interrupted or progress.step == total_steps
        step = Step(progress=progress, result=result, time_s=perf_counter() - began, is_last=stop)
        for callback in callbacks:
            pulse.move(progress.step, type(callback).__name__.lower(), patient=True)
            if callback.after_step(step):
                stop, step = True, replace(step, is_last=True)
    return progress


def check_finite(step: int, result: StepResult) -> None:
    """Raise TrainingError where a step left something that is not a number; float16's skipped overflows did not."""
    if result.updated and not (math.isfinite(result.loss) and math.isfinite(result.grad_norm or 0.0)):
        raise TrainingError(
            f"loss={result.loss} and grad_norm={result.grad_norm} at step {step}: training has diverged. Resume from the last "
            "checkpoint with a lower --learning_rate, a longer warm-up, or without the rows of this step."
        )
