"""The wall-time governor: when must a slice of a job save and stop, so that the next one can go on?

Pure arithmetic on measured times; the clock is an argument.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil

RECENT = 50  # measurements that count
MARGIN = 1.5  # of a 95th percentile: a shared disk is not always as fast as it was
LEAVING_S = 10.0  # to close files and groups, and for the batch script to have the job requeued
FIRST_SHARE = 0.15  # of a slice, assumed for a save or a validation until one has been measured,
FIRST_LIMIT_S = 300.0  # but no more than this


@dataclass(frozen=True, kw_only=True)
class Governor:
    """What is known about a slice: its end, and how long things have taken. Times are seconds since the epoch."""

    start: float
    end: float | None  # None: nobody ends this run
    steps: tuple[float, ...] = ()
    saves: tuple[float, ...] = ()
    validations: tuple[float, ...] = ()

    def after_step(self, seconds: float) -> "Governor":
        """Return the governor that knows one more step, logging included."""
        return replace(self, steps=(*self.steps, seconds)[-RECENT:])

    def after_save(self, seconds: float) -> "Governor":
        """Return the governor that knows one more save."""
        return replace(self, saves=(*self.saves, seconds)[-RECENT:])

    def after_validation(self, seconds: float) -> "Governor":
        """Return the governor that knows one more step that ended with a validation."""
        return replace(self, validations=(*self.validations, seconds)[-RECENT:])

    def save_s(self) -> float:
        """Return the seconds to set aside for the last save."""
        return self._expected(self.saves)

    def must_stop(
        self,
        now: float,
        *,
        save_due: bool = False,
        save_under_way: bool = False,
        validation_due: bool = False,
    ) -> bool:
        """Return, before a step, whether the run must save and end after it.

        It may go on if all of this fits: this step, the validation and the save that are due after it, one more step and
        the last save. One that is still being written in the background has to end before another can begin.
        """
        if self.end is None:
            return False
        needed_s = 2 * self._expected(self.steps) if self.steps else 0.0
        needed_s += self.save_s() * (1 + save_due + save_under_way)
        needed_s += self._expected(self.validations) if validation_due else 0.0
        return now + needed_s + LEAVING_S >= self.end

    def _expected(self, measured: Sequence[float]) -> float:
        """Return the seconds to set aside for one more of what took so long before; a guess where it is new."""
        if measured:
            return MARGIN * percentile_95(measured)
        assert self.end is not None, "only a slice with an end sets time aside"
        return min(FIRST_LIMIT_S, FIRST_SHARE * (self.end - self.start))


def percentile_95(values: Sequence[float]) -> float:
    """Return the smallest value that 95 % of `values` do not exceed."""
    return sorted(values)[ceil(0.95 * len(values)) - 1]
