"""Raw rows out of files, each with the file and line it came from. Broken rows come out as BadRow."""

import csv
import json
import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

from megaswift.data.report import BadRow
from megaswift.errors import DataError
from megaswift.logs import get_logger

logger = get_logger(__name__)

Row = tuple[str, dict[str, Any] | BadRow]  # ("file:line", the row)
CSV_FIELD_LIMIT = 1 << 30  # the csv module's own limit is 128 KiB, less than one long conversation
NOT_UTF8 = re.compile("[\udc80-\udcff]")  # what surrogateescape makes of bytes that are not UTF-8
COMPRESSED = (".gz", ".zst", ".xz", ".bz2", ".zip")
TRAIN_SPLIT = re.compile(r"(?:^|[/_.-])train(?:[/_.-]|$)", re.IGNORECASE)
BATCH_ROWS = 1024  # of parquet turned into Python objects at once: little to wait for, and enough for speed
BOM = b"\xef\xbb\xbf"
METADATA_FILES = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "config.json")


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """One line of a file and where it lies."""

    text: bytes
    source: str  # "file:line"
    end: int  # byte after it
    number: int  # from 1


def read_path(path: Path) -> Iterator[Row]:
    """Yield the rows of a file, of all data files of a folder, or of a saved `datasets` directory.

    Raises DataError for what cannot be read at all.
    """
    return (row for file in files_of(path) for row in read_file(file))


def files_of(path: Path) -> list[Path]:
    """Return what the rows of `path` lie in, in order: files, or one saved `datasets` directory. Raises DataError."""
    if is_saved_dataset(path):
        return [path]
    if path.is_dir():
        return _files_of(path)
    if suffix_of(path) not in READERS:
        raise DataError(f"{path} is not a data file. Known kinds are {', '.join(READERS)}.")
    return [path]


def read_file(path: Path, start: int = 0) -> Iterator[Row]:
    """Yield the rows of one of `files_of`, from row `start` on: at once where rows have places, else by reading up to it."""
    if path.is_dir():
        return _saved_dataset(path, start)
    if suffix_of(path) == ".parquet":
        return _parquet(path, start)
    return islice(READERS[suffix_of(path)](path), start, None)


def is_saved_dataset(path: Path) -> bool:
    """Return whether `datasets` saved this directory."""
    return (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()


def suffix_of(path: Path) -> str:
    """Return the suffix that says what kind of file it is."""
    return path.suffix.lower()


def _files_of(folder: Path) -> list[Path]:
    """Return the data files below a folder in a fixed order; where some belong to a train split, only those."""
    visible = sorted(
        file for file in folder.rglob("*")
        if file.is_file() and file.name not in METADATA_FILES
        and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    )  # fmt: skip
    files = [file for file in visible if suffix_of(file) in READERS]
    if not files:
        raise DataError(f"{folder} holds no data file. Known kinds are {', '.join(READERS)}.")
    aside = [file for file in visible if suffix_of(file) in COMPRESSED]
    if len({suffix_of(file) for file in files}) > 1:  # a text beside the data may be a licence or a note
        aside += [file for file in files if suffix_of(file) == ".txt"]
        files = [file for file in files if suffix_of(file) != ".txt"]
    if aside:
        names = ", ".join(file.name for file in aside)
        logger.warning(
            "%s: left out, as texts beside other data and compressed files are not read: %s", folder, names
        )
    train = [file for file in files if TRAIN_SPLIT.search(file.relative_to(folder).as_posix())]
    if train and len(train) < len(files):
        left_out = ", ".join(file.name for file in files if file not in train)
        logger.warning("%s: reading the files of the train split only; left out: %s", folder, left_out)
    return train or files


def _by_lines(path: Path) -> Iterator[Row]:
    parse = LINE_PARSERS[suffix_of(path)]
    return (parse(line.text, line.source) for line in lines_of(path))


def lines_of(path: Path, *, offset: int = 0, number: int = 0) -> Iterator[Line]:
    """Yield the lines that are not blank, from byte `offset` on, before which `number` lines lie."""
    with path.open("rb") as file:
        file.seek(offset)
        for text in file:
            offset += len(text)
            number += 1
            text = text.removeprefix(BOM) if number == 1 else text
            if text.strip():
                yield Line(text=text, source=f"{path}:{number}", end=offset, number=number)


def _parse_json_line(line: bytes, source: str) -> Row:
    try:
        return _object(json.loads(line), source)
    except UnicodeDecodeError as error:
        return source, BadRow(source=source, kind="encoding", reason=f"not UTF-8 at byte {error.start}")
    except (ValueError, RecursionError) as error:  # ValueError: also an integer of more than 4300 digits
        return source, BadRow(source=source, kind="json", reason=f"not JSON: {error}")


def _object(row: Any, source: str) -> Row:
    if isinstance(row, dict):
        return source, row
    return source, BadRow(
        source=source, kind="not an object", reason=f"the row is {type(row).__name__}, not a JSON object"
    )


def _json(path: Path) -> Iterator[Row]:
    """Yield the rows of a JSON array with the line each begins at; a file of one object a line is read as such."""
    try:
        text = path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 (byte {error.start}). Save it as UTF-8.") from error
    start = len(text) - len(text.lstrip())
    if text[start : start + 1] == "{":
        return _concatenated_objects(path, text)
    if text[start : start + 1] != "[":
        raise DataError(f"{path} is not a JSON array of rows. Save the rows as [{{...}}, ...] or one a line.")
    return _array(path, text, start)


def _concatenated_objects(path: Path, text: str) -> Iterator[Row]:
    lines = text.split("\n")  # splitlines() would break texts at Unicode's own line ends
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        yield from (
            _parse_json_line(line.encode(), f"{path}:{i}") for i, line in enumerate(lines, 1) if line.strip()
        )
        return
    raise DataError(f"{path} holds one JSON object, not rows. Save the rows as [{{...}}, ...] or one a line.")


def _array(path: Path, text: str, start: int) -> Iterator[Row]:
    decoder = json.JSONDecoder()
    whitespace = " \t\n\r"
    position, counted, line = start + 1, 0, 1
    while True:
        while text[position : position + 1] and text[position] in whitespace:
            position += 1
        if text[position : position + 1] == "]":
            _check_nothing_follows(path, text, position + 1)
            return
        line += text.count("\n", counted, position)
        counted = position
        try:
            row, position = decoder.raw_decode(text, position)
            while text[position : position + 1] and text[position] in whitespace:
                position += 1
            if text[position : position + 1] not in (",", "]"):
                raise json.JSONDecodeError("Expecting ',' or ']' after a row", text, position)
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{path}:{line}: the row that begins here is not JSON ({error}), so the rows after it cannot be told apart. "
                "Mend the file, or save it as .jsonl, where one broken row costs one row."
            ) from error
        yield _object(row, f"{path}:{line}")
        position += text[position] == ","


def _check_nothing_follows(path: Path, text: str, end: int) -> None:
    """Raise DataError where something comes after the array, which would be lost."""
    rest = text[end:].lstrip()
    if rest:
        line = 1 + text.count("\n", 0, len(text) - len(rest))
        raise DataError(
            f"{path}:{line}: something follows the end of the array, {rest[:20]!r}. Save all rows in one array, or one a line."
        )


def _csv(path: Path) -> Iterator[Row]:
    csv.field_size_limit(CSV_FIELD_LIMIT)
    with path.open(encoding="utf-8-sig", newline="", errors="surrogateescape") as file:
        reader = csv.DictReader(file, delimiter="\t" if suffix_of(path) == ".tsv" else ",", restkey=None)
        if reader.fieldnames is None:
            raise DataError(f"{path} is empty. The first line of a csv file names its columns.")
        width, end = len(reader.fieldnames), reader.line_num
        for row in reader:
            source, end = f"{path}:{end + 1}", reader.line_num
            extra = row.pop(None, None)  # type: ignore[call-overload]  # DictReader's key for surplus fields
            found = width + len(extra or ()) - sum(value is None for value in row.values())
            if found != width:
                yield (
                    source,
                    BadRow(
                        source=source, kind="columns", reason=f"{found} fields where the header has {width}"
                    ),
                )
            elif any(NOT_UTF8.search(value) for value in row.values()):
                yield source, BadRow(source=source, kind="encoding", reason="not UTF-8")
            else:
                yield source, dict(row)


def _parquet(path: Path, start: int = 0) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet  # 0.1 s; only runs that read parquet pay it

    try:
        file = pyarrow.parquet.ParquetFile(path)
        ends = list(accumulate(row_groups(file)))
        first = bisect_right(ends, start)  # the group that holds row `start`
        skipped = start - (ends[first - 1] if first else 0)
        batches = file.iter_batches(batch_size=BATCH_ROWS, row_groups=range(first, len(ends)))
        rows = (row for batch in batches for row in batch.to_pylist())
        yield from _numbered(islice(rows, skipped, None), path, start)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise DataError(
            f"{path} is not a readable parquet file: {error}. Fetch or write it again."
        ) from error


def row_groups(file: Any) -> list[int]:
    """Return the number of rows of each row group of a pyarrow ParquetFile."""
    return [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]


def _saved_dataset(path: Path, start: int = 0) -> Iterator[Row]:
    return numbered_dataset(open_saved(path), path, start)


def open_saved(path: Path) -> Any:
    """Return the Dataset, or the train split of the DatasetDict, that was saved in a directory. Raises DataError."""
    import datasets  # 1 s; only runs that read a saved directory pay it

    try:
        return _train_split(datasets.load_from_disk(str(path)), path)
    except (FileNotFoundError, ValueError, OSError) as error:
        raise DataError(
            f"{path} is not a directory saved by datasets.save_to_disk: {error}. Save it again."
        ) from error


def numbered_dataset(loaded: Any, name: object, start: int = 0) -> Iterator[Row]:
    """Yield the rows of a `datasets` Dataset, or of the train split of a DatasetDict, from row `start` on."""
    rows = _train_split(loaded, name)
    if start >= len(rows):  # which select() refuses
        return iter(())
    return _numbered(rows.select(range(start, len(rows))) if start else rows, name, start)


def _train_split(loaded: Any, name: object) -> Any:
    if isinstance(loaded, dict):
        if "train" not in loaded and len(loaded) != 1:
            raise DataError(
                f"{name} has splits {', '.join(loaded)} and none is named train. Save the one to train on alone."
            )
        loaded = loaded["train"] if "train" in loaded else next(iter(loaded.values()))
    return loaded


def _numbered(rows: Iterable[dict[str, Any]], name: object, before: int = 0) -> Iterator[Row]:
    for number, row in enumerate(rows, start=before + 1):
        yield f"{name}:row {number}", _without_nulls(row)


def _without_nulls(value: Any) -> Any:
    """Drop the null fields of nested objects: Arrow gives every object of a column the fields of all others."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value


def _parse_text_line(line: bytes, source: str) -> Row:
    try:
        return source, {"text": line.decode("utf-8").rstrip("\r\n")}
    except UnicodeDecodeError as error:
        return source, BadRow(source=source, kind="encoding", reason=f"not UTF-8 at byte {error.start}")


LINE_PARSERS: dict[str, Callable[[bytes, str], Row]] = {".jsonl": _parse_json_line, ".txt": _parse_text_line}
READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _by_lines, ".json": _json, ".csv": _csv, ".tsv": _csv, ".parquet": _parquet, ".txt": _by_lines,
}  # fmt: skip
