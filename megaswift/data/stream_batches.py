"""Global batches of a stream, the same for every layout and after every resume, as data/batches.py makes them of a whole set.

The items are those of the windows one after the other, each in its own shuffled order. Micro batches, and which rank takes
which, are as for a whole set. A window may end within a micro batch, which then holds rows of both.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from megaswift.data.batches import (
    BatchSettings,
    MicroBatch,
    build_rows,
    even_share,
    item_work,
    micro_batches_per_rank,
)
from megaswift.data.channels import Channels, all_names
from megaswift.data.encode import EncodedSet, join_sets
from megaswift.data.order import shuffled
from megaswift.data.windows import Shelf, Window
from megaswift.errors import DataError

KEPT, FILE = "stream", "stream.json"  # folder of a checkpoint, and the file in it


@dataclass(frozen=True, kw_only=True)
class _Opened:
    """A window in use."""

    window: Window
    first: int  # item of the stream that is its first
    order: np.ndarray  # int64 [items]
    work: np.ndarray  # float64 [items]

    @property
    def end(self) -> int:
        return self.first + len(self.order)

    @property
    def channels(self) -> Channels | None:
        assert self.window.encoded is not None, "it has items"
        return self.window.encoded.channels

    def rows(self, item: int) -> np.ndarray:
        """Return the rows of item `item` of the stream."""
        assert self.window.encoded is not None, "it has items"
        number, packs = int(self.order[item - self.first]), self.window.encoded.packs
        return np.array([number]) if packs is None else np.asarray(packs[number])


class StreamData:
    """The endless stream of items; what data/batches.py's TrainData is to a whole set."""

    def __init__(
        self,
        shelf: Shelf,
        settings: BatchSettings,
        *,
        pad_id: int,
        nature: dict[str, Any],
        first_window: int = 0,
        first_item: int = 0,
        writes: bool = True,
    ) -> None:
        """Begin with a window whose first item is item `first_item` of the stream.

        `nature` is what the stream depends on, as JSON, for the checkpoint, which one rank `writes`.
        """
        self.settings = settings
        self._shelf, self._pad_id, self._nature, self._writes = shelf, pad_id, nature, writes
        self._next, self._end = first_window, first_item  # the window to open next, and its first item
        self._opened: list[_Opened] = []
        self._beginnings: dict[int, dict[str, Any]] = {}  # first item -> position of its window, JSON

    def first_set(self) -> EncodedSet:
        """Return the tokens of the first window that has any, for whoever must know what documents are like."""
        if not self._opened:
            self._open()
        encoded = self._opened[0].window.encoded
        assert encoded is not None, "opened windows have items"
        return encoded

    def micro_batches(self, consumed: int, *, dp_rank: int, dp: int) -> Iterator[MicroBatch]:
        """Yield what one data-parallel rank takes of the global batch after `consumed` items. Raises DataError."""
        micro_batches_per_rank(self.settings, dp)  # raises where the ranks do not divide
        places = self._places(consumed)
        size = self.settings.micro_batch_size
        work = np.array([opened.work[opened.order[item - opened.first]] for opened, item in places])
        windows = {opened.first: opened for opened, _ in places}.values()
        channels = [found for opened in windows if (found := opened.channels) is not None]
        names = all_names(channels)  # of the whole global batch, whatever this rank takes of it
        for number in even_share(work.reshape(-1, size).sum(1), dp_rank=dp_rank, dp=dp):
            yield self._build(places[number * size : (number + 1) * size], names)
        self._forget(consumed - 2 * self.settings.global_batch_size)

    def epoch(self, consumed: int) -> float:
        """Return how many epochs were begun and left behind; how long one is, nobody knows."""
        return float(self._beginnings[self._begin_of(consumed)]["epoch"])

    def epochs_done(self, consumed: int) -> int:
        """Return how many epochs the last of the items before has left behind: what follows it may not be read yet."""
        return int(self.epoch(consumed - 1)) if consumed else 0

    def sample_ids(self, consumed: int) -> list[int]:
        """Return the rows of the global batch that follows `consumed` items, counted from the first row that was read."""
        found: list[int] = []
        for opened, item in self._places(consumed):
            encoded = opened.window.encoded
            assert encoded is not None, "it has items"
            rows = encoded.samples[opened.rows(item) * encoded.per_row]
            found += (rows + opened.window.position.row).tolist()
        return found

    def writers(self, consumed: Callable[[], int]) -> dict[str, Callable[[Path], None]]:
        """Return what writes where reading goes on after the items that are `consumed` when it is called."""

        def write(folder: Path) -> None:
            if self._writes:
                first = self._begin_of(consumed())
                stored = {"first_item": first, "position": self._beginnings[first], "nature": self._nature}
                (folder / FILE).write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")

        return {KEPT: write}

    def close(self) -> None:
        """End what makes windows."""
        self._shelf.close()

    def _places(self, consumed: int) -> list[tuple[_Opened, int]]:
        """Return the items of a global batch, and the window of each."""
        found: list[tuple[_Opened, int]] = []
        index = 0
        for item in range(consumed, consumed + self.settings.global_batch_size):
            while index == len(self._opened) or self._opened[index].end <= item:
                if index == len(self._opened):
                    self._open()
                else:
                    index += 1
            assert self._opened[index].first <= item, (self._opened[index].first, item)
            found.append((self._opened[index], item))
        return found

    def _open(self) -> None:
        """Take the next window that has items; passing those without."""
        while True:
            window = self._shelf.get(self._next)
            self._next += 1
            self._beginnings[self._end] = window.position.to_json()
            if window.encoded is None:
                continue
            packs = window.encoded.packs
            count = len(packs) if packs is not None else window.encoded.num_rows
            order = np.arange(count)
            if self.settings.shuffle:
                order = shuffled(count, seed=self.settings.seed, stream=window.number)
            work = item_work(window.encoded, packs, token_cost=self.settings.token_cost)
            self._opened.append(_Opened(window=window, first=self._end, order=order, work=work))
            self._end += count
            return

    def _build(self, places: Sequence[tuple[_Opened, int]], names: tuple[str, ...]) -> MicroBatch:
        parts = []
        for opened in dict.fromkeys(id(opened) for opened, _ in places):
            own = [(one, item) for one, item in places if id(one) == opened]
            encoded = own[0][0].window.encoded
            assert encoded is not None, "it has items"
            parts.append(encoded.take(np.concatenate([one.rows(item) for one, item in own])))
        joined = join_sets(parts)
        if joined.channels is not None:
            joined = replace(joined, channels=joined.channels.among(names))
        return build_rows(joined, self.settings, pad_id=self._pad_id)

    def _begin_of(self, item: int) -> int:
        """Return the first item of the newest window that begins at or before `item`."""
        return max(first for first in list(self._beginnings) if first <= item)

    def _forget(self, item: int) -> None:
        """Let go of windows that end at or before `item`, which lies two steps back: no rank is so far behind."""
        kept = [opened for opened in self._opened if opened.end > item]
        if len(kept) == len(self._opened) or not kept:
            return
        self._opened = kept
        self._shelf.forget(kept[0].window.number)
        for first in [first for first in self._beginnings if first < kept[0].first]:
            del self._beginnings[first]


def where_to_go_on(folder: Path, nature: dict[str, Any]) -> tuple[dict[str, Any], int]:
    """Return the position and the first item that a checkpoint `folder` holds of a stream of this `nature`.

    Raises DataError where it holds none, or where the stream was another: its items would be others.
    """
    file = folder / KEPT / FILE
    if not file.is_file():
        raise DataError(
            f"{folder} was not saved by a run with streaming=true. Leave --streaming out, or give a new --output_dir."
        )
    stored = json.loads(file.read_text(encoding="utf-8"))
    for name, value in nature.items():
        if stored["nature"].get(name) != json.loads(json.dumps(value)):
            raise DataError(
                f"{name}={value!r} gives another stream than {folder} was saved with ({stored['nature'].get(name)!r}). Give the same, "
                "or a new --output_dir."
            )
    return stored["position"], stored["first_item"]
