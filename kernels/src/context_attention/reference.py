"""Attention of packed documents by its definition, with every score in memory.

Letters: T packed tokens, H query heads, G key/value heads, K head size.
"""

import torch

from megaswift.kernels.context_attention.segments import Pattern


def attention(
    query_THK: torch.Tensor,
    key_TGK: torch.Tensor,
    value_TGK: torch.Tensor,
    lengths: list[int],
    pattern: Pattern,
    sinks_H: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the output [T, H, K of value] of documents that lie one behind another, in the inputs' dtype."""
    heads, groups = query_THK.shape[1], key_TGK.shape[1]
    document_T = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths, dtype=torch.int64))
    distance_TT = torch.arange(len(document_T))[:, None] - torch.arange(len(document_T))
    hidden_TT = document_T[:, None] != document_T
    if pattern.causal:
        hidden_TT = hidden_TT | (distance_TT < 0)
    if pattern.window is not None:
        hidden_TT = hidden_TT | (distance_TT >= pattern.window)
    key_THK = key_TGK.repeat_interleave(heads // groups, dim=1)
    value_THK = value_TGK.repeat_interleave(heads // groups, dim=1)
    scores_HTT = torch.einsum("thk,shk->hts", query_THK, key_THK) * pattern.scale
    scores_HTT = scores_HTT.masked_fill(hidden_TT, float("-inf"))
    if sinks_H is not None:  # a key without a value
        column_HT1 = sinks_H.to(scores_HTT.dtype)[:, None, None].expand(-1, scores_HTT.shape[1], 1)
        scores_HTT = torch.cat([scores_HTT, column_HT1], dim=-1)
    shares_HTT = scores_HTT.softmax(-1)[..., : len(document_T)]
    return torch.einsum("hts,shk->thk", shares_HTT, value_THK)
