"""Weights straight into this rank's parameters: each rank reads the slices of files that it owns and nothing else."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from megaswift.converters.check import SCORE, tied_twin
from megaswift.converters.dcp_pieces import CheckpointReader, McoreCheckpoint
from megaswift.converters.live import TORCH_DTYPES, as_matrix, live_parameters, rows_of
from megaswift.converters.plan import EMBEDDING, Piece
from megaswift.converters.quantised import files_of
from megaswift.converters.reading import FolderReader
from megaswift.converters.tensor_files import TensorInfo, TensorReader
from megaswift.errors import WeightsError
from megaswift.metadata.meta import ModelMeta
from megaswift.parallel.layout import Layout

COMPARED_ROWS = 4096  # rows of two tied tensors that are compared at a time: a few megabytes


@dataclass(frozen=True, kw_only=True)
class LoadReport:
    """What one rank read."""

    bytes_read: int
    tensors: int
    seconds: float


def load_weights(
    chunks: Sequence[torch.nn.Module],
    meta: ModelMeta,
    layout: Layout,
    rank: int,
    source: Path | str | McoreCheckpoint,
) -> LoadReport:
    """Fill the parameters of this rank's chunks from a folder's safetensors or a checkpoint, cast to the parameters' own dtype.

    Adapter parameters (lora_a, lora_b) are left alone, and so is a head for scores that the files lack. No rank
    talks to another. Raises WeightsError or CheckpointError, before anything is filled, where files, config.json and model do not
    fit together exactly.
    """
    started = time.monotonic()
    reader: FolderReader | CheckpointReader
    if isinstance(source, McoreCheckpoint):
        reader = CheckpointReader(meta, source)
    else:
        reader = FolderReader(meta, Path(source))
    live = live_parameters(chunks, meta, layout, rank=rank)
    bytes_read, names = 0, set()
    with reader, torch.no_grad():
        for parameter in live:
            planned = parameter.planned
            if planned.tensors == (SCORE,) and SCORE not in reader.tensors:
                continue  # a new head: it stays as it was built
            if planned.name == EMBEDDING and isinstance(reader, FolderReader):
                _check_twin(reader, meta, planned.pieces)
            matrix_NC = as_matrix(parameter.weight)
            if planned.free:
                matrix_NC.zero_()
            for piece in planned.pieces:
                _fill(matrix_NC, piece, reader)
                bytes_read += _bytes_in_file(reader.tensors[piece.tensor], piece)
                names.add(piece.tensor)
            parameter.settle()
    return LoadReport(bytes_read=bytes_read, tensors=len(names), seconds=time.monotonic() - started)


def _bytes_in_file(info: TensorInfo, piece: Piece) -> int:
    """Return what a piece takes of the file; a packed tensor's scales are shared, and counted by its share of the elements."""
    return sum(part.num_bytes for part in files_of(info)) * piece.size // (info.rows * info.cols)


def _fill(matrix_NC: torch.Tensor, piece: Piece, reader: FolderReader | CheckpointReader) -> None:
    source = torch.from_numpy(reader.read(piece))
    target = rows_of(matrix_NC[:, : piece.cols[1] - piece.cols[0]], piece.into)
    target.copy_(source.view(TORCH_DTYPES[reader.tensors[piece.tensor].dtype]).reshape(target.shape))


def _check_twin(reader: TensorReader, meta: ModelMeta, pieces: Sequence[Piece]) -> None:
    """Raise WeightsError where a model that ties its embeddings has a file with two different ones."""
    twin = tied_twin(meta)
    if twin is None or twin[1] not in reader.tensors:
        return
    embedding, output = (reader.matrix(name) for name in twin)
    for piece in pieces:
        for begin, end in piece.rows.intervals():
            for row in range(begin, end, COMPARED_ROWS):
                chosen = slice(row, min(row + COMPARED_ROWS, end))
                if not np.array_equal(embedding[chosen], output[chosen]):
                    raise WeightsError(
                        f"tie_word_embeddings=true in config.json, but {twin[0]} and {twin[1]} differ near row {row}. "
                        "Set tie_word_embeddings to false to keep both, or remove one tensor."
                    )
