"""Channels: the named parts of a set (column `channel`), so that the loss of each can be told apart."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megaswift.data.sample import RowError, Sample
from megaswift.errors import DataError

COLUMN = "channel"
NONE = "None"  # of rows that name none: ms-swift's name for it
TAKEN = "tokens"  # loss_tokens is another figure of a log line


def channel_of(sample: Sample) -> str:
    """Return the channel that a row names. Raises RowError, and DataError for a name that a log line has no room for."""
    found = next((value for name, value in sample.extras.items() if name.lower() == COLUMN), None)
    if found is None or found == "":
        return NONE
    if not isinstance(found, str | int | float):
        raise RowError("channel", f"channel is {type(found).__name__}, not a text")
    if found == TAKEN:
        raise DataError(
            f"{sample.source}: channel={TAKEN} would be logged as loss_{TAKEN}, which is the number of tokens that carry loss. Give it "
            "another name."
        )
    return str(found)


@dataclass(frozen=True, kw_only=True)
class Channels:
    """Which channel every entry of a set belongs to."""

    numbers: np.ndarray  # int32 [entries]: places in `names`
    names: tuple[str, ...]  # in alphabetical order

    @classmethod
    def of(cls, entries: Sequence[str]) -> "Channels":
        """Return the channels of entries that name them."""
        names, numbers = np.unique(np.array(entries, dtype=np.str_), return_inverse=True)
        return cls(numbers=numbers.astype(np.int32), names=tuple(names.tolist()))

    def take(self, entries: np.ndarray) -> "Channels":
        """Return the channels of some entries; the names stay."""
        return Channels(numbers=self.numbers[entries], names=self.names)

    def among(self, names: tuple[str, ...]) -> "Channels":
        """Return the same with more names."""
        places = np.array([names.index(name) for name in self.names], np.int32)
        return Channels(numbers=places[self.numbers], names=names)

    def save(self, folder: Path) -> None:
        """Write numbers and names into a new `folder`."""
        folder.mkdir()
        np.save(folder / "numbers.npy", self.numbers)
        (folder / "names.json").write_text(json.dumps(self.names), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> "Channels":
        """Map what save() wrote into memory."""
        names = json.loads((folder / "names.json").read_text(encoding="utf-8"))
        return cls(numbers=np.load(folder / "numbers.npy", mmap_mode="r"), names=tuple(names))


def all_names(parts: Sequence[Channels]) -> tuple[str, ...]:
    """Return the names of several sets, in alphabetical order."""
    return tuple(sorted({name for part in parts for name in part.names}))


def join_channels(parts: Sequence[Channels]) -> Channels:
    """Return the channels of several sets, one set after the other."""
    names = all_names(parts)
    numbers = [part.among(names).numbers for part in parts]
    return Channels(numbers=np.concatenate([np.empty(0, np.int32), *numbers]), names=names)
