"""Triton: merge of two partial attentions, one program for a block of (token, head) rows.

Letters: T tokens, H heads, K head size, M = T * H rows.
"""

import torch
import triton
import triton.language as tl

BLOCK_M = 16


@triton.jit
def _share(lse_part, lse):
    seen = lse_part > float("-inf")
    return tl.where(seen, tl.exp(tl.where(seen, lse_part, 0.0) - tl.where(seen, lse, 0.0)), 0.0)


@triton.jit
def _merged_lse(a, b):
    highest = tl.maximum(a, b)
    anchor = tl.where(highest == float("-inf"), 0.0, highest)
    total = tl.exp(a - anchor) + tl.exp(b - anchor)
    return tl.where(total > 0, anchor + tl.log(tl.where(total > 0, total, 1.0)), float("-inf"))


@triton.jit
def merge_kernel(out_a, lse_a, out_b, lse_b, out, lse, M, K, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """Write the merged rows and their log-sum-exp."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    dim = tl.arange(0, BLOCK_K)[None, :]
    a = tl.load(lse_a + row, mask=row < M, other=0.0)
    b = tl.load(lse_b + row, mask=row < M, other=0.0)
    both = _merged_lse(a, b)
    share_a, share_b = _share(a, both)[:, None], _share(b, both)[:, None]
    inside = (row[:, None] < M) & (dim < K)
    place = row[:, None] * K + dim
    part_a = tl.load(out_a + place, mask=inside & (share_a > 0), other=0.0).to(tl.float32)
    part_b = tl.load(out_b + place, mask=inside & (share_b > 0), other=0.0).to(tl.float32)
    tl.store(out + place, (part_a * share_a + part_b * share_b).to(out.dtype.element_ty), mask=inside)
    tl.store(lse + row, both, mask=row < M)


@triton.jit
def merge_backward_kernel(
    grad_out, grad_lse, out_a, lse_a, out_b, lse_b, grad_out_a, grad_lse_a, grad_out_b, grad_lse_b, M, K,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Write the gradients of both parts."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    dim = tl.arange(0, BLOCK_K)[None, :]
    a = tl.load(lse_a + row, mask=row < M, other=0.0)
    b = tl.load(lse_b + row, mask=row < M, other=0.0)
    both = _merged_lse(a, b)
    share_a, share_b = _share(a, both), _share(b, both)
    inside = (row[:, None] < M) & (dim < K)
    place = row[:, None] * K + dim
    part_a = tl.load(out_a + place, mask=inside & (share_a[:, None] > 0), other=0.0).to(tl.float32)
    part_b = tl.load(out_b + place, mask=inside & (share_b[:, None] > 0), other=0.0).to(tl.float32)
    grad = tl.load(grad_out + place, mask=inside, other=0.0).to(tl.float32)
    grad_both = tl.load(grad_lse + row, mask=row < M, other=0.0)
    gain = tl.sum(grad * (part_a - part_b), axis=1)
    tl.store(grad_out_a + place, (grad * share_a[:, None]).to(grad_out_a.dtype.element_ty), mask=inside)
    tl.store(grad_out_b + place, (grad * share_b[:, None]).to(grad_out_b.dtype.element_ty), mask=inside)
    tl.store(grad_lse_a + row, share_a * (grad_both + share_b * gain), mask=row < M)
    tl.store(grad_lse_b + row, share_b * (grad_both - share_a * gain), mask=row < M)


def merge_attention(
    out_a_THK: torch.Tensor, lse_a_TH: torch.Tensor, out_b_THK: torch.Tensor, lse_b_TH: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """As reference.merge_attention."""
    out_THK = torch.empty(out_a_THK.shape, dtype=out_a_THK.dtype, device=out_a_THK.device)
    lse_TH = torch.empty(lse_a_TH.shape, dtype=torch.float32, device=lse_a_TH.device)
    parts = [part.contiguous() for part in (out_a_THK, lse_a_TH, out_b_THK, lse_b_TH)]
    _launch(merge_kernel, (*parts, out_THK, lse_TH), lse_TH.numel(), out_THK.shape[-1])
    return out_THK, lse_TH


def merge_attention_backward(
    grad_out_THK: torch.Tensor,
    grad_lse_TH: torch.Tensor,
    out_a_THK: torch.Tensor,
    lse_a_TH: torch.Tensor,
    out_b_THK: torch.Tensor,
    lse_b_TH: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """As reference.merge_attention_backward."""
    inputs = tuple(
        x.contiguous() for x in (grad_out_THK, grad_lse_TH, out_a_THK, lse_a_TH, out_b_THK, lse_b_TH)
    )
    grads = tuple(torch.empty_like(part) for part in inputs[2:])
    _launch(merge_backward_kernel, (*inputs, *grads), lse_a_TH.numel(), out_a_THK.shape[-1])
    return grads


def _launch(kernel: triton.JITFunction, tensors: tuple[torch.Tensor, ...], rows: int, head_size: int) -> None:
    if rows:
        kernel[(triton.cdiv(rows, BLOCK_M),)](
            *tensors, rows, head_size, BLOCK_M=BLOCK_M, BLOCK_K=triton.next_power_of_2(head_size)
        )
