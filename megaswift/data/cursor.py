"""Reading a set from any row on: where a reader stands, and the pieces that several readers share.

A cursor is a byte offset in files of lines (jsonl, txt), and a number of rows in all others: those of parquet lie in row
groups and those of saved `datasets` have places, so both are found at once; json and csv are read up to the row.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from megaswift.data.report import BadRow
from megaswift.data.rows import (
    LINE_PARSERS,
    Row,
    is_saved_dataset,
    lines_of,
    open_saved,
    read_file,
    row_groups,
    suffix_of,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Cursor:
    """How far the files of a set were read."""

    file: int = 0  # its number in the set
    offset: int = 0  # bytes of a file of lines, else rows, that were read of it
    number: int = 0  # lines of it, or rows, that were read


@dataclass(frozen=True, kw_only=True, slots=True)
class RawRow:
    """A row as it lies in its file; a line is not parsed yet."""

    source: str  # "file:line"
    value: bytes | dict[str, Any] | BadRow
    suffix: str

    def parse(self) -> Row:
        """Return the row itself."""
        if isinstance(self.value, bytes):
            return LINE_PARSERS[self.suffix](self.value, self.source)
        return self.source, self.value


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """Rows of one file that follow each other."""

    start: Cursor
    rows: int | None  # None: to the end of the file


def read_from(files: Sequence[Path], start: Cursor) -> Iterator[tuple[RawRow, Cursor]]:
    """Yield every row after `start` with the cursor behind it, to the end of the set."""
    for file in range(start.file, len(files)):
        yield from _read_file(files[file], start if file == start.file else Cursor(file=file))


def _read_file(path: Path, start: Cursor) -> Iterator[tuple[RawRow, Cursor]]:
    suffix, file = suffix_of(path), start.file
    if has_lines(path):
        for line in lines_of(path, offset=start.offset, number=start.number):
            row = RawRow(source=line.source, value=line.text, suffix=suffix)
            yield row, Cursor(file=file, offset=line.end, number=line.number)
        return
    for number, (source, value) in enumerate(read_file(path, start.offset), start=start.offset + 1):
        row = RawRow(source=source, value=value, suffix=suffix)
        yield row, Cursor(file=file, offset=number, number=number)


def has_lines(path: Path) -> bool:
    """Return whether a file is read line by line."""
    return suffix_of(path) in LINE_PARSERS and path.is_file()


def read_piece(files: Sequence[Path], piece: Piece) -> Iterator[Row]:
    """Yield the rows of one piece."""
    rows = _read_file(files[piece.start.file], piece.start)
    return (row.parse() for row, _ in islice(rows, piece.rows))


def cut(files: Sequence[Path], *, rows: int) -> list[Piece]:
    """Cut a set into pieces of about `rows` rows; a json or csv file is one piece, as it is read from its beginning."""
    return [piece for file, path in enumerate(files) for piece in _cut_file(path, file, rows)]


def _cut_file(path: Path, file: int, rows: int) -> Iterator[Piece]:
    if has_lines(path):
        start, seen = Cursor(file=file), 0
        for seen, line in enumerate(lines_of(path), start=1):
            if seen % rows == 0:
                yield Piece(start=start, rows=rows)
                start = Cursor(file=file, offset=line.end, number=line.number)
        if seen % rows:
            yield Piece(start=start, rows=seen % rows)
        return
    sizes = _sizes(path, rows)
    if sizes is None:
        yield Piece(start=Cursor(file=file), rows=None)
        return
    begin = length = 0
    for size in sizes:
        length += size
        if length >= rows:
            yield Piece(start=Cursor(file=file, offset=begin, number=begin), rows=length)
            begin, length = begin + length, 0
    if length:
        yield Piece(start=Cursor(file=file, offset=begin, number=begin), rows=length)


def _sizes(path: Path, rows: int) -> list[int] | None:
    """Return the rows of each part of a file that can be read by itself; None where there are no such parts."""
    if is_saved_dataset(path):
        total = len(open_saved(path))
        return [min(rows, total - start) for start in range(0, total, rows)]
    if suffix_of(path) == ".parquet":
        import pyarrow.parquet  # 0.1 s; only runs that read parquet pay it

        try:
            return row_groups(pyarrow.parquet.ParquetFile(path))
        except (pyarrow.ArrowInvalid, OSError):
            return None  # reading it says what is wrong
    return None
