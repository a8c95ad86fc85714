"""Triton: statistics of a chunk of logits, and its gradient written over it.

Letters: C tokens of one chunk, V vocabulary rows of this rank.
"""

import torch
import triton
import triton.language as tl

from megaswift.kernels.linear_cross_entropy.reference import Merge

BLOCK = 2048


@triton.jit
def statistics_kernel(logits, columns, lse, target, maximum, row_stride, V, BLOCK: tl.constexpr):
    """One program a row: log-sum-exp and maximum over V columns, and the logit at the label (0 where columns is -1)."""
    row = tl.program_id(0).to(tl.int64)
    highest = tl.full((), float("-inf"), tl.float32)
    total = tl.full((), 0.0, tl.float32)
    for start in range(0, V, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        block = tl.load(logits + row * row_stride + offsets, mask=offsets < V, other=float("-inf")).to(
            tl.float32
        )
        higher = tl.maximum(highest, tl.max(block, axis=0))
        total = total * tl.exp(highest - higher) + tl.sum(tl.exp(block - higher), axis=0)
        highest = higher
    tl.store(lse + row, highest + tl.log(total))
    tl.store(maximum + row, highest)
    column = tl.load(columns + row)
    at_label = tl.load(logits + row * row_stride + column, mask=column >= 0, other=0.0)
    tl.store(target + row, at_label.to(tl.float32))


@triton.jit
def gradient_kernel(logits, columns, lse, weights, row_stride, V, BLOCK: tl.constexpr):
    """One program a row and block: logits become weight * (softmax - one_hot(label))."""
    row = tl.program_id(0).to(tl.int64)
    offsets = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < V
    pointers = logits + row * row_stride + offsets
    probability = tl.exp(tl.load(pointers, mask=inside, other=0.0).to(tl.float32) - tl.load(lse + row))
    one_hot = tl.where(offsets == tl.load(columns + row), 1.0, 0.0)
    gradient = tl.load(weights + row) * (probability - one_hot)
    tl.store(pointers, gradient.to(logits.dtype.element_ty), mask=inside)


def token_losses_(
    logits_CV: torch.Tensor, columns_C: torch.Tensor, weights_C: torch.Tensor | None, merge: Merge
) -> torch.Tensor:
    """As reference.token_losses_, in the logits' own type and without a temporary of their size."""
    tokens, vocabulary = logits_CV.shape
    lse_C = torch.empty(tokens, dtype=torch.float32, device=logits_CV.device)
    target_C, max_C = torch.empty_like(lse_C), torch.empty_like(lse_C)
    statistics_kernel[(tokens,)](
        logits_CV, columns_C, lse_C, target_C, max_C, logits_CV.stride(0), vocabulary, BLOCK=BLOCK
    )
    lse_C, target_C = merge(lse_C, target_C, max_C)
    if weights_C is not None:
        grid = (tokens, triton.cdiv(vocabulary, BLOCK))
        gradient_kernel[grid](
            logits_CV, columns_C, lse_C, weights_C, logits_CV.stride(0), vocabulary, BLOCK=BLOCK
        )
    return lse_C - target_C
