"""Packing: samples into rows of a fixed number of tokens by global best-fit decreasing.

Best-fit decreasing (Johnson, 1973): samples from long to short, each into the fullest bin that still has room.
Bins with the same room are alike, so they are moved in groups: a group of bins with room r takes r // length samples
of one length each before any bin with more room gets one. The work is then a few array operations for each pair of
(length, room) that meets, not one step for each sample.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megaswift.errors import DataError


@dataclass(frozen=True, kw_only=True)
class Packs:
    """Pack i holds the samples items[starts[i]:starts[i + 1]]."""

    items: np.ndarray  # int64 [samples], every sample once
    starts: np.ndarray  # int64 [packs + 1]
    capacity: int
    tokens: int  # sum of the lengths

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, pack: int) -> np.ndarray:
        return self.items[self.starts[pack] : self.starts[pack + 1]]

    @property
    def fill(self) -> float:
        """Share of the packs' room that holds tokens."""
        return self.tokens / (len(self) * self.capacity) if len(self) else 1.0

    def save(self, folder: Path) -> None:
        """Write .npy files into `folder`."""
        folder.mkdir(parents=True)
        np.save(folder / "items.npy", self.items)
        np.save(folder / "starts.npy", self.starts)
        np.save(folder / "sizes.npy", np.array([self.capacity, self.tokens], np.int64))

    @classmethod
    def load(cls, folder: Path) -> "Packs":
        """Map what save() wrote into memory."""
        capacity, tokens = np.load(folder / "sizes.npy").tolist()
        items, starts = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("items", "starts"))
        return cls(items=items, starts=starts, capacity=capacity, tokens=tokens)


def pack(lengths: np.ndarray, capacity: int) -> Packs:
    """Pack samples of `lengths` (integers [samples], each from 1 to capacity) into bins of `capacity` tokens.

    The result is that of best-fit decreasing over the whole set: it depends on the lengths and their order alone.
    Raises DataError for a length that does not fit.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    if lengths.size and (lengths.min() < 1 or lengths.max() > capacity):
        worst = lengths.max() if lengths.max() > capacity else lengths.min()
        raise DataError(
            f"packing_length={capacity} cannot hold a sample of {worst} tokens. Raise it, or lower --max_length."
        )
    by_length = _stable_order(capacity - lengths)  # longest first, ties by index
    counts = np.bincount(lengths)
    distinct = np.flatnonzero(counts)[::-1]
    bin_of, num_bins = _best_fit(distinct.tolist(), counts[distinct].tolist(), capacity)
    bin_of_item = np.empty(lengths.size, np.int64)
    bin_of_item[by_length] = bin_of
    return Packs(
        items=_stable_order(bin_of_item),
        starts=np.concatenate([[0], np.cumsum(np.bincount(bin_of_item, minlength=num_bins))]).astype(
            np.int64
        ),
        capacity=capacity,
        tokens=int(lengths.sum()),
    )


def _best_fit(distinct: list[int], counts: list[int], capacity: int) -> tuple[np.ndarray, int]:
    """Return the bin of every sample, longest first, and the number of bins."""
    bins_with_room: dict[int, list[np.ndarray]] = {}  # room -> groups of bin numbers
    rooms = 0  # bit r is set where a bin has room r: the lowest set bit from `length` on is the best fit
    placed: list[np.ndarray] = []
    num_bins = 0
    for length, left in zip(distinct, counts, strict=True):
        while left:
            above = rooms >> length
            if above:
                room = length + (above & -above).bit_length() - 1
                bins = _take(bins_with_room, room, -(-left // (room // length)))
                if not bins_with_room[room]:
                    rooms ^= 1 << room
            else:
                room = capacity
                needed = -(-left // (room // length))
                bins = np.arange(num_bins, num_bins + needed)
                num_bins += needed
            each = room // length
            full = min(
                len(bins), left // each
            )  # bins that take as many as fit; at most one more takes the rest
            for group, samples in ((bins[:full], each), (bins[full:], left - full * each)):
                if len(group):
                    placed.append(np.repeat(group, samples))
                    left -= len(group) * samples
                    rest = room - samples * length
                    bins_with_room.setdefault(rest, []).append(group)
                    rooms |= 1 << rest
    return (np.concatenate(placed) if placed else np.empty(0, np.int64)), num_bins


def _take(bins_with_room: dict[int, list[np.ndarray]], room: int, wanted: int) -> np.ndarray:
    """Remove and return up to `wanted` bins with `room`, those opened first before the others."""
    groups = bins_with_room[room]
    bins = groups[0] if len(groups) == 1 else np.sort(np.concatenate(groups))
    bins_with_room[room] = [bins[wanted:]] if len(bins) > wanted else []
    return bins[:wanted]


def _stable_order(keys: np.ndarray) -> np.ndarray:
    """Return the stable argsort of non-negative integers below 2**32: numpy sorts 16-bit keys by radix, in linear time."""
    order = np.argsort((keys & 0xFFFF).astype(np.uint16), kind="stable")
    if keys.size and keys.max() > 0xFFFF:
        order = order[np.argsort((keys >> 16).astype(np.uint16)[order], kind="stable")]
    return order
