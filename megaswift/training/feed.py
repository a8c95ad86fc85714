"""What one rank is fed: its micro batches of a global batch, built ahead of time where asked."""

from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from megaswift.data.batches import MicroBatch, TrainData, ValidationData
from megaswift.data.noise import with_noise
from megaswift.data.stream_batches import StreamData


class TrainFeed:
    """This data-parallel rank's share of the endless training stream."""

    phase, patient = "reading its batch", False  # what a rank does in batch(), and whether it may take long

    def __init__(
        self,
        data: TrainData | StreamData,
        *,
        dp_rank: int,
        dp: int,
        ahead: bool = False,
        noise_alpha: float | None = None,
    ) -> None:
        """`ahead` builds the next global batch in a thread while the current one computes; `noise_alpha` is NEFTune's."""
        self.data = data
        self.items_per_step = data.settings.global_batch_size
        self._dp_rank, self._dp = dp_rank, dp
        self._noise_alpha = noise_alpha
        self._pool = ThreadPoolExecutor(max_workers=1) if ahead else None
        self._next: tuple[int, Future[list[MicroBatch]]] | None = None
        self._given = 0  # items up to the end of the newest batch

    def batch(self, consumed: int) -> list[MicroBatch]:
        """Return the micro batches of the global batch that follows `consumed` items. Raises DataError."""
        batches = (
            self._next[1].result() if self._next and self._next[0] == consumed else self._build(consumed)
        )
        if self._pool is not None:
            following = consumed + self.items_per_step
            self._next = (following, self._pool.submit(self._build, following))
        self._given = consumed + self.items_per_step
        return batches

    def epoch(self, consumed: int) -> float:
        """Return how often the data was seen."""
        return self.data.epoch(consumed)

    def epochs_done(self, consumed: int) -> int:
        """Return how many epochs ended with the items before; the same on every rank."""
        return self.data.epochs_done(consumed)

    def sample_ids(self, consumed: int) -> list[int]:
        """Return the rows of the whole global batch that follows `consumed` items, over all ranks."""
        return self.data.sample_ids(consumed)

    def figures(self) -> dict[str, float]:
        """Return what is logged about the newest batch beside what training finds."""
        return {}

    def writers(self) -> dict[str, Callable[[Path], None]]:
        """Return what a checkpoint must hold of the feed, by the names of its folders; every rank writes."""
        return self.data.writers(lambda: self._given)

    def close(self) -> None:
        """No more batches are needed: end what builds them ahead."""
        if self._pool is not None:
            self._pool.shutdown()
        self.data.close()

    def _build(self, consumed: int) -> list[MicroBatch]:
        batches = self.data.micro_batches(consumed, dp_rank=self._dp_rank, dp=self._dp)
        if not self._noise_alpha:
            return list(batches)
        key = (self.data.settings.seed, consumed)
        return [with_noise(batch, alpha=self._noise_alpha, key=key) for batch in batches]


class ValidationFeed:
    """This data-parallel rank's share of a validation set."""

    def __init__(self, data: ValidationData, *, dp_rank: int, dp: int, limit: int = -1) -> None:
        """`limit` is the number of global batches in a validation; -1: the whole set."""
        self._data = data
        self._dp_rank, self._dp = dp_rank, dp
        self.num_steps = data.num_steps() if limit < 0 else min(limit, data.num_steps())

    def batches(self) -> Iterable[list[MicroBatch]]:
        """Yield the micro batches of one global batch after the other."""
        for step in range(self.num_steps):
            yield list(self._data.micro_batches(step, dp_rank=self._dp_rank, dp=self._dp))
