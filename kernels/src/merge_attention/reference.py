"""Merge of two partial attentions, in plain torch.

Letters: T tokens, H heads, K head size.
"""

import torch


def merge_attention(
    out_a_THK: torch.Tensor, lse_a_TH: torch.Tensor, out_b_THK: torch.Tensor, lse_b_TH: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (out [T, H, K], lse [T, H]) over both sets of keys; where an lse is -inf, its out is not read."""
    lse_TH = torch.logaddexp(lse_a_TH, lse_b_TH)
    shares = (_share(lse_a_TH, lse_TH), _share(lse_b_TH, lse_TH))
    parts = [
        torch.where(share_TH[..., None] > 0, out_THK.float() * share_TH[..., None], 0.0)
        for out_THK, share_TH in zip((out_a_THK, out_b_THK), shares, strict=True)
    ]
    return (parts[0] + parts[1]).to(out_a_THK.dtype), lse_TH


def merge_attention_backward(
    grad_out_THK: torch.Tensor,
    grad_lse_TH: torch.Tensor,
    out_a_THK: torch.Tensor,
    lse_a_TH: torch.Tensor,
    out_b_THK: torch.Tensor,
    lse_b_TH: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of out_a, lse_a, out_b, lse_b."""
    lse_TH = torch.logaddexp(lse_a_TH, lse_b_TH)
    share_a_TH, share_b_TH = _share(lse_a_TH, lse_TH), _share(lse_b_TH, lse_TH)
    grad_THK = grad_out_THK.float()
    part_a_THK = torch.where(share_a_TH[..., None] > 0, out_a_THK.float(), 0.0)
    part_b_THK = torch.where(share_b_TH[..., None] > 0, out_b_THK.float(), 0.0)
    gain_TH = (grad_THK * (part_a_THK - part_b_THK)).sum(-1)
    return (
        (grad_THK * share_a_TH[..., None]).to(out_a_THK.dtype),
        share_a_TH * (grad_lse_TH + share_b_TH * gain_TH),
        (grad_THK * share_b_TH[..., None]).to(out_b_THK.dtype),
        share_b_TH * (grad_lse_TH - share_a_TH * gain_TH),
    )


def _share(lse_part_TH: torch.Tensor, lse_TH: torch.Tensor) -> torch.Tensor:
    return torch.where(lse_part_TH == float("-inf"), 0.0, torch.exp(lse_part_TH - lse_TH))
