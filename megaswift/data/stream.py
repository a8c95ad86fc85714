"""Rows that are read while training: one endless order, cut into windows that depend on files, settings and place alone.

Epoch follows epoch, and in each the sets follow each other or are drawn by shares. A window is the next
--shuffle_buffer_size rows, or what is left of an epoch. It is tokenised and packed by itself; its packs (without packing its
rows) in shuffled order are the next items of the stream. So a window can be made anywhere and at any time, and reading goes
on from the beginning of any window: in jsonl at a byte, in parquet at a row group.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from megaswift.config.data import DataConfig
from megaswift.config.run import RunConfig
from megaswift.data.cursor import Cursor, RawRow, read_from
from megaswift.data.encode import EncodedSet, encode_or_report
from megaswift.data.forms import form_of
from megaswift.data.mixture import choices, shares_of
from megaswift.data.packing import pack
from megaswift.data.read import take_rows
from megaswift.data.report import BadRow, Report
from megaswift.data.sample import Sample
from megaswift.data.sources import FileSet
from megaswift.data.template import Template
from megaswift.data.tokenizer import load_tokenizer
from megaswift.errors import DataError

OwnedRow = tuple[int, RawRow]  # (number of its set, the row)


@dataclass(frozen=True, kw_only=True)
class Position:
    """Where reading stands before a window."""

    window: int = 0  # its number
    row: int = 0  # rows read before
    epoch: int = 0
    drawn: int = 0  # rows of them in this epoch
    cursors: tuple[Cursor, ...]  # of each set
    ended: tuple[bool, ...]  # sets that were asked for more rows than they have, in this epoch

    def to_json(self) -> dict[str, Any]:
        """Return what from_json() reads."""
        return asdict(self)

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> "Position":
        """Return the position that to_json() gave."""
        cursors = tuple(Cursor(**cursor) for cursor in stored["cursors"])
        return cls(**{**stored, "cursors": cursors, "ended": tuple(stored["ended"])})


class RowStream:
    """Reads the rows of the sets in the order of the stream."""

    def __init__(
        self, sets: Sequence[FileSet], config: DataConfig, *, seed: int, position: Position | None = None
    ) -> None:
        """Begin at `position`, or at the first row."""
        self._sets, self._seed = sets, seed
        self._shares, self._strategy = shares_of(config), config.stopping_strategy
        self._size = config.shuffle_buffer_size
        count = len(sets)
        self.position = position or Position(cursors=(Cursor(),) * count, ended=(False,) * count)
        self._cursors, self._ended = list(self.position.cursors), list(self.position.ended)
        self._rows = [self._open(number) for number in range(count)]

    def window(self) -> tuple[Position, list[OwnedRow]]:
        """Return where the next window begins and its rows, at least one, and move behind it. Raises DataError."""
        before = self.position
        rows: list[OwnedRow] = []
        chosen = self._chosen(before)
        while len(rows) < self._size:
            number = chosen[len(rows)] if self._shares else self._ended.index(False)
            row = self._next(number)
            if row is None:
                self._ended[number] = True
                if self._epoch_is_over():
                    break
                if self._shares:  # the others go on, and this one begins again
                    self._rewind(number)
                    row = self._next(number)
                    if row is None:
                        raise DataError(f"dataset={self._sets[number].source.name} has no row. Leave it out.")
            if row is not None:
                rows.append((number, row))
        over = self._epoch_is_over()
        if over:
            if not before.drawn + len(rows):
                raise DataError("The data sets have no rows.")
            self._ended = [False] * len(self._sets)
            for number in range(len(self._sets)):
                self._rewind(number)
        self.position = Position(
            window=before.window + bool(rows),
            row=before.row + len(rows),
            epoch=before.epoch + over,
            drawn=0 if over else before.drawn + len(rows),
            cursors=tuple(self._cursors),
            ended=tuple(self._ended),
        )
        return (before, rows) if rows else self.window()

    def _chosen(self, position: Position) -> list[int]:
        if not self._shares:
            return []
        drawn = choices(position.drawn, self._size, self._shares, seed=self._seed, epoch=position.epoch)
        return drawn.tolist()

    def _epoch_is_over(self) -> bool:
        first = self._shares and self._strategy == "first_exhausted"
        return any(self._ended) if first else all(self._ended)

    def _open(self, number: int) -> Iterator[tuple[RawRow, Cursor]]:
        return read_from(self._sets[number].files, self._cursors[number])

    def _rewind(self, number: int) -> None:
        self._cursors[number] = Cursor()
        self._rows[number] = self._open(number)

    def _next(self, number: int) -> RawRow | None:
        found = next(self._rows[number], None)
        if found is None:
            return None
        row, self._cursors[number] = found
        return row


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What makes tokens of raw rows; it travels to other processes."""

    config: DataConfig
    sets: tuple[FileSet, ...]
    tokenizer: str  # folder
    trust_remote_code: bool = False
    max_length: int | None
    stop_ids: tuple[int, ...] = ()
    run: RunConfig = field(default_factory=RunConfig)  # whose task says what the rows hold
    packing_length: int | None = None  # None: not packed

    def kitchen(self) -> "Kitchen":
        """Load the tokenizer. Raises DataError."""
        tokenizer = load_tokenizer(self.tokenizer, trust_remote_code=self.trust_remote_code)
        return Kitchen(self, tokenizer)


class Kitchen:
    """Makes windows by one recipe."""

    def __init__(self, recipe: Recipe, tokenizer: Any) -> None:
        self._recipe = recipe
        self._template = Template.from_config(
            recipe.config, tokenizer, max_length=recipe.max_length, stop_ids=recipe.stop_ids
        )
        self._form = form_of(recipe.run)

    def make(self, rows: Sequence[OwnedRow]) -> tuple[EncodedSet, Report]:
        """Return the tokens of the usable rows, perhaps none, packed where asked; `samples` of the set number the rows.

        With --strict raises DataError for the first bad row.
        """
        recipe, config = self._recipe, self._recipe.config
        samples: list[Sample] = []
        places: list[int] = []
        unread: list[BadRow] = []
        for place, (number, row) in enumerate(rows):
            files = recipe.sets[number]
            usable, bad = take_rows([row.parse()], config, source=files.source, folder=files.folder)
            samples += usable
            places += [place] * len(usable)
            unread += bad
        encoded, report = encode_or_report(samples, self._template, form=self._form, strict=config.strict)
        bad_rows = (*unread, *report.bad)
        packs = None
        if recipe.packing_length is not None:
            packs = pack(encoded.row_lengths, recipe.packing_length)
        encoded = replace(encoded, samples=np.array(places, np.int64)[encoded.samples], packs=packs)
        return encoded, Report(read=len(rows), kept=len(rows) - len(bad_rows), bad=bad_rows)
