"""Numbers that share a scale with their block: FP8 in squares (DeepSeek) and MXFP4 in runs of 32, as bits. No torch.

FP8 E4M3 (OCP 8-bit floating point, 1.0): sign, 4 bits of exponent with bias 7, 3 of mantissa; no infinity, NaN is all ones.
MXFP4 (OCP microscaling formats, 1.0): two E2M1 numbers a byte, the low half first, and one E8M0 scale, 2^(byte - 127), for 32.
Letters: N rows, C columns, P and Q blocks along them.
"""

from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from megaswift.converters.dtypes import cast

BLOCK = 128  # rows and columns of an FP8 weight that share a scale (DeepSeek-V3, 2412.19437, 3.3.2)
MX_BLOCK = 32
MAX_E4M3 = np.float32(448)
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)

Bytes = npt.NDArray[np.uint8]
Halves = npt.NDArray[np.uint16]  # bfloat16
Floats = npt.NDArray[np.float32]


def decode_fp8(values_NC: Bytes, scales_PQ: Floats, rows: tuple[int, int], cols: tuple[int, int]) -> Halves:
    """Return rows x cols (half-open) of a matrix as bfloat16: the product in float32, rounded once."""
    out = np.empty((rows[1] - rows[0], cols[1] - cols[0]), np.uint16)
    for p, row, row_end in _blocks(*rows):
        # A number of a block is one of 256: their products are made once.
        tables = cast((scales_PQ[p, :, None] * _e4m3()).view(np.uint32).reshape(-1), "F32", "BF16").reshape(
            -1, 256
        )
        for q, col, col_end in _blocks(*cols):
            chosen = out[row - rows[0] : row_end - rows[0], col - cols[0] : col_end - cols[0]]
            chosen[...] = tables[q][values_NC[row:row_end, col:col_end]]
    return out


def _blocks(begin: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Yield (block, first, end) of the parts into which blocks cut an interval."""
    while begin < end:
        block = begin // BLOCK
        stop = min(end, (block + 1) * BLOCK)
        yield block, begin, stop
        begin = stop


@lru_cache(maxsize=1)
def _e4m3() -> Floats:
    """Return the value of each byte."""
    code = np.arange(256)
    exponent, mantissa = code >> 3 & 15, code & 7
    size = np.where(
        exponent > 0, (8 + mantissa) * np.exp2(exponent - 10.0), mantissa * np.exp2(-9.0)
    )  # 2^(e-7) * (1 + m/8); below it m/8 * 2^-6
    value = np.where(code & 127 == 127, np.nan, size) * np.where(code >> 7, -1.0, 1.0)
    return np.asarray(value, np.float32)


def encode_fp8(matrix_NC: Floats) -> tuple[Bytes, Floats]:
    """Return values [N, C] and scales [P, Q] with matrix = values * scale, rounded to nearest even; a block of zeros has scale 1."""
    rows, cols = matrix_NC.shape
    padded = np.pad(matrix_NC, ((0, -rows % BLOCK), (0, -cols % BLOCK)))
    blocks_PaQb = padded.reshape(padded.shape[0] // BLOCK, BLOCK, -1, BLOCK)
    largest_PQ = np.nan_to_num(np.abs(blocks_PaQb), nan=0.0, posinf=np.inf).max(axis=(1, 3))
    scales_PQ = np.where(largest_PQ > 0, largest_PQ / MAX_E4M3, np.float32(1)).astype(np.float32)
    with np.errstate(invalid="ignore"):  # infinity by infinity is NaN, and stays so
        scaled = (blocks_PaQb / scales_PQ[:, None, :, None]).reshape(padded.shape)[:rows, :cols]
    return _round_to_e4m3(np.ascontiguousarray(scaled)), scales_PQ


def _round_to_e4m3(values: Floats) -> Bytes:
    """Return the nearest numbers, ties to even; what is beyond the largest becomes the largest."""
    sizes = np.minimum(np.abs(values), MAX_E4M3)
    bits = sizes.view(np.uint32)
    # The upper bits of a float32, rounded to 3 of mantissa, are the code but for the bias; a carry moves the exponent.
    normal = (
        (bits + np.uint32(0x7FFFF) + (bits >> np.uint32(20) & np.uint32(1))) >> np.uint32(20)
    ) - np.uint32((127 - 7) << 3)
    with np.errstate(invalid="ignore"):
        subnormal = np.rint(sizes * np.float32(2**9)).astype(
            np.uint32
        )  # in units of 2^-9; 8 is the first normal
    code = np.where(sizes < np.float32(2**-6), subnormal, normal)
    code = np.where(np.isnan(values), np.uint32(127), code)
    return (code | np.signbit(values).astype(np.uint32) << np.uint32(7)).astype(np.uint8)


def decode_mxfp4(blocks_NGb: Bytes, scales_NG: Bytes) -> Halves:
    """Return rows as bfloat16 [N, C] from C/32 blocks of 16 bytes and their scales; exact but for what overflows."""
    index = scales_NG[..., None].astype(np.intp) << 8 | blocks_NGb
    pairs = _mxfp4_pairs()[index]  # [N, G, 16], each two bfloat16
    return pairs.view(np.uint16).reshape(len(blocks_NGb), -1)


@lru_cache(maxsize=1)
def _mxfp4_pairs() -> npt.NDArray[np.uint32]:
    """Return the two bfloat16 numbers of each (scale, byte), the low half of the byte in the low half of the word."""
    numbers = np.array([*_E2M1, *(-value for value in _E2M1)])
    with np.errstate(over="ignore"):
        scaled = np.ldexp(numbers, np.arange(-127, 129)[:, None]).astype(np.float32)
    halves = cast(scaled.view(np.uint32).reshape(-1), "F32", "BF16").reshape(256, 16).astype(np.uint32)
    byte = np.arange(256)
    return (halves[:, byte & 15] | halves[:, byte >> 4] << np.uint32(16)).reshape(-1)


def scales_of(raw: npt.NDArray[np.unsignedinteger], dtype: str) -> Floats:
    """Return scales as float32; U8 and F8_E8M0 are exponents."""
    if dtype in ("U8", "F8_E8M0"):
        return np.exp2(raw.astype(np.float32) - 127)
    return cast(raw.reshape(-1), dtype, "F32").view(np.float32).reshape(raw.shape)
