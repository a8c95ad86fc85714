"""Triton: block FP8, by the conversion instructions of sm_89 and newer, before them by integer arithmetic.

Letters: M rows, N columns, P and Q blocks along them.
"""

from typing import Any

import torch
import triton
import triton.language as tl

ROWS_PER_PROGRAM = 32  # where every row has its own scale
NUM_WARPS = {128: 16, ROWS_PER_PROGRAM: 8}  # by rows of a tile; fewer would spill registers
# mantissa bits, exponent bias, largest value (OCP 8-bit floating point specification, 1.0)
FORMATS = {torch.float8_e4m3fn: (3, 7, 448.0), torch.float8_e5m2: (2, 15, 57344.0)}


TINY = tl.constexpr(torch.finfo(torch.float32).tiny)  # the smallest normal scale: 0 / 0 would be NaN


@triton.jit
def _encode(x, MANTISSA: tl.constexpr, BIAS: tl.constexpr):
    """Return the code of float32 x, already clamped, rounded to nearest even."""
    bits = x.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    SHIFT: tl.constexpr = 23 - MANTISSA
    rounded = magnitude + ((1 << (SHIFT - 1)) - 1) + ((magnitude >> SHIFT) & 1)
    normal = (rounded >> SHIFT) - ((127 - BIAS) << MANTISSA)
    # Below the smallest normal number: whole steps, rounded by adding 2^23, whose last bit is worth 1.
    steps = magnitude.to(tl.float32, bitcast=True) * (1 << (BIAS - 1 + MANTISSA)) + 8388608.0
    subnormal = steps.to(tl.int32, bitcast=True) & 0x7FFFFF
    code = tl.where(magnitude < ((128 - BIAS) << 23), subnormal, normal)
    code = tl.where(x != x, 0x7F, code)
    return (((bits >> 24) & 0x80) | code).to(tl.uint8)


@triton.jit
def _decode(code, MANTISSA: tl.constexpr, BIAS: tl.constexpr):
    """Return the float32 value of a code."""
    magnitude = code.to(tl.int32) & 0x7F
    normal = ((magnitude << (23 - MANTISSA)) + ((127 - BIAS) << 23)).to(tl.float32, bitcast=True)
    subnormal = magnitude.to(tl.float32) * (1.0 / (1 << (BIAS - 1 + MANTISSA)))
    value = tl.where(magnitude < (1 << MANTISSA), subnormal, normal)
    if MANTISSA == 3:
        value = tl.where(magnitude == 0x7F, float("nan"), value)
    else:
        value = tl.where(magnitude == 0x7C, float("inf"), tl.where(magnitude > 0x7C, float("nan"), value))
    return tl.where(code.to(tl.int32) > 0x7F, -value, value)


@triton.jit
def quantise_kernel(
    x, values, scales, M, N, Q,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, ONE_SCALE: tl.constexpr, MANTISSA: tl.constexpr,
    BIAS: tl.constexpr, LARGEST: tl.constexpr, POWER_OF_TWO: tl.constexpr, CONVERT: tl.constexpr,
):  # fmt: skip
    """Quantise a tile of ROWS x COLUMNS with one scale, or with one a row."""
    first = tl.program_id(0).to(tl.int64) * ROWS
    step = tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = (step[:, None] < M - first) & (column < N)
    place = step[:, None] * N + column  # within the tile: 32 bits are enough, and half the registers
    tile = tl.load(x + first * N + place, mask=inside, other=0.0).to(tl.float32)
    magnitudes = tl.where(tile != tile, 0.0, tl.abs(tile))
    amax = tl.max(magnitudes, axis=1)
    if ONE_SCALE:
        amax = tl.zeros((ROWS,), tl.float32) + tl.max(amax, axis=0)
    scale = tl.div_rn(amax, tl.zeros((ROWS,), tl.float32) + LARGEST)
    scale = tl.where(amax > 0, tl.maximum(scale, TINY), 1.0)
    if POWER_OF_TWO:
        scale = ((scale.to(tl.int32, bitcast=True) + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)
    scaled = tl.div_rn(tile, tl.broadcast_to(scale[:, None], (ROWS, COLUMNS)))
    clamped = tl.where(scaled > LARGEST, LARGEST, tl.where(scaled < -LARGEST, -LARGEST, scaled))
    if CONVERT:
        code = clamped.to(tl.float8e4nv if MANTISSA == 3 else tl.float8e5).to(tl.uint8, bitcast=True)
    else:
        code = _encode(clamped, MANTISSA, BIAS)
    tl.store(values + first * N + place, code, mask=inside)
    if ONE_SCALE:
        tl.store(
            scales + tl.program_id(0).to(tl.int64) * Q + tl.program_id(1) + step * 0, scale, mask=step == 0
        )
    else:
        tl.store(scales + first * Q + tl.program_id(1) + step * Q, scale, mask=step < M - first)


@triton.jit
def dequantise_kernel(
    values, scales, out, M, N, Q,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, ONE_SCALE: tl.constexpr, MANTISSA: tl.constexpr,
    BIAS: tl.constexpr, CONVERT: tl.constexpr,
):  # fmt: skip
    """Write values * scale of a tile of ROWS x COLUMNS."""
    first = tl.program_id(0).to(tl.int64) * ROWS
    step = tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = (step[:, None] < M - first) & (column < N)
    place = step[:, None] * N + column  # within the tile: 32 bits are enough, and half the registers
    code = tl.load(values + first * N + place, mask=inside, other=0)
    if CONVERT:
        value = code.to(tl.float8e4nv if MANTISSA == 3 else tl.float8e5, bitcast=True).to(tl.float32)
    else:
        value = _decode(code, MANTISSA, BIAS)
    if ONE_SCALE:
        scale = tl.zeros((ROWS,), tl.float32) + tl.load(
            scales + tl.program_id(0).to(tl.int64) * Q + tl.program_id(1)
        )
    else:
        scale = tl.load(scales + first * Q + tl.program_id(1) + step * Q, mask=step < M - first, other=0.0)
    tl.store(out + first * N + place, (value * scale[:, None]).to(out.dtype.element_ty), mask=inside)


def quantise(
    x_MN: torch.Tensor, *, block_rows: int, block_columns: int, dtype: torch.dtype, power_of_two: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """As reference.quantise."""
    x_MN = x_MN.contiguous()
    rows, columns = x_MN.shape
    values_MN = torch.empty(x_MN.shape, dtype=dtype, device=x_MN.device)
    shape_PQ = (triton.cdiv(rows, block_rows), triton.cdiv(columns, block_columns))
    scales_PQ = torch.empty(shape_PQ, dtype=torch.float32, device=x_MN.device)
    tile = _tile(block_rows, block_columns, dtype, x_MN.device)
    if x_MN.numel():
        quantise_kernel[(triton.cdiv(rows, tile["ROWS"]), shape_PQ[1])](
            x_MN, values_MN.view(torch.uint8), scales_PQ, rows, columns, shape_PQ[1],
            LARGEST=FORMATS[dtype][2], POWER_OF_TWO=power_of_two, num_warps=NUM_WARPS[tile["ROWS"]], **tile,
        )  # fmt: skip
    return values_MN, scales_PQ


def dequantise(
    values_MN: torch.Tensor,
    scales_PQ: torch.Tensor,
    *,
    block_rows: int,
    block_columns: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """As reference.dequantise."""
    values_MN, scales_PQ = values_MN.contiguous(), scales_PQ.contiguous()
    rows, columns = values_MN.shape
    out_MN = torch.empty(values_MN.shape, dtype=dtype, device=values_MN.device)
    tile = _tile(block_rows, block_columns, values_MN.dtype, values_MN.device)
    if values_MN.numel():
        dequantise_kernel[(triton.cdiv(rows, tile["ROWS"]), scales_PQ.shape[1])](
            values_MN.view(torch.uint8),
            scales_PQ,
            out_MN,
            rows,
            columns,
            scales_PQ.shape[1],
            num_warps=NUM_WARPS[tile["ROWS"]],
            **tile,
        )
    return out_MN


def _tile(block_rows: int, block_columns: int, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    mantissa, bias, _ = FORMATS[dtype]
    return {
        "ROWS": ROWS_PER_PROGRAM if block_rows == 1 else block_rows,
        "COLUMNS": block_columns,
        "ONE_SCALE": block_rows != 1,
        "MANTISSA": mantissa,
        "BIAS": bias,
        "CONVERT": device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9),
    }
