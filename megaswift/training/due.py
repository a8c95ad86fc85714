"""When something happens between steps: every so many, or at the end of each epoch."""

from megaswift.training.feed import TrainFeed
from megaswift.training.loop import Progress


class Due:
    """Says when something is due; every rank says the same."""

    def __init__(self, feed: TrainFeed, *, every_steps: int | None = None, every_epoch: bool = False) -> None:
        """Neither given, it never is."""
        self._feed, self._every_steps, self._every_epoch = feed, every_steps, every_epoch

    def at(self, progress: Progress) -> bool:
        """Return whether it is due after the step with which so much is done."""
        if self._every_steps is not None and progress.step % self._every_steps == 0:
            return True
        consumed = progress.consumed_samples
        before = consumed - self._feed.items_per_step
        return self._every_epoch and self._feed.epochs_done(consumed) > self._feed.epochs_done(before)

    def may_be_after(self, progress: Progress) -> bool:
        """Return whether it may be due one step later: an epoch may end with any, as a stream does not know its end."""
        return self._every_epoch or (
            self._every_steps is not None and (progress.step + 1) % self._every_steps == 0
        )
