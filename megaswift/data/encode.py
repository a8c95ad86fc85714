"""Tokenising a whole set, in one process or several, into flat arrays that ranks can share."""

import gc
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from megaswift.data.channels import Channels, join_channels
from megaswift.data.forms import CONVERSATIONS, Form
from megaswift.data.packing import Packs
from megaswift.data.pool import forked_map
from megaswift.data.prompts import encode_prompts
from megaswift.data.report import BadRow, Report, stop_at
from megaswift.data.sample import STUMBLES, RowError, Sample, row_error
from megaswift.data.template import Encoded, Template
from megaswift.errors import DataError

NO_DOCUMENT = Encoded(input_ids=np.empty(0, np.int32), loss_weights=np.empty(0, np.float32))
CHUNK = 256  # samples in one call of the tokenizer: enough to keep its threads busy, small enough to stay in cache


@dataclass(frozen=True, kw_only=True)
class EncodedSet:
    """Tokenised samples, one after the other in flat arrays.

    Entry i is input_ids[starts[i]:starts[i + 1]]; `samples[i]` is the index of the Sample it came from (a long text
    that is split gives several entries, a preference pair the chosen and then the rejected one). `per_row` entries that
    follow each other belong together: entries k * per_row to (k + 1) * per_row are row k. Where a row has fewer documents, the
    last of them have no tokens.
    """

    input_ids: np.ndarray  # int32 [tokens]
    loss_weights: np.ndarray  # uint8 [tokens] where all weights are 0 or 1, else float32
    starts: np.ndarray  # int64 [entries + 1]
    samples: np.ndarray  # int64 [entries]
    per_row: int = 1
    # float32 [rows] or [rows, numbers]: what the rows say beside their text; nan: nothing
    targets: np.ndarray | None = None
    references: np.ndarray | None = None  # float64 [entries]: log-probability under the reference model
    mismatched: "EncodedSet | None" = None  # as many rows again, with each prompt answered for another row
    packs: Packs | None = None  # of the rows, where they were packed ahead
    channels: Channels | None = None  # of the entries, where their losses are told apart

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def num_rows(self) -> int:
        """Rows, each of `per_row` entries."""
        return len(self) // self.per_row

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each entry, int64 [entries]."""
        return np.diff(self.starts)

    @property
    def row_lengths(self) -> np.ndarray:
        """Tokens that a row needs room for, int64 [rows]."""
        own = self.lengths.reshape(-1, self.per_row).sum(1)
        return own if self.mismatched is None else np.maximum(own, self.mismatched.row_lengths)

    def save(self, folder: Path) -> None:
        """Write the arrays as .npy files in place of whatever an earlier run left in `folder`."""
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for name in (*ARRAYS, *EXTRA_ARRAYS):
            if getattr(self, name) is not None:
                np.save(folder / f"{name}.npy", getattr(self, name))
        if self.mismatched is not None:
            self.mismatched.save(folder / "mismatched")
        if self.packs is not None:
            self.packs.save(folder / PACKS)
        if self.channels is not None:
            self.channels.save(folder / CHANNELS)

    @classmethod
    def load(cls, folder: Path) -> "EncodedSet":
        """Map the arrays that save() wrote into memory; the ranks of a node then share them. Raises DataError."""
        try:
            arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in ARRAYS}
            for name in EXTRA_ARRAYS:
                if (folder / f"{name}.npy").exists():
                    arrays[name] = np.load(folder / f"{name}.npy", mmap_mode="r")
        except (OSError, ValueError) as error:
            raise DataError(f"{folder} holds no tokenised set: {error}. Delete it and run again.") from error
        mismatched = cls.load(folder / "mismatched") if (folder / "mismatched").exists() else None
        packs = Packs.load(folder / PACKS) if (folder / PACKS).exists() else None
        channels = Channels.load(folder / CHANNELS) if (folder / CHANNELS).exists() else None
        arrays["per_row"] = int(arrays["per_row"])
        return cls(**arrays, mismatched=mismatched, packs=packs, channels=channels)

    def take(self, rows: np.ndarray) -> "EncodedSet":
        """Return the set of some rows, in their order, as a copy in memory."""
        entries = (rows[:, None] * self.per_row + np.arange(self.per_row)).ravel()
        parts = [slice(self.starts[entry], self.starts[entry + 1]) for entry in entries]
        return replace(
            self,
            input_ids=_concatenated([self.input_ids[part] for part in parts], np.int32),
            loss_weights=np.concatenate([self.loss_weights[part] for part in parts]),
            starts=np.concatenate([[0], np.cumsum(self.lengths[entries])]).astype(np.int64),
            samples=self.samples[entries],
            targets=None if self.targets is None else self.targets[rows],
            references=None if self.references is None else self.references[entries],
            mismatched=None if self.mismatched is None else self.mismatched.take(rows),
            packs=None,
            channels=None if self.channels is None else self.channels.take(entries),
        )


ARRAYS = ("input_ids", "loss_weights", "starts", "samples", "per_row")
EXTRA_ARRAYS = ("targets", "references")
PACKS, CHANNELS = "packs", "channels"  # folders beside the arrays


@dataclass(frozen=True, kw_only=True)
class _Part:
    """What one chunk of samples became."""

    input_ids: np.ndarray
    loss_weights: np.ndarray
    lengths: np.ndarray
    samples: np.ndarray
    targets: np.ndarray
    channels: list[str]  # of the entries, where they have any
    bad: tuple[BadRow, ...]


def encode_samples(
    samples: Sequence[Sample],
    template: Template,
    *,
    form: Form = CONVERSATIONS,
    processes: int = 1,
    strict: bool = False,
    what: str = "samples",
) -> tuple[EncodedSet, Report]:
    """Tokenise samples in order, each as the documents of `form`; the result does not depend on the number of processes.

    A sample that cannot be used is reported; with `strict` it raises DataError. Raises DataError when none is left.
    """
    encoded, report = encode_or_report(samples, template, form=form, processes=processes, strict=strict)
    if report.bad:
        report.log(f"tokenising {what}")
    if not report.kept:
        raise nothing_left(what, report)
    return encoded, report


def encode_or_report(
    samples: Sequence[Sample],
    template: Template,
    *,
    form: Form = CONVERSATIONS,
    processes: int = 1,
    strict: bool = False,
) -> tuple[EncodedSet, Report]:
    """Tokenise samples as encode_samples does; the set may be empty, and nothing is logged."""
    chunks = [range(start, min(start + CHUNK, len(samples))) for start in range(0, len(samples), CHUNK)]
    parts: list[_Part] = []
    work = partial(_encode_chunk, samples, template, form)
    gc.freeze()  # else every collection, and a text makes many objects, goes through all samples again
    try:
        for part in forked_map(work, chunks, processes=min(processes, len(chunks))):
            if strict and part.bad:
                stop_at(part.bad[0])
            parts.append(part)
    finally:
        gc.unfreeze()
    bad = tuple(row for part in parts for row in part.bad)
    return _joined(parts, form), Report(read=len(samples), kept=len(samples) - len(bad), bad=bad)


def nothing_left(what: str, report: Report) -> DataError:
    """Return the error of a set of which no row could be tokenised."""
    first = f" The first reason: {report.bad[0]}." if report.bad else ""
    return DataError(f"No row of the {what} is left after tokenising ({report.read} read).{first}")


def _encode_chunk(samples: Sequence[Sample], template: Template, form: Form, chunk: range) -> _Part:
    ids: list[np.ndarray] = []
    weights: list[np.ndarray] = []
    kept: list[int] = []
    targets: list[float | tuple[float, ...]] = []
    channels: list[str] = []
    bad: list[BadRow] = []
    rows = [_documents(samples[index], form) for index in chunk]
    documents = [document for row in rows if not isinstance(row, RowError) for document in row]
    outcomes = iter(
        encode_prompts(template, documents, whole=form.reads)
        if form.asks or form.reads
        else template.encode_batch(documents)
    )
    for index, row in zip(chunk, rows, strict=True):
        encoded = [row] if isinstance(row, RowError) else [next(outcomes) for _ in row]
        error = next((one for one in encoded if isinstance(one, RowError)), None)
        if error is not None:
            bad.append(BadRow(source=samples[index].source, kind=error.kind, reason=error.reason))
            continue
        entries = [entry for one in encoded if not isinstance(one, RowError) for entry in one]
        entries += [NO_DOCUMENT] * (form.per_row - len(entries))
        for entry in entries:
            ids.append(entry.input_ids)
            weights.append(entry.loss_weights)
            kept.append(index)
            if form.channel is not None:
                channels.append(form.channel(samples[index]))
        target = form.target(samples[index])
        targets.append(np.nan if target is None else target)
    flat = _concatenated(weights, np.float32)
    return _Part(
        input_ids=_concatenated(ids, np.int32),
        loss_weights=flat.astype(np.uint8) if np.isin(flat, (0, 1)).all() else flat,
        lengths=np.array([len(entry) for entry in ids], np.int64),
        samples=np.array(kept, np.int64),
        targets=np.array(targets, np.float32),
        channels=channels,
        bad=tuple(bad),
    )


def _documents(sample: Sample, form: Form) -> tuple[Sample, ...] | RowError:
    try:
        return form.documents(sample)
    except (RowError, *STUMBLES) as error:
        return row_error(error)


def _joined(parts: Iterable[_Part], form: Form) -> EncodedSet:
    parts = list(parts)
    lengths = _concatenated([part.lengths for part in parts], np.int64)
    targets = _concatenated([part.targets for part in parts if len(part.targets)], np.float32)
    return EncodedSet(
        input_ids=_concatenated([part.input_ids for part in parts], np.int32),
        loss_weights=np.concatenate(
            [np.empty(0, np.uint8), *(part.loss_weights for part in parts)]
        ),  # one float32 part makes all float32
        starts=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        samples=_concatenated([part.samples for part in parts], np.int64),
        per_row=form.per_row,
        targets=None if np.isnan(targets).all() else targets,
        channels=Channels.of([one for part in parts for one in part.channels]) if form.channel else None,
    )


def join_sets(sets: Sequence[EncodedSet]) -> EncodedSet:
    """Return the rows of several sets of one form, one set after the other."""
    if len(sets) == 1:
        return sets[0]
    targets = [np.full(one.num_rows, np.nan) if one.targets is None else one.targets for one in sets]
    others = [one.mismatched for one in sets if one.mismatched is not None]
    channels = [one.channels for one in sets if one.channels is not None]
    return EncodedSet(
        input_ids=_concatenated([one.input_ids for one in sets], np.int32),
        loss_weights=np.concatenate([one.loss_weights for one in sets]),
        starts=np.concatenate([[0], np.cumsum(np.concatenate([one.lengths for one in sets]))]).astype(
            np.int64
        ),
        samples=_concatenated([one.samples for one in sets], np.int64),
        per_row=sets[0].per_row,
        targets=None if all(one.targets is None for one in sets) else _concatenated(targets, np.float32),
        mismatched=join_sets(others) if others else None,
        channels=join_channels(channels) if channels else None,
    )


def _concatenated(arrays: list[np.ndarray], dtype: type[np.generic]) -> np.ndarray:
    return np.concatenate(arrays).astype(dtype, copy=False) if arrays else np.empty(0, dtype)
