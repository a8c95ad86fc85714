"""Tokenising a whole set, in one process or several, into flat arrays that ranks can share."""

import multiprocessing
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megaswift.data.forms import CONVERSATIONS, Form
from megaswift.data.prompts import encode_prompts
from megaswift.data.report import BadRow, Report, stop_at
from megaswift.data.sample import RowError, Sample
from megaswift.data.template import Template
from megaswift.errors import DataError
from megaswift.logs import get_logger

logger = get_logger(__name__)

CHUNK = 256  # samples in one call of the tokenizer: enough to keep its threads busy, small enough to stay in cache


@dataclass(frozen=True, kw_only=True)
class EncodedSet:
    """Tokenised samples, one after the other in flat arrays.

    Entry i is input_ids[starts[i]:starts[i + 1]]; `samples[i]` is the index of the Sample it came from (a long text
    that is split gives several entries, a preference pair the chosen and then the rejected one). `per_row` entries that
    follow each other belong together: entries k * per_row to (k + 1) * per_row are row k.
    """

    input_ids: np.ndarray  # int32 [tokens]
    loss_weights: np.ndarray  # uint8 [tokens] where all weights are 0 or 1, else float32
    starts: np.ndarray  # int64 [entries + 1]
    samples: np.ndarray  # int64 [entries]
    per_row: int = 1
    targets: np.ndarray | None = None  # float32 [rows]: what the rows say beside their text; nan: nothing
    references: np.ndarray | None = None  # float64 [entries]: log-probability under the reference model
    mismatched: "EncodedSet | None" = None  # as many rows again, with each prompt answered for another row

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
        return cls(**{**arrays, "per_row": int(arrays["per_row"])}, mismatched=mismatched)


ARRAYS = ("input_ids", "loss_weights", "starts", "samples", "per_row")
EXTRA_ARRAYS = ("targets", "references")


@dataclass(frozen=True, kw_only=True)
class _Part:
    """What one chunk of samples became."""

    input_ids: np.ndarray
    loss_weights: np.ndarray
    lengths: np.ndarray
    samples: np.ndarray
    targets: np.ndarray
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
    chunks = [range(start, min(start + CHUNK, len(samples))) for start in range(0, len(samples), CHUNK)]
    parts: list[_Part] = []
    for part in _parts(samples, template, form, chunks, min(processes, len(chunks))):
        if strict and part.bad:
            stop_at(part.bad[0])
        parts.append(part)
    bad = tuple(row for part in parts for row in part.bad)
    report = Report(read=len(samples), kept=len(samples) - len(bad), bad=bad)
    if bad:
        report.log(f"tokenising {what}")
    if not report.kept:
        first = f" The first reason: {bad[0]}." if bad else ""
        raise DataError(f"No row of the {what} is left after tokenising ({len(samples)} read).{first}")
    return _joined(parts, form), report


def _parts(
    samples: Sequence[Sample], template: Template, form: Form, chunks: list[range], processes: int
) -> Iterator[_Part]:
    if processes <= 1:
        yield from (_encode_chunk(samples, template, form, chunk) for chunk in chunks)
        return
    # fork: the samples and the template are in the children at once; they run the tokenizer and numpy only.
    pool = ProcessPoolExecutor(
        processes,
        multiprocessing.get_context("fork"),
        initializer=_start_worker,
        initargs=(samples, template, form),
    )
    try:
        yield from pool.map(_encode_inherited, chunks)
    except BrokenProcessPool as error:
        raise DataError(
            f"One of dataset_num_proc={processes} processes was killed, most often for want of memory. Lower it."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


_inherited: tuple[Sequence[Sample], Template, Form] | None = None  # set in worker processes only


def _start_worker(samples: Sequence[Sample], template: Template, form: Form) -> None:
    global _inherited  # a worker's state: sending the samples with every chunk would pickle them
    _inherited = (samples, template, form)
    os.environ["TOKENIZERS_PARALLELISM"] = (
        "false"  # tokenizers asks for it after a fork; processes are the threads
    )


def _encode_inherited(chunk: range) -> _Part:
    assert _inherited is not None
    return _encode_chunk(*_inherited, chunk)


def _encode_chunk(samples: Sequence[Sample], template: Template, form: Form, chunk: range) -> _Part:
    ids: list[np.ndarray] = []
    weights: list[np.ndarray] = []
    kept: list[int] = []
    targets: list[float] = []
    bad: list[BadRow] = []
    rows = [_documents(samples[index], form) for index in chunk]
    documents = [document for row in rows if not isinstance(row, RowError) for document in row]
    outcomes = iter(encode_prompts(template, documents) if form.asks else template.encode_batch(documents))
    for index, row in zip(chunk, rows, strict=True):
        encoded = [row] if isinstance(row, RowError) else [next(outcomes) for _ in row]
        error = next((one for one in encoded if isinstance(one, RowError)), None)
        if error is not None:
            bad.append(BadRow(source=samples[index].source, kind=error.kind, reason=error.reason))
            continue
        for entry in (entry for one in encoded if not isinstance(one, RowError) for entry in one):
            ids.append(entry.input_ids)
            weights.append(entry.loss_weights)
            kept.append(index)
        target = form.target(samples[index])
        targets.append(np.nan if target is None else target)
    flat = _concatenated(weights, np.float32)
    return _Part(
        input_ids=_concatenated(ids, np.int32),
        loss_weights=flat.astype(np.uint8) if np.isin(flat, (0, 1)).all() else flat,
        lengths=np.array([len(entry) for entry in ids], np.int64),
        samples=np.array(kept, np.int64),
        targets=np.array(targets, np.float32),
        bad=tuple(bad),
    )


def _documents(sample: Sample, form: Form) -> tuple[Sample, ...] | RowError:
    try:
        return form.documents(sample)
    except RowError as error:
        return error


def _joined(parts: Iterable[_Part], form: Form) -> EncodedSet:
    parts = list(parts)
    lengths = _concatenated([part.lengths for part in parts], np.int64)
    targets = _concatenated([part.targets for part in parts], np.float32)
    return EncodedSet(
        input_ids=_concatenated([part.input_ids for part in parts], np.int32),
        loss_weights=np.concatenate(
            [part.loss_weights for part in parts]
        ),  # one float32 part makes all float32
        starts=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        samples=_concatenated([part.samples for part in parts], np.int64),
        per_row=form.per_row,
        targets=None if np.isnan(targets).all() else targets,
    )


def _concatenated(arrays: list[np.ndarray], dtype: type[np.generic]) -> np.ndarray:
    return np.concatenate(arrays).astype(dtype, copy=False) if arrays else np.empty(0, dtype)
