"""Triton: rotary embedding, one program for a token and a block of heads.

Letters: T packed tokens, H heads, K head size, R half of the rotary dimensions.
"""

import torch
import triton
import triton.language as tl

MAX_BLOCK_H = 16


@triton.jit
def rotate_kernel(
    x, out, cos, sin, x_stride_t, x_stride_h, H, K, R, sign,
    INTERLEAVED: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """Rotate heads of one token by its angles (sign = -1: by minus them) and copy the other dimensions."""
    token = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H))[:, None]
    frequency = tl.arange(0, BLOCK_R)[None, :]
    source = x + token * x_stride_t + head * x_stride_h
    target = out + (token * H + head) * K
    inside = (head < H) & (frequency < R)
    first_dim = frequency * 2 if INTERLEAVED else frequency
    second_dim = frequency * 2 + 1 if INTERLEAVED else frequency + R
    cosine = tl.load(cos + token * R + frequency, mask=frequency < R, other=1.0)
    sine = tl.load(sin + token * R + frequency, mask=frequency < R, other=0.0) * sign
    first = tl.load(source + first_dim, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(source + second_dim, mask=inside, other=0.0).to(tl.float32)
    tl.store(target + first_dim, (first * cosine - second * sine).to(out.dtype.element_ty), mask=inside)
    tl.store(target + second_dim, (second * cosine + first * sine).to(out.dtype.element_ty), mask=inside)
    if BLOCK_REST > 0:
        rest = 2 * R + tl.arange(0, BLOCK_REST)[None, :]
        copied = (head < H) & (rest < K)
        tl.store(target + rest, tl.load(source + rest, mask=copied), mask=copied)


def rotate(
    x_THK: torch.Tensor, cos_TR: torch.Tensor, sin_TR: torch.Tensor, *, interleaved: bool, sign: float = 1.0
) -> torch.Tensor:
    """As reference.rotate; sign -1 turns back, which is the gradient."""
    if x_THK.stride(-1) != 1:
        x_THK = x_THK.contiguous()
    tokens, heads, size = x_THK.shape
    half = cos_TR.shape[1]
    out_THK = torch.empty(x_THK.shape, dtype=x_THK.dtype, device=x_THK.device)
    block_h = min(MAX_BLOCK_H, triton.next_power_of_2(max(heads, 1)))
    rest = size - 2 * half
    grid = (tokens, triton.cdiv(heads, block_h))
    if all(grid):
        rotate_kernel[grid](
            x_THK, out_THK, cos_TR.contiguous(), sin_TR.contiguous(),
            x_THK.stride(0), x_THK.stride(1), heads, size, half, sign,
            INTERLEAVED=interleaved, BLOCK_H=block_h, BLOCK_R=triton.next_power_of_2(half),
            BLOCK_REST=triton.next_power_of_2(rest) if rest else 0,
        )  # fmt: skip
    return out_THK
