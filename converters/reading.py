"""The elements of a piece of a file tensor, whatever way the file holds them: plain, transposed, in FP8 or in MXFP4. No torch."""

from pathlib import Path

import numpy as np
import numpy.typing as npt

from megaswift.converters.block_floats import BLOCK, decode_fp8, decode_mxfp4, scales_of
from megaswift.converters.check import check_files
from megaswift.converters.plan import Piece
from megaswift.converters.quantised import read_model
from megaswift.converters.stripes import Stripe
from megaswift.converters.tensor_files import Bits, Packed, TensorInfo, TensorReader
from megaswift.metadata.meta import ModelMeta

Rows = npt.NDArray[np.int64]


class FolderReader(TensorReader):
    """Reads pieces of the tensors of a Hugging Face folder."""

    def __init__(self, meta: ModelMeta, folder: Path) -> None:
        """Raises WeightsError where files and config.json do not fit together exactly."""
        super().__init__(read_model(meta, folder))
        check_files(meta, self.tensors)

    def read(self, piece: Piece) -> Bits:
        """Return what read_piece() does."""
        return read_piece(self, piece)


def read_piece(reader: TensorReader, piece: Piece) -> Bits:
    """Return the piece's elements as raw bits [runs, width, columns]: a view of the file where nothing has to be computed."""
    info = reader.tensors[piece.tensor]
    if info.packed is not None:
        decode = _mxfp4 if piece.slab is not None else _fp8
        bits = decode(reader, info.packed, piece)
        return bits.reshape(piece.rows.runs, piece.rows.width, -1)
    matrix = reader.matrix(piece.tensor) if piece.slab is None else reader.slab(piece.tensor, piece.slab)
    return bits_of(matrix, piece.rows, piece.cols)


def read_whole(reader: TensorReader, info: TensorInfo) -> Bits:
    """Return a tensor that is not packed by experts as raw bits [N, C]."""
    whole = Stripe(0, 1, info.rows, info.rows)
    return read_piece(reader, Piece(tensor=info.name, rows=whole, cols=(0, info.cols), into=whole))[0]


def bits_of(matrix_NC: Bits, stripe: Stripe, cols: tuple[int, int]) -> Bits:
    """Return the stripe's columns of a matrix of raw elements as a view [runs, width, cols]."""
    chosen = matrix_NC[stripe.start :, cols[0] : cols[1]]
    row_bytes, item_bytes = chosen.strides
    return np.lib.stride_tricks.as_strided(
        chosen,
        (stripe.runs, stripe.width, cols[1] - cols[0]),
        (stripe.pitch * row_bytes, row_bytes, item_bytes),
    )


def row_numbers(stripe: Stripe) -> Rows:
    """Return the chosen rows one by one."""
    begins = stripe.start + stripe.pitch * np.arange(stripe.runs)
    return np.add.outer(begins, np.arange(stripe.width)).reshape(-1)


def _fp8(reader: TensorReader, packed: Packed, piece: Piece) -> Bits:
    values_NC = reader.stored(packed.values)
    grid = tuple(-(-size // BLOCK) for size in values_NC.shape)
    scales = scales_of(reader.stored(packed.scales), packed.scales.dtype)
    scales_PQ = scales if scales.shape == grid else np.broadcast_to(scales.reshape(1, 1), grid)
    return np.concatenate(
        [decode_fp8(values_NC, scales_PQ, rows, piece.cols) for rows in piece.rows.intervals()]
    )


def _mxfp4(reader: TensorReader, packed: Packed, piece: Piece) -> Bits:
    assert piece.slab is not None
    _, rows, groups, half = packed.values.shape
    blocks_NGb = reader.stored(packed.values).reshape(-1, rows, groups, half)[piece.slab]
    scales_NG = reader.stored(packed.scales).reshape(-1, rows, groups)[piece.slab]
    chosen = row_numbers(piece.rows)
    return decode_mxfp4(blocks_NGb[chosen], scales_NG[chosen])[:, slice(*piece.cols)]
