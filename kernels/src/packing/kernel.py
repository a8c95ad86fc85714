"""Triton: pack and unpack, one program for a block of positions and features of one document.

Letters: B documents, S padded length, T packed tokens, F features of a token.
"""

import math

import torch
import triton
import triton.language as tl

from megaswift.kernels.bits import as_integers, bits_of

BLOCK_S = 8
MAX_BLOCK_F = 256


@triton.jit
def pack_kernel(padded, packed, cu_seqlens, S, F, BLOCK_S: tl.constexpr, BLOCK_F: tl.constexpr):
    """Copy the real tokens of document program_id(0)."""
    document = tl.program_id(0).to(tl.int64)
    start, stop = tl.load(cu_seqlens + document).to(tl.int64), tl.load(cu_seqlens + document + 1)
    first = tl.program_id(1) * BLOCK_S
    step = tl.arange(0, BLOCK_S)[:, None]
    feature = (tl.program_id(2) * BLOCK_F + tl.arange(0, BLOCK_F))[None, :]
    real = (first + step < stop - start) & (feature < F)
    place = step * F + feature  # within the tile: 32 bits are enough, and half the registers
    values = tl.load(padded + (document * S + first) * F + place, mask=real)
    tl.store(packed + (start + first) * F + place, values, mask=real)


@triton.jit
def unpack_kernel(packed, padded, cu_seqlens, padding, S, F, BLOCK_S: tl.constexpr, BLOCK_F: tl.constexpr):
    """Copy the real tokens of document program_id(0) and fill the rest of its row."""
    document = tl.program_id(0).to(tl.int64)
    start, stop = tl.load(cu_seqlens + document).to(tl.int64), tl.load(cu_seqlens + document + 1)
    first = tl.program_id(1) * BLOCK_S
    step = tl.arange(0, BLOCK_S)[:, None]
    feature = (tl.program_id(2) * BLOCK_F + tl.arange(0, BLOCK_F))[None, :]
    real = (first + step < stop - start) & (feature < F)
    place = step * F + feature  # within the tile: 32 bits are enough, and half the registers
    filler = tl.full((BLOCK_S, BLOCK_F), 0, padded.dtype.element_ty) + padding.to(padded.dtype.element_ty)
    values = tl.where(real, tl.load(packed + (start + first) * F + place, mask=real), filler)
    tl.store(padded + (document * S + first) * F + place, values, mask=(first + step < S) & (feature < F))


def pack(padded_BS: torch.Tensor, cu_seqlens: torch.Tensor, *, tokens: int) -> torch.Tensor:
    """As reference.pack."""
    padded_BS = padded_BS.contiguous()
    packed_T = padded_BS.new_empty(tokens, *padded_BS.shape[2:])
    _launch(pack_kernel, padded_BS, (as_integers(padded_BS), as_integers(packed_T), cu_seqlens))
    return packed_T


def unpack(packed_T: torch.Tensor, cu_seqlens: torch.Tensor, *, seq_len: int, padding: float) -> torch.Tensor:
    """As reference.unpack."""
    packed_T = packed_T.contiguous()
    padded_BS = packed_T.new_empty(cu_seqlens.shape[0] - 1, seq_len, *packed_T.shape[1:])
    filler = bits_of(padding, packed_T.dtype)
    _launch(unpack_kernel, padded_BS, (as_integers(packed_T), as_integers(padded_BS), cu_seqlens, filler))
    return padded_BS


def _launch(kernel: triton.JITFunction, padded_BS: torch.Tensor, arguments: tuple) -> None:
    documents, seq_len = padded_BS.shape[:2]
    features = math.prod(padded_BS.shape[2:])
    block_f = min(MAX_BLOCK_F, triton.next_power_of_2(max(features, 1)))
    grid = (documents, triton.cdiv(seq_len, BLOCK_S), triton.cdiv(features, block_f))
    if all(grid):
        kernel[grid](*arguments, seq_len, features, BLOCK_S=BLOCK_S, BLOCK_F=block_f)
