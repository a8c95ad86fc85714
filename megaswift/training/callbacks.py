"""What happens between steps: log, validate, save. Every rank runs every callback."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from megaswift.logs import get_logger
from megaswift.training.due import Due
from megaswift.training.engine import Engine
from megaswift.training.feed import TrainFeed, ValidationFeed
from megaswift.training.loop import Progress, Step
from megaswift.training.metrics import Window, peak_memory_gib, step_line
from megaswift.training.reporters import Reporter
from megaswift.training.saver import Saver
from megaswift.training.validations import Validations

logger = get_logger(__name__)

Predict = Callable[[int], dict[str, float]]  # step after which held-back rows are answered -> figures
Tell = Callable[[dict[str, Any]], bool]  # a line -> whether the run is to end
# Saves after a step; returns the seconds that a save has taken from its beginning on, where one is complete now.
Saving = Callable[[Progress], float | None]


class Log:
    """Reports every `every` steps, and the last one, also where a callback after it ends the run with that step."""

    def __init__(
        self,
        feed: TrainFeed,
        reporters: Sequence[Reporter],
        *,
        every: int,
        device: torch.device,
        with_samples: bool,
    ) -> None:
        """`reporters` are rank 0's; other ranks have none. `with_samples` names the entries of each global batch."""
        self._feed, self._reporters, self._every = feed, reporters, every
        self._device, self._with_samples = device, with_samples
        self._window = Window()
        self._left_out: Step | None = None  # the newest step, where no line was due

    def after_step(self, step: Step) -> bool:
        """Write a line where one is due."""
        self._window = self._window.plus(step)
        self._left_out = step
        if step.progress.step % self._every == 0 or step.is_last:
            self.finish()
        return False

    def finish(self) -> None:
        """Write the line of the newest step if there is none; every rank calls it once more when the loop is over."""
        step, self._left_out = self._left_out, None
        if step is None:
            return
        consumed = step.progress.consumed_samples
        line = step_line(
            step, self._window, epoch=self._feed.epoch(consumed), memory_gib=peak_memory_gib(self._device)
        )
        line |= self._feed.figures()
        if self._with_samples:
            line["sample_ids"] = self._feed.sample_ids(consumed - self._feed.items_per_step)
        for reporter in self._reporters:
            reporter.report(line)
        self._window = Window()


class Evaluate:
    """Reports figures of the validation set when it is due, and at the end; ends a run that learns no more."""

    def __init__(
        self,
        engine: Engine,
        feed: TrainFeed,
        validation: ValidationFeed | None,
        reporters: Sequence[Reporter],
        *,
        due: Due,
        found: Validations,
        patience: int | None,
        predict: Predict | None = None,
        tell: Tell | None = None,
    ) -> None:
        """`found` takes all figures; `patience` is how many without a better one end the run; `predict` finds further ones; `tell` gets
        the line on every rank, and may end the run too."""
        self._engine, self._feed, self._validation = engine, feed, validation
        self._reporters, self._due = reporters, due
        self._found, self._patience, self._predict, self._tell = found, patience, predict, tell

    def after_step(self, step: Step) -> bool:
        """Validate where it is due, not on the way out of an interrupted run; True where the run is to end."""
        if step.result.interrupted or not (step.is_last or self._due.at(step.progress)):
            return False
        figures = self._figures(step.progress)
        self._found.add(step.progress.step, figures)
        told_to_end = self._report(step.progress, figures)
        enough = self._found.are_enough(self._patience)
        if enough:
            logger.info(
                "the run ends at step %d: for %d validations eval_%s has not been better than before (early_stop_interval)",
                step.progress.step,
                self._found.since,
                self._found.criterion.metric,
            )
        return enough or told_to_end

    def _figures(self, progress: Progress) -> dict[str, float]:
        """Validate now."""
        figures: dict[str, float] = {}
        if self._validation is not None:
            found = self._engine.evaluate(self._validation.batches())
            figures = {"loss": found.loss, **found.metrics}
        if self._predict is not None:
            figures |= self._predict(progress.step)
        return figures

    def _report(self, progress: Progress, figures: dict[str, float]) -> bool:
        """Pass a line on; True where the run is to end."""
        line = {
            "step": progress.step,
            "epoch": self._feed.epoch(progress.consumed_samples),
            "consumed_samples": progress.consumed_samples,
            **{f"eval_{name}": value for name, value in figures.items()},
        }
        for reporter in self._reporters:
            reporter.report(line)
        return self._tell is not None and self._tell(line)


class Save:
    """Saves when it is due, at the end, and when the run is told to stop; completes what was saved in the background."""

    def __init__(
        self, saver: Saver, *, timed: Callable[[Saving], Saving], due: Due, stop_after_first: bool
    ) -> None:
        """`timed` returns a way of saving that is measured."""
        self._saver, self._due, self._stop = saver, due, stop_after_first
        self._save, self._finish = timed(saver), timed(lambda _: saver.finish())

    def after_step(self, step: Step) -> bool:
        """Save where it is due; True where the run was to end with its first checkpoint."""
        due = step.is_last or self._due.at(step.progress)
        stop = due and self._stop
        if due:
            self._save(step.progress)
        if self._saver.is_under_way and (step.is_last or stop or self._saver.is_written()):
            self._finish(step.progress)
        return stop
