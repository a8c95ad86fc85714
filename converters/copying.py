"""Bytes from files into a file, moved by the kernel where nothing has to change, through a small buffer where it has.

Memory stays at BUFFER_BYTES whatever the size of a tensor.
"""

import ctypes
import errno
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from megaswift.converters.dtypes import cast
from megaswift.converters.shards import write_at
from megaswift.converters.tensor_files import DTYPE_BYTES
from megaswift.errors import CheckpointError

BUFFER_BYTES = 8 << 20  # large enough that a system call costs nothing beside it
KERNEL_RUN_BYTES = 64 << 10  # shorter runs are collected in the buffer

# What a kernel or file system answers that cannot copy between these two files.
_NO_KERNEL_COPY = (errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EPERM)


@dataclass(frozen=True, slots=True, kw_only=True)
class Literal:
    """Bytes that are known."""

    at: int
    data: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Copy:
    """`runs` times `run_bytes` of `source`, each `source_pitch` after the one before, to places `pitch` apart.

    With `cast` (from, to; dtypes of a safetensors header) elements change; `run_bytes` counts those of the source.
    """

    at: int
    pitch: int
    source: Path
    source_at: int
    source_pitch: int
    run_bytes: int
    runs: int
    cast: tuple[str, str] | None = None

    @property
    def sources(self) -> tuple[Path, ...]:
        """The file that is read."""
        return (self.source,)


class Computed(Protocol):
    """Bytes that are computed when it is their turn; its repr says all that they follow from, beside the sources."""

    @property
    def sources(self) -> tuple[Path, ...]:
        """The files that are read."""

    def chunks(self) -> Iterator[tuple[int, memoryview]]:
        """Yield (place in the file, bytes)."""


Span = Literal | Copy | Computed

_SYNC_FILE_RANGE_WRITE = 2  # linux/fs.h: begin to write the changed pages, and do not wait
_sync_file_range = getattr(ctypes.CDLL(None), "sync_file_range", None)  # Linux only, and not in os
if _sync_file_range is not None:
    _sync_file_range.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]


class SpanWriter:
    """Writes spans into a new file of `num_bytes`; what no span fills is zero.

    With `fsync`, which the caller calls at the end, the disk begins early.
    """

    def __init__(self, path: Path, num_bytes: int, *, fsync: bool = False) -> None:
        self._fsync = fsync
        self._sources: dict[Path, int] = {}
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
        os.ftruncate(self._file, num_bytes)

    def __enter__(self) -> "SpanWriter":
        return self

    def __exit__(self, *_: object) -> None:
        for opened in (self._file, *self._sources.values()):
            os.close(opened)

    def write(self, spans: Iterable[Span]) -> None:
        """Write some spans; raises OSError, or CheckpointError where a source is too short."""
        for span in spans:
            if isinstance(span, Literal):
                write_at(self._file, memoryview(span.data), span.at)
            elif isinstance(span, Copy):
                if span.source not in self._sources:
                    self._sources[span.source] = os.open(span.source, os.O_RDONLY)
                _copy(span, self._sources[span.source], self._file)
            else:
                for at, data in span.chunks():
                    write_at(self._file, data, at)
        if self._fsync and _sync_file_range is not None:
            # The disk begins now, not when the last byte is there; a failure shows in fsync.
            _sync_file_range(self._file, 0, 0, _SYNC_FILE_RANGE_WRITE)


def gather(copies: Sequence[Copy], *, num_bytes: int) -> npt.NDArray[np.uint8]:
    """Return in memory what the copies would write into a file of `num_bytes`; they must not cast."""
    out = np.zeros(num_bytes, np.uint8)
    for span in copies:
        assert span.cast is None, f"{span} casts"
        source = np.memmap(span.source, np.uint8, "r")
        end = span.source_at + (span.runs - 1) * span.source_pitch + span.run_bytes
        if end > len(source):
            raise _ended(span, len(source))
        rows = np.lib.stride_tricks.as_strided(
            source[span.source_at :], (span.runs, span.run_bytes), (span.source_pitch, 1)
        )
        np.lib.stride_tricks.as_strided(out[span.at :], rows.shape, (span.pitch, 1))[...] = rows
    return out


def _copy(span: Copy, source: int, target: int) -> None:
    itemsize, new_itemsize = (DTYPE_BYTES[dtype] for dtype in span.cast) if span.cast else (1, 1)
    without_gaps = (
        span.source_pitch == span.run_bytes and span.pitch == span.run_bytes // itemsize * new_itemsize
    )
    if without_gaps:
        span = replace(span, run_bytes=span.runs * span.run_bytes, runs=1)
    if span.cast is None and (span.runs == 1 or span.run_bytes >= KERNEL_RUN_BYTES):
        for run in range(span.runs):
            at, source_at = span.at + run * span.pitch, span.source_at + run * span.source_pitch
            _copy_range(span, source, source_at, target, at, span.run_bytes)
        return
    runs_at_once = max(1, BUFFER_BYTES // span.run_bytes)
    for run in range(0, span.runs, runs_at_once):
        runs = min(runs_at_once, span.runs - run)
        for done in range(
            0, span.run_bytes, BUFFER_BYTES
        ):  # more than one step only for a run beyond the buffer
            width = min(BUFFER_BYTES, span.run_bytes - done)
            data = _read_runs(span, source, span.source_at + run * span.source_pitch + done, width, runs)
            if span.cast:
                data = cast(np.frombuffer(data, f"u{itemsize}"), *span.cast).view(np.uint8).data
            _write_runs(
                target, data, span.at + run * span.pitch + done // itemsize * new_itemsize, span.pitch, runs
            )


def _read_runs(span: Copy, source: int, source_at: int, width: int, runs: int) -> memoryview:
    """Return `runs` runs of `width` bytes, one after the other."""
    if runs == 1 or span.source_pitch == width:
        return _read(span, source, source_at, runs * width)
    return memoryview(
        b"".join(_read(span, source, source_at + run * span.source_pitch, width) for run in range(runs))
    )


def _write_runs(target: int, data: memoryview, at: int, pitch: int, runs: int) -> None:
    width = len(data) // runs
    if pitch == width:
        write_at(target, data, at)
    else:
        for run in range(runs):
            write_at(target, data[run * width : (run + 1) * width], at + run * pitch)


def _copy_range(span: Copy, source: int, source_at: int, target: int, at: int, count: int) -> None:
    """Copy bytes inside the kernel; through the buffer where that is refused."""
    while count and hasattr(os, "copy_file_range"):
        try:
            copied = os.copy_file_range(source, target, count, source_at, at)
        except OSError as error:
            if error.errno not in _NO_KERNEL_COPY:
                raise
            break
        if copied == 0:
            raise _ended(span, source_at)
        source_at, at, count = source_at + copied, at + copied, count - copied
    while count:
        data = _read(span, source, source_at, min(count, BUFFER_BYTES))
        write_at(target, data, at)
        source_at, at, count = source_at + len(data), at + len(data), count - len(data)


def _read(span: Copy, source: int, source_at: int, count: int) -> memoryview:
    data = bytearray(count)
    filled = 0
    while filled < count:
        got = os.preadv(source, [memoryview(data)[filled:]], source_at + filled)
        if got == 0:
            raise _ended(span, source_at + filled)
        filled += got
    return memoryview(data)


def _ended(span: Copy, at: int) -> CheckpointError:
    return CheckpointError(
        f"{span.source} ends at byte {at}, earlier than its header says. Copy the file again."
    )
