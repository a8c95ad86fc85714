"""Offsets, positions and loss weights from lengths, in plain torch.

Letters: N documents, T packed tokens.
"""

import torch


def cu_seqlens(lengths_N: torch.Tensor) -> torch.Tensor:
    """Return offsets [N + 1], int32."""
    return torch.nn.functional.pad(lengths_N.cumsum(0, dtype=torch.int32), (1, 0))


def positions_and_weights(
    offsets: torch.Tensor, prompt_lengths_N: torch.Tensor, weights_N: torch.Tensor, *, tokens: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return position ids [T], int64, and loss weights [T], float32; behind the last document: from 0, and 0."""
    lengths_N = offsets.diff().long()
    document_T = torch.repeat_interleave(torch.arange(lengths_N.shape[0], device=offsets.device), lengths_N)
    real = document_T.shape[0]
    positions_T = torch.arange(tokens, device=offsets.device)
    positions_T[:real] -= offsets[document_T]
    positions_T[real:] -= real
    weights_T = torch.zeros(tokens, dtype=torch.float32, device=offsets.device)
    place_T = positions_T[:real]
    carries_T = (place_T >= prompt_lengths_N[document_T] - 1) & (place_T < lengths_N[document_T] - 1)
    weights_T[:real] = torch.where(carries_T, weights_N[document_T], 0.0)
    return positions_T, weights_T
