"""The elements of a piece of a file tensor, whatever way the file holds them: plain, transposed, in FP8 or in MXFP4. No torch."""

import numpy as np

from megaswift.converters.block_floats import BLOCK, decode_fp8, decode_mxfp4, scales_of
from megaswift.converters.plan import Piece
from megaswift.converters.stripes import Stripe
from megaswift.converters.tensor_files import Bits, Packed, TensorInfo, TensorReader


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
    stripe = piece.rows
    chosen = np.add.outer(
        stripe.start + stripe.pitch * np.arange(stripe.runs), np.arange(stripe.width)
    ).reshape(-1)
    return decode_mxfp4(blocks_NGb[chosen], scales_NG[chosen])[:, slice(*piece.cols)]
