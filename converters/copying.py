"""Bytes from files into a file, and checksums of tensors as their bytes pass by.

Sources are mapped, so that a byte is copied once, from the page cache of one file into that of the other, and a checksum
reads it there. Memory of this process's own stays at BUFFER_BYTES whatever the size of a tensor.
"""

import ctypes
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import xxhash

from megaswift.converters.dtypes import cast
from megaswift.converters.mapped_file import MappedFile
from megaswift.converters.shards import write_at
from megaswift.converters.tensor_files import DTYPE_BYTES

# Large enough that a system call costs nothing beside it, small enough for the processor's cache. No power of two: ext4 on
# Linux 6.18 writes aligned pieces of 256 KiB at a third of the speed.
BUFFER_BYTES = 1020 << 10


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


class Checksum:
    """The XXH3 of some bytes of a file, 128 bits: ten times as fast as a CRC without instructions for it."""

    def __init__(self, file: Path, begin: int, num_bytes: int) -> None:
        self.file, self.at, self._end = file, begin, begin + num_bytes
        self._digest = xxhash.xxh3_128()

    def take(self, data: memoryview) -> memoryview:
        """Take the bytes of the file from `at` on that belong here, and return the others."""
        own = data[: self._end - self.at]
        self._digest.update(own)
        self.at += len(own)
        return data[len(own) :]

    def hexdigest(self) -> str:
        """Return hexadecimal digits; what has not passed by is read from the file."""
        if self.at < self._end:
            buffer = memoryview(bytearray(BUFFER_BYTES))
            with self.file.open("rb", buffering=0) as file:
                file.seek(self.at)
                while self.at < self._end and (count := file.readinto(buffer)):
                    self.take(buffer[:count])
        return self._digest.hexdigest()


class SpanWriter:
    """Writes spans into a new file of `num_bytes`; what no span fills is zero."""

    def __init__(self, path: Path, num_bytes: int) -> None:
        self._path = path
        self._sources: dict[Path, MappedFile] = {}
        self._buffer = memoryview(bytearray(BUFFER_BYTES))
        self._waiting: dict[tuple[Path, int], Checksum] = {}  # by the byte that each wants next
        self._file = self._open(num_bytes)

    def _open(self, num_bytes: int) -> int:
        file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
        os.ftruncate(file, num_bytes)
        return file

    def __enter__(self) -> "SpanWriter":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._file)
        self._sources.clear()

    def write(self, spans: Iterable[Span], checksums: Iterable[Checksum] = ()) -> None:
        """Write some spans; checksums of this file or of sources take what passes by in their order.

        Raises OSError, or CheckpointError where a source is too short.
        """
        self._waiting = {(one.file, one.at): one for one in checksums}
        for span in spans:
            if isinstance(span, Literal):
                self._write(memoryview(span.data), span.at)
            elif isinstance(span, Copy):
                self._copy(span)
            else:
                for at, data in span.chunks():
                    self._write(data, at)

    def begin_sync(self) -> None:
        """Let the disk begin now rather than when the last byte is there; a failure shows in fsync."""
        if _sync_file_range is not None:
            _sync_file_range(self._file, 0, 0, _SYNC_FILE_RANGE_WRITE)

    def _copy(self, span: Copy) -> None:
        if not span.runs * span.run_bytes:
            return
        itemsize, new_itemsize = (DTYPE_BYTES[dtype] for dtype in span.cast) if span.cast else (1, 1)
        without_gaps = (
            span.source_pitch == span.run_bytes and span.pitch == span.run_bytes // itemsize * new_itemsize
        )
        if without_gaps:
            span = replace(span, run_bytes=span.runs * span.run_bytes, runs=1)
        runs_at_once = max(1, len(self._buffer) // span.run_bytes)
        for run in range(0, span.runs, runs_at_once):
            runs = min(runs_at_once, span.runs - run)
            # More than one step only for a run beyond the buffer.
            for done in range(0, span.run_bytes, len(self._buffer)):
                width = min(len(self._buffer), span.run_bytes - done)
                data = self._read_runs(span, span.source_at + run * span.source_pitch + done, width, runs)
                if span.cast:
                    data = cast(np.frombuffer(data, f"u{itemsize}"), *span.cast).view(np.uint8).data
                at = span.at + run * span.pitch + done // itemsize * new_itemsize
                self._write_runs(data, at, span.pitch, runs)

    def _read_runs(self, span: Copy, source_at: int, width: int, runs: int) -> memoryview:
        """Return `runs` runs of `width` bytes, one after the other."""
        if runs == 1 or span.source_pitch == width:
            return self._read(span.source, source_at, runs * width)
        for run in range(runs):
            data = self._read(span.source, source_at + run * span.source_pitch, width)
            self._buffer[run * width : (run + 1) * width] = data
        return self._buffer[: runs * width]

    def _write_runs(self, data: memoryview, at: int, pitch: int, runs: int) -> None:
        width = len(data) // runs
        if pitch == width:
            width, runs = len(data), 1
        for run in range(runs):
            self._write(data[run * width : (run + 1) * width], at + run * pitch)

    def _read(self, path: Path, at: int, num_bytes: int) -> memoryview:
        if path not in self._sources:
            self._sources[path] = MappedFile(path)
        data = self._sources[path].read(at, num_bytes)
        self._pass(path, at, data)
        return data

    def _write(self, data: memoryview, at: int) -> None:
        write_at(self._file, data, at)
        self._pass(self._path, at, data)

    def _pass(self, file: Path, at: int, data: memoryview) -> None:
        """Let the checksums that want these bytes of a file take them."""
        while data and (checksum := self._waiting.pop((file, at), None)):
            data = checksum.take(data)
            at = checksum.at
            if not data:
                self._waiting[file, at] = checksum


class _Differs(Exception):
    """A file does not hold what was to be written."""


class _SpanComparer(SpanWriter):
    """Compares a file with what would be written, and raises _Differs where they are not equal."""

    def _open(self, num_bytes: int) -> int:
        file = os.open(self._path, os.O_RDONLY)
        if os.fstat(file).st_size != num_bytes:
            os.close(file)
            raise _Differs
        return file

    def _write(self, data: memoryview, at: int) -> None:
        there = os.pread(self._file, len(data), at)
        if there != bytes(data):  # a memoryview would compare element by element
            raise _Differs


def holds(path: Path, num_bytes: int, spans: Iterable[Span]) -> bool:
    """Whether a file has `num_bytes` and the bytes of some spans; raises OSError."""
    try:
        with _SpanComparer(path, num_bytes) as comparer:
            comparer.write(spans)
    except _Differs:
        return False
    return True


def gather(copies: Sequence[Copy], *, num_bytes: int) -> npt.NDArray[np.uint8]:
    """Return in memory what the copies would write into a file of `num_bytes`; they must not cast."""
    out = np.zeros(num_bytes, np.uint8)
    for span in copies:
        assert span.cast is None, f"{span} casts"
        extent = (span.runs - 1) * span.source_pitch + span.run_bytes
        source = np.frombuffer(MappedFile(span.source).read(span.source_at, extent), np.uint8)
        rows = np.lib.stride_tricks.as_strided(source, (span.runs, span.run_bytes), (span.source_pitch, 1))
        np.lib.stride_tricks.as_strided(out[span.at :], rows.shape, (span.pitch, 1))[...] = rows
    return out
