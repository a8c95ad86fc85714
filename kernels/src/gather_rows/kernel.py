"""Triton: gather and scatter of rows.

Letters: T rows of the source, C rows chosen, F features of a row.
"""

import math

import torch
import triton
import triton.language as tl

from megaswift.kernels.bits import as_integers, bits_of

BLOCK_C = 8
MAX_BLOCK_F = 256


@triton.jit
def gather_kernel(source, chosen, index, filler, C, F, BLOCK_C: tl.constexpr, BLOCK_F: tl.constexpr):
    """Copy a block of chosen rows; the filler where the index is negative."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    feature = (tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F))[None, :]
    origin = tl.load(index + row, mask=row < C, other=-1).to(tl.int64)[:, None]
    values = tl.load(source + origin * F + feature, mask=(origin >= 0) & (feature < F))
    fillers = tl.full((BLOCK_C, BLOCK_F), 0, chosen.dtype.element_ty) + filler.to(chosen.dtype.element_ty)
    tl.store(
        chosen + row[:, None] * F + feature,
        tl.where(origin >= 0, values, fillers),
        mask=(row[:, None] < C) & (feature < F),
    )


@triton.jit
def scatter_kernel(chosen, source, index, C, F, BLOCK_C: tl.constexpr, BLOCK_F: tl.constexpr):
    """Copy a block of chosen rows back to where they came from."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    feature = (tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F))[None, :]
    origin = tl.load(index + row, mask=row < C, other=-1).to(tl.int64)[:, None]
    present = (origin >= 0) & (feature < F)
    tl.store(
        source + origin * F + feature,
        tl.load(chosen + row[:, None] * F + feature, mask=present),
        mask=present,
    )


def gather_rows(source_T: torch.Tensor, index_C: torch.Tensor, *, fill: float) -> torch.Tensor:
    """As reference.gather_rows."""
    source_T = source_T.contiguous()
    chosen_C = source_T.new_empty(index_C.shape[0], *source_T.shape[1:])
    _launch(
        gather_kernel,
        chosen_C,
        (as_integers(source_T), as_integers(chosen_C), index_C, bits_of(fill, source_T.dtype)),
    )
    return chosen_C


def scatter_rows(chosen_C: torch.Tensor, index_C: torch.Tensor, *, rows: int) -> torch.Tensor:
    """As reference.scatter_rows."""
    chosen_C = chosen_C.contiguous()
    source_T = torch.zeros(rows, *chosen_C.shape[1:], dtype=chosen_C.dtype, device=chosen_C.device)
    _launch(scatter_kernel, chosen_C, (as_integers(chosen_C), as_integers(source_T), index_C))
    return source_T


def _launch(kernel: triton.JITFunction, chosen_C: torch.Tensor, arguments: tuple) -> None:
    rows, features = chosen_C.shape[0], math.prod(chosen_C.shape[1:])
    block_f = min(MAX_BLOCK_F, triton.next_power_of_2(max(features, 1)))
    grid = (triton.cdiv(rows, BLOCK_C), triton.cdiv(features, block_f))
    if all(grid):
        kernel[grid](*arguments, rows, features, BLOCK_C=BLOCK_C, BLOCK_F=block_f)
