"""Spans of a conversion whose elements have to be computed: unpacked, transposed, or rounded to FP8. No torch.

Letters: N rows and C columns of a parameter, or of a tensor of the file.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np

from megaswift.converters.block_floats import BLOCK, encode_fp8
from megaswift.converters.copying import BUFFER_BYTES, Copy, gather
from megaswift.converters.dtypes import cast
from megaswift.converters.plan import Piece
from megaswift.converters.quantised import files_of
from megaswift.converters.reading import bits_of, read_piece
from megaswift.converters.tensor_files import DTYPE_BYTES, Bits, TensorInfo, TensorReader


@dataclass(frozen=True, slots=True, kw_only=True)
class Unpacked:
    """A piece of a file tensor that lies there transposed or quantised, as rows of a plain one whose bytes begin at `at`."""

    at: int
    piece: Piece
    info: TensorInfo
    dtype: str  # of the plain one

    @property
    def sources(self) -> tuple[Path, ...]:
        """The files that are read."""
        return tuple(part.file for part in files_of(self.info))

    def chunks(self) -> Iterator[tuple[int, memoryview]]:
        """Yield the bytes of each run of rows."""
        with TensorReader({self.info.name: self.info}) as reader:
            bits = read_piece(reader, self.piece)
            flat = cast(np.ascontiguousarray(bits).reshape(-1), self.info.dtype, self.dtype)
        cols = self.piece.cols[1] - self.piece.cols[0]
        data, row = _bytes(flat), cols * DTYPE_BYTES[self.dtype]
        done = 0
        for begin, end in self.piece.into.intervals():
            yield self.at + begin * row, data[done : done + (end - begin) * row]
            done += (end - begin) * row


@dataclass(frozen=True, slots=True, kw_only=True)
class Transposed:
    """One matrix [C, N] of a file tensor that packs those of all experts transposed, from a parameter [N, C]."""

    at: int
    copies: tuple[Copy, ...]  # that fill the parameter, from byte 0 on
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    cast: tuple[str, str]  # dtype of the checkpoint and of the file

    @property
    def sources(self) -> tuple[Path, ...]:
        """The files that are read."""
        return tuple(copy.source for copy in self.copies)

    def chunks(self) -> Iterator[tuple[int, memoryview]]:
        """Yield the matrix."""
        matrix_NC = _gathered(self.copies, self.shape, self.cast[0])
        in_file_NC = np.empty_like(matrix_NC)
        cols = (0, matrix_NC.shape[1])
        for piece in self.pieces:
            target = bits_of(in_file_NC, piece.rows, cols)
            target[...] = bits_of(matrix_NC, piece.into, cols).reshape(target.shape)
        yield self.at, _bytes(cast(np.ascontiguousarray(in_file_NC.T).reshape(-1), *self.cast))


@dataclass(frozen=True, slots=True, kw_only=True)
class Fp8:
    """A matrix [N, C] in block FP8: its values and its scales, each from its first byte on, or one of them."""

    copies: tuple[Copy, ...]  # that fill the matrix, from byte 0 on
    shape: tuple[int, int]
    dtype: str  # of the checkpoint
    values_at: int | None = None
    scales_at: int | None = None

    @property
    def sources(self) -> tuple[Path, ...]:
        """The files that are read."""
        return tuple(copy.source for copy in self.copies)

    def chunks(self) -> Iterator[tuple[int, memoryview]]:
        """Yield values and scales of some rows of blocks at a time."""
        matrix_NC = _gathered(self.copies, self.shape, self.dtype)
        rows, cols = self.shape
        step = max(1, BUFFER_BYTES // (4 * BLOCK * cols)) * BLOCK
        scale_row = -(-cols // BLOCK) * DTYPE_BYTES["F32"]
        for row in range(0, rows, step):
            chosen = cast(matrix_NC[row : row + step].reshape(-1), self.dtype, "F32").view(np.float32)
            values_NC, scales_PQ = encode_fp8(chosen.reshape(-1, cols))
            if self.values_at is not None:
                yield self.values_at + row * cols, _bytes(values_NC)
            if self.scales_at is not None:
                yield self.scales_at + row // BLOCK * scale_row, _bytes(scales_PQ)


def _gathered(copies: tuple[Copy, ...], shape: tuple[int, ...], dtype: str) -> Bits:
    """Return a matrix [N, C] of raw elements; a vector has one column."""
    flat = gather(copies, num_bytes=prod(shape) * DTYPE_BYTES[dtype])
    return flat.view(f"u{DTYPE_BYTES[dtype]}").reshape(shape[0], -1)


def _bytes(elements: np.ndarray) -> memoryview:
    return np.ascontiguousarray(elements).reshape(-1).view(np.uint8).data
