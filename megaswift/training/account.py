"""Writes down what a slice of a run spends its time on; launch/ledger.py reads it. Rank 0 alone writes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from megaswift.launch.ledger import FILE
from megaswift.training.loop import Progress, Step
from megaswift.training.metrics import Window

T = TypeVar("T")


class Account:
    """Appends to ledger.jsonl: where a slice starts, its steps every `every` steps and before each save, its saves, its end."""

    def __init__(
        self, output_dir: Path, *, every: int, clock: Callable[[], float], start: dict[str, Any]
    ) -> None:
        """`start` has what a slice's first line says beside the time; `clock` gives seconds since the epoch."""
        self._file = (output_dir / FILE).open("a", encoding="utf-8")
        self._every, self._clock = every, clock
        self._window, self._step = Window(), 0
        self._write("start", **start)

    def after_step(self, step: Step) -> bool:
        """Add one step."""
        self._window, self._step = self._window.plus(step), step.progress.step
        if self._step % self._every == 0 or step.is_last:
            self._settle()
        return False

    def timed(self, save: Callable[[Progress], T]) -> Callable[[Progress], T]:
        """Return `save`, measured: how long training stands still for it."""

        def measured(progress: Progress) -> T:
            self._settle()
            began = self._clock()
            result = save(progress)
            self._write("save", step=progress.step, seconds=self._clock() - began)
            return result

        return measured

    def close(self, progress: Progress, *, total_steps: int) -> None:
        """Write the slice's end."""
        self._settle()
        self._write("end", step=progress.step, finished=progress.step >= total_steps)
        self._file.close()

    def _settle(self) -> None:
        window = self._window
        if window.steps:
            sums = {
                "steps": window.steps,
                "tokens": window.tokens,
                "flop": window.flop,
                "seconds": window.time_s,
            }
            self._write("steps", step=self._step, **sums)
        self._window = Window()

    def _write(self, event: str, **fields: Any) -> None:
        self._file.write(json.dumps({"event": event, "time": self._clock(), **fields}) + "\n")
        self._file.flush()
