"""Attention over two sets of keys from attention over each, forward and backward.

Letters: T tokens, H heads, K head size.
"""

from typing import Any

import torch

from megaswift.kernels.dispatch import Implementation, choose
from megaswift.kernels.merge_attention import reference


def merge_attention(
    out_a_THK: torch.Tensor,
    lse_a_TH: torch.Tensor,
    out_b_THK: torch.Tensor,
    lse_b_TH: torch.Tensor,
    *,
    implementation: Implementation | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (out [T, H, K], lse [T, H]) of attention over the keys of a and of b together.

    out: any floating type, added in float32; lse: float32 natural log-sum-exp of the scores, -inf where a
    part saw no key (its out is then not read and may hold anything). Where neither saw a key, out is 0 and
    lse -inf.
    """
    chosen = choose("merge_attention", out_a_THK.device, implementation)
    return _MergeAttention.apply(out_a_THK, lse_a_TH, out_b_THK, lse_b_TH, chosen)


class _MergeAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        out_a_THK: torch.Tensor,
        lse_a_TH: torch.Tensor,
        out_b_THK: torch.Tensor,
        lse_b_TH: torch.Tensor,
        chosen: Implementation,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if chosen is Implementation.TRITON:
            from megaswift.kernels.merge_attention import kernel  # here, because triton may be absent

            merged = kernel.merge_attention(out_a_THK, lse_a_TH, out_b_THK, lse_b_TH)
        else:
            merged = reference.merge_attention(out_a_THK, lse_a_TH, out_b_THK, lse_b_TH)
        ctx.save_for_backward(out_a_THK, lse_a_TH, out_b_THK, lse_b_TH)
        ctx.chosen = chosen
        return merged

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if ctx.chosen is Implementation.TRITON:
            from megaswift.kernels.merge_attention import kernel  # here, because triton may be absent

            return *kernel.merge_attention_backward(grads[0], grads[1], *ctx.saved_tensors), None
        return *reference.merge_attention_backward(grads[0], grads[1], *ctx.saved_tensors), None
