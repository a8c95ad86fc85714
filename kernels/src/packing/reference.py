"""Pack and unpack, in plain torch, with no shape that depends on data.

Letters: B documents, S padded length, T packed tokens.
"""

import torch

from megaswift.kernels.bits import as_integers, bits_of


def pack(padded_BS: torch.Tensor, cu_seqlens: torch.Tensor, *, tokens: int) -> torch.Tensor:
    """Return the tokens [T, ...] of a padded batch [B, S, ...]."""
    place_T = torch.arange(tokens, device=cu_seqlens.device)
    document_T = torch.searchsorted(cu_seqlens[1:].long(), place_T, right=True)
    return as_integers(padded_BS)[document_T, place_T - cu_seqlens[document_T]].view(padded_BS.dtype)


def unpack(packed_T: torch.Tensor, cu_seqlens: torch.Tensor, *, seq_len: int, padding: float) -> torch.Tensor:
    """Return a padded batch [B, S, ...] of packed tokens [T, ...]."""
    filler = bits_of(padding, packed_T.dtype)
    tokens, features = packed_T.shape[0], packed_T.shape[1:]
    if not tokens:
        padded_BS = as_integers(packed_T).new_full((cu_seqlens.shape[0] - 1, seq_len, *features), filler)
        return padded_BS.view(packed_T.dtype)
    position_S = torch.arange(seq_len, device=cu_seqlens.device)
    inside_BS = (position_S < cu_seqlens.diff()[:, None]).view(-1, seq_len, *[1] * len(features))
    place_BS = (cu_seqlens[:-1, None] + position_S).clamp_max(tokens - 1)
    return torch.where(inside_BS, as_integers(packed_T)[place_BS], filler).view(packed_T.dtype)
