"""What the validations of a run found so far."""

import math
from dataclasses import dataclass


@dataclass(kw_only=True)
class Validations:
    """The loss of the held-back rows, newest and lowest; every checkpoint keeps both, so that a resumed run counts on."""

    step: int | None = None  # of the newest
    loss: float | None = None
    lowest: float | None = None
    since: int = 0  # validations after the lowest

    def add(self, step: int, loss: float) -> None:
        """Take the loss after a step."""
        self.step, self.loss = step, loss
        if math.isfinite(loss) and (self.lowest is None or loss < self.lowest):
            self.lowest, self.since = loss, 0
        else:
            self.since += 1

    def are_enough(self, patience: int | None) -> bool:
        """Return whether the lowest is `patience` validations ago."""
        return patience is not None and self.since >= patience
