"""Tokenised pieces of several sets, joined into what training reads: the rows chosen, in their order, and packed.

The result is that of reading and tokenising everything at once (data/load.py), to the byte.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import numpy as np

from megaswift.config.data import DataConfig
from megaswift.data.channels import Channels, join_channels
from megaswift.data.encode import CHANNELS, EncodedSet, nothing_left
from megaswift.data.forms import Form
from megaswift.data.mixture import draw, log_mixture, select
from megaswift.data.packing import pack
from megaswift.data.read import no_usable_row
from megaswift.data.report import BadRow, Report, merge
from megaswift.data.sample import Sample
from megaswift.data.sources import FileSet

BAD_ROWS = "bad_rows.jsonl"


@dataclass(frozen=True, kw_only=True)
class _Head:
    """A part without its tokens."""

    file: Path
    num_samples: int
    lengths: np.ndarray  # int64 [entries]
    samples: np.ndarray  # int64 [entries], rising
    targets: np.ndarray  # float32 [samples with entries]
    channels: Channels | None  # of the entries
    float_weights: bool
    unread: tuple[BadRow, ...]
    untokenised: dict[int, BadRow]  # by sample
    layouts: dict[str, int]


@dataclass(frozen=True, kw_only=True)
class _Table:
    """Where every tokenised entry of all parts lies, in the order of the rows."""

    heads: Sequence[_Head]
    row: np.ndarray  # int64 [entries], rising: the row it came from, counted through all sets
    length: np.ndarray  # int64 [entries]
    part: np.ndarray  # int64 [entries]
    start: np.ndarray  # int64 [entries]: its first token in the part
    targets: np.ndarray  # float32 [rows with entries]
    channels: Channels | None  # of the entries
    untokenised: dict[int, BadRow]


def write_part(
    file: Path,
    encoded: EncodedSet,
    *,
    samples: Sequence[Sample],
    unread: Sequence[BadRow],
    untokenised: Sequence[BadRow],
) -> None:
    """Write what one piece became; the file is complete or not there."""
    kept = np.unique(encoded.samples)
    without = np.setdiff1d(np.arange(len(samples)), kept).tolist()
    layouts: dict[str, int] = {}
    for sample in samples:
        layouts[sample.layout] = layouts.get(sample.layout, 0) + 1
    ledger = {
        "num_samples": len(samples),
        "unread": [_words(row) for row in unread],
        "untokenised": [[number, *_words(row)] for number, row in zip(without, untokenised, strict=True)],
        "layouts": layouts,
        "channels": None if encoded.channels is None else encoded.channels.names,
    }
    targets = np.full(len(kept), np.nan, np.float32) if encoded.targets is None else encoded.targets
    growing = file.with_suffix(f".{os.getpid()}.tmp")
    with growing.open("wb") as opened:
        np.savez(
            opened,
            input_ids=encoded.input_ids,
            loss_weights=encoded.loss_weights,
            lengths=encoded.lengths,
            samples=encoded.samples,
            targets=targets,
            channels=[] if encoded.channels is None else encoded.channels.numbers,
            float_weights=encoded.loss_weights.dtype != np.uint8,
            ledger=np.frombuffer(json.dumps(ledger).encode(), np.uint8),
        )
        opened.flush()
        os.fsync(opened.fileno())  # or a node that dies may leave the name without the bytes
    os.replace(growing, file)


def is_part(file: Path) -> bool:
    """Return whether a part is there to its end, which is where the directory of a zip file lies."""
    return is_zipfile(file)


def join(
    files: Sequence[Path],
    owners: Sequence[int],
    sets: Sequence[FileSet],
    config: DataConfig,
    *,
    num_train: int,
    form: Form,
    seed: int,
    packing_length: int | None,
    folder: Path,
) -> dict[str, Any]:
    """Write train/ and val/ into `folder` and return the figures of its manifest.

    `owners` says which of `sets` each part belongs to; the first `num_train` sets train. Raises DataError where a set has no
    usable row.
    """
    heads = [_read_head(file) for file in files]
    of_set = [
        [head for head, owner in zip(heads, owners, strict=True) if owner == one] for one in range(len(sets))
    ]
    reports = [_reading(one) for one in of_set]
    for one, report in zip(sets, reports, strict=True):
        report.log(one.source.name)
        if not report.kept:
            raise no_usable_row(one.source.name, report)
    rows, first = [], 0
    for one, report in zip(sets, reports, strict=True):
        wanted = one.source.rows
        drawn = np.arange(report.kept) if wanted is None else np.array(draw(report.kept, wanted, seed=seed))
        rows.append(first + drawn)
        first += report.kept
    counts = [len(one) for one in rows]
    chosen = select(
        counts[:num_train], counts[num_train:], config, seed=seed, drawn=np.concatenate(rows[:num_train])
    )
    if config.interleave_prob:
        log_mixture([one.source.name for one in sets[:num_train]], counts[:num_train], chosen.train)
    table, numbers = _table(heads), np.concatenate(rows)
    found: dict[str, Any] = {}
    bad = [row for report in reports for row in report.bad]
    for name, selected in (("train", chosen.train), ("val", chosen.val)):
        if len(selected):
            found[name], more = _write_set(
                table, numbers[selected], form, packing_length, folder / name, what=name
            )
            bad += more
    with (folder / BAD_ROWS).open("w", encoding="utf-8") as opened:
        for row in bad:
            opened.write(json.dumps(dict(zip(("source", "kind", "reason"), _words(row), strict=True))) + "\n")
    whole = merge(reports)
    return {"rows_read": whole.read, "bad_rows": len(bad), "layouts": _layouts(heads), **found}


def _read_head(file: Path) -> _Head:
    with np.load(file) as part:
        ledger = json.loads(part["ledger"].tobytes())
        names = ledger["channels"]
        return _Head(
            file=file,
            num_samples=ledger["num_samples"],
            lengths=part["lengths"],
            samples=part["samples"],
            targets=part["targets"],
            channels=None if names is None else Channels(numbers=part["channels"], names=tuple(names)),
            float_weights=bool(part["float_weights"]),
            unread=tuple(_row(words) for words in ledger["unread"]),
            untokenised={number: _row(words) for number, *words in ledger["untokenised"]},
            layouts=ledger["layouts"],
        )


def _reading(heads: Sequence[_Head]) -> Report:
    bad = tuple(row for head in heads for row in head.unread)
    kept = sum(head.num_samples for head in heads)
    return Report(read=kept + len(bad), kept=kept, bad=bad)


def _table(heads: Sequence[_Head]) -> _Table:
    firsts = np.cumsum([0, *(head.num_samples for head in heads)])[:-1].tolist()
    channels = [head.channels for head in heads if head.channels is not None]
    # Those of a part without a row do not say how many numbers a row has.
    targets = [head.targets for head in heads]
    return _Table(
        heads=heads,
        row=np.concatenate([head.samples + first for head, first in zip(heads, firsts, strict=True)]),
        length=np.concatenate([head.lengths for head in heads]),
        part=np.repeat(np.arange(len(heads)), [len(head.lengths) for head in heads]),
        start=np.concatenate([np.cumsum(head.lengths) - head.lengths for head in heads]),
        targets=np.concatenate([one for one in targets if len(one)] or targets[:1]),
        channels=join_channels(channels) if channels else None,
        untokenised={
            first + number: row
            for head, first in zip(heads, firsts, strict=True)
            for number, row in head.untokenised.items()
        },
    )


def _write_set(
    table: _Table, rows: np.ndarray, form: Form, packing_length: int | None, folder: Path, *, what: str
) -> tuple[dict[str, Any], list[BadRow]]:
    """Write the set of these rows and return its figures, and the rows that could not be tokenised."""
    bad = [table.untokenised[row] for row in rows.tolist() if row in table.untokenised]
    report = Report(read=len(rows), kept=len(rows) - len(bad), bad=tuple(bad))
    whole = {"train": "training rows", "val": "validation rows"}[what]
    if bad:
        report.log(f"tokenising {whole}")
    if not report.kept:
        raise nothing_left(whole, report)
    left = np.searchsorted(table.row, rows, side="left")
    counts = np.searchsorted(table.row, rows, side="right") - left
    entries = np.repeat(left - (np.cumsum(counts) - counts), counts) + np.arange(counts.sum())
    tokenised = rows[counts > 0]
    targets = table.targets[np.searchsorted(np.unique(table.row), tokenised)]
    starts = np.concatenate([[0], np.cumsum(table.length[entries])]).astype(np.int64)
    small = {
        "starts": starts,
        "samples": np.repeat(np.arange(len(rows)), counts),
        "per_row": np.array(form.per_row),
        **({} if np.isnan(targets).all() else {"targets": targets}),
    }
    folder.mkdir()
    for name, values in small.items():
        np.save(folder / f"{name}.npy", values)
    if table.channels is not None:
        table.channels.take(entries).save(folder / CHANNELS)
    _write_tokens(table, entries, starts, folder)
    encoded = EncodedSet.load(folder)
    figures = {
        "rows": encoded.num_rows,
        "entries": int((encoded.lengths > 0).sum()),
        "tokens": int(starts[-1]),
    }
    if packing_length is not None:
        packs = pack(encoded.row_lengths, packing_length)
        packs.save(folder / "packs")
        figures |= {"packs": len(packs), "packing_length": packing_length}
    return figures, bad


def _write_tokens(table: _Table, entries: np.ndarray, starts: np.ndarray, folder: Path) -> None:
    """Copy the tokens of `entries` to where they belong, one part after the other; neighbours in one copy."""
    weights = np.float32 if any(head.float_weights for head in table.heads) else np.uint8
    outputs = {
        name: np.lib.format.open_memmap(
            folder / f"{name}.npy", mode="w+", dtype=dtype, shape=(int(starts[-1]),)
        )
        for name, dtype in (("input_ids", np.int32), ("loss_weights", weights))
    }
    parts = table.part[entries]
    by_part = np.argsort(parts, kind="stable")
    ends = np.cumsum(np.bincount(parts, minlength=len(table.heads)))
    for head, places in zip(table.heads, np.split(by_part, ends[:-1]), strict=True):
        if not len(places):
            continue
        taken = entries[places]
        breaks = np.flatnonzero((np.diff(places) != 1) | (np.diff(taken) != 1)) + 1
        firsts, lasts = np.concatenate([[0], breaks]), np.concatenate([breaks, [len(places)]]) - 1
        with np.load(head.file) as part:
            for name, output in outputs.items():
                tokens = part[name]
                for first, last in zip(firsts, lasts, strict=True):
                    begin, end = starts[places[first]], starts[places[last] + 1]
                    source = table.start[taken[first]]
                    output[begin:end] = tokens[source : source + end - begin]
    for output in outputs.values():
        output.flush()


def _layouts(heads: Sequence[_Head]) -> dict[str, int]:
    names = {name for head in heads for name in head.layouts}
    return {name: sum(head.layouts.get(name, 0) for head in heads) for name in sorted(names)}


def _words(row: BadRow) -> list[str]:
    return [row.source, row.kind, row.reason]


def _row(words: Sequence[str]) -> BadRow:
    source, kind, reason = words
    return BadRow(source=source, kind=kind, reason=reason)
