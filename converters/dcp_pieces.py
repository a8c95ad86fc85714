"""Pieces of a model's tensors read from a torch_dist checkpoint, whatever layout wrote it. No torch.

A piece is rows of a tensor as Hugging Face's file has it. The plan of the whole model says which rows of which stored parameter
these are, and .metadata which boxes of which files hold them: a rank reads those alone.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megaswift.converters.dcp_model import StoredParameter, find_checkpoint, stored_parameters
from megaswift.converters.dcp_reader import Box, DataFinder, boxes_of, incomplete
from megaswift.converters.plan import Piece, file_tensors
from megaswift.converters.reading import Rows, row_numbers
from megaswift.converters.tensor_files import DTYPE_BYTES, Bits, TensorInfo, TensorReader
from megaswift.errors import CheckpointError
from megaswift.metadata.meta import ModelMeta


@dataclass(frozen=True, kw_only=True)
class McoreCheckpoint:
    """A Megatron-Core checkpoint as the source of weights: the folder with .metadata, or one above it."""

    folder: Path


class CheckpointReader:
    """Reads pieces of a model's tensors, as if the checkpoint were its folder."""

    def __init__(self, meta: ModelMeta, checkpoint: McoreCheckpoint) -> None:
        """Raises CheckpointError where checkpoint and config.json do not fit together exactly."""
        folder, shapes = find_checkpoint(checkpoint.folder), file_tensors(meta)
        self.tensors: dict[str, TensorInfo] = {}
        self._held: dict[tuple[str, int | None], list[tuple[Piece, StoredParameter]]] = defaultdict(list)
        for stored in stored_parameters(meta, folder):
            for whole in stored.parameter.pieces:
                self._held[whole.tensor, whole.slab].append((whole, stored))
                info = TensorInfo(
                    name=whole.tensor,
                    dtype=stored.tensor.dtype,
                    shape=shapes[whole.tensor],
                    file=folder,
                    begin=0,
                )
                if self.tensors.setdefault(whole.tensor, info) != info:
                    raise CheckpointError(
                        f"{folder} holds {whole.tensor} partly in {info.dtype} and partly in {self.tensors[whole.tensor].dtype}. "
                        "Convert it with one --torch_dtype."
                    )
        self._finder, self._boxes = DataFinder(folder), TensorReader({})

    def __enter__(self) -> "CheckpointReader":
        return self

    def __exit__(self, *_: object) -> None:
        self._boxes.__exit__(None, None, None)

    def read(self, piece: Piece) -> Bits:
        """Return the piece's elements as raw bits [runs, width, columns]: a view of a file where it lies there in one box."""
        wanted = row_numbers(piece.rows)
        shape = (piece.rows.runs, piece.rows.width, piece.cols[1] - piece.cols[0])
        out, found = None, 0
        for whole, stored in self._held[piece.tensor, piece.slab]:
            if whole.rows.end <= piece.rows.start or piece.rows.end <= whole.rows.start:
                continue
            for rows, first_col, values in self._parts(whole, stored, piece, wanted):
                found += values.size
                if values.size == piece.size:
                    return np.require(values, requirements="A").reshape(
                        shape
                    )  # torch.save aligns nothing here
                out = np.empty((len(wanted), shape[2]), values.dtype) if out is None else out
                out[rows, first_col : first_col + values.shape[1]] = values
        if out is None or found != piece.size:
            raise incomplete(self._held[piece.tensor, piece.slab][0][1], piece, found)
        return out.reshape(shape)

    def _parts(
        self, whole: Piece, stored: StoredParameter, piece: Piece, wanted: Rows
    ) -> Iterator[tuple[slice | Rows, int, Bits]]:
        """Yield (rows of the piece, its first column, elements) of what each box of a parameter holds of a piece."""
        held = row_numbers(whole.rows)  # of the file's tensor, in the order of the parameter's rows
        places = np.minimum(np.searchsorted(held, wanted), len(held) - 1)
        here = np.flatnonzero(held[places] == wanted)
        parameter_rows = row_numbers(whole.into)[places[here]]
        for box in boxes_of(stored):
            low, high = max(piece.cols[0], box.first_col), min(piece.cols[1], box.first_col + box.cols)
            rows = parameter_rows - box.first_row
            inside = np.flatnonzero((rows >= 0) & (rows < box.rows))
            if len(inside) and low < high:
                matrix = self._matrix(box, stored)[:, low - box.first_col : high - box.first_col]
                yield _run(here[inside]), low - piece.cols[0], matrix[_run(rows[inside])]

    def _matrix(self, box: Box, stored: StoredParameter) -> Bits:
        """Return the elements of a box, a view of its file."""
        dtype = stored.tensor.dtype
        begin = self._finder.begin(box.item, num_bytes=box.rows * box.cols * DTYPE_BYTES[dtype])
        file = self._finder.checkpoint / box.item.file
        shape = (box.rows, box.cols)
        return self._boxes.stored(
            TensorInfo(name=stored.address.key, dtype=dtype, shape=shape, file=file, begin=begin)
        )


def _run(rows: Rows) -> slice | Rows:
    """Return ascending rows as a slice where they follow each other, which copies nothing."""
    first, last = int(rows[0]), int(rows[-1])
    return slice(first, last + 1) if last - first == len(rows) - 1 else rows
