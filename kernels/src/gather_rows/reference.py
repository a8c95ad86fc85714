"""Gather and scatter of rows, in plain torch, on the bits of any dtype; no shape depends on data.

Letters: T rows of the source, C rows chosen.
"""

import torch

from megaswift.kernels.bits import as_integers, bits_of


def gather_rows(source_T: torch.Tensor, index_C: torch.Tensor, *, fill: float) -> torch.Tensor:
    """Return source[index], `fill` where the index is -1."""
    filler = bits_of(fill, source_T.dtype)
    bits_T = as_integers(source_T)
    if not source_T.shape[0]:
        return bits_T.new_full((index_C.shape[0], *source_T.shape[1:]), filler).view(source_T.dtype)
    absent_C = (index_C < 0).view(-1, *[1] * (source_T.dim() - 1))
    return torch.where(absent_C, filler, bits_T[index_C.clamp_min(0)]).view(source_T.dtype)


def scatter_rows(chosen_C: torch.Tensor, index_C: torch.Tensor, *, rows: int) -> torch.Tensor:
    """Return zeros [rows, ...] with row index[c] set to chosen[c]; -1 is left out."""
    bits_C = as_integers(chosen_C)
    bits_T = bits_C.new_zeros(rows + 1, *chosen_C.shape[1:])  # one more, for what is left out
    bits_T[torch.where(index_C < 0, rows, index_C)] = bits_C
    return bits_T[:rows].view(chosen_C.dtype)
