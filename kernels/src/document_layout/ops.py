"""Offsets, positions and loss weights of packed documents, from their lengths.

Letters: N documents, T packed tokens.
"""

from dataclasses import dataclass

import torch

from megaswift.kernels.dispatch import Implementation, choose
from megaswift.kernels.document_layout import reference


@dataclass(frozen=True, kw_only=True)
class DocumentLayout:
    """What attention, rotary embedding and loss need to know about one pack."""

    cu_seqlens: torch.Tensor  # [N + 1], int32
    position_ids_T: torch.Tensor  # int64, from 0 in every document
    loss_weights_T: torch.Tensor  # float32, of the prediction that token t makes of token t + 1


def document_layout(
    lengths_N: torch.Tensor,
    *,
    tokens: int,
    prompt_lengths_N: torch.Tensor | None = None,
    weights_N: torch.Tensor | None = None,
    implementation: Implementation | None = None,
) -> DocumentLayout:
    """Return the layout of documents in a pack of `tokens` >= their sum; what lies behind them is padding.

    lengths_N, prompt_lengths_N: integers; the first `prompt_lengths_N` tokens of a document are not learnt,
    default 0.
    weights_N: float, weight of every learnt token of a document, default 1. The last token of a document
    predicts nothing.
    """
    chosen = choose("document_layout", lengths_N.device, implementation)
    prompt_lengths_N = torch.zeros_like(lengths_N) if prompt_lengths_N is None else prompt_lengths_N
    weights_N = (
        torch.ones(lengths_N.shape, device=lengths_N.device) if weights_N is None else weights_N.float()
    )
    offsets = reference.cu_seqlens(lengths_N)  # a scan over documents is torch's own kernel
    if chosen is Implementation.TRITON:
        from megaswift.kernels.document_layout import kernel  # here, because triton may be absent

        positions_T, weights_T = kernel.positions_and_weights(
            offsets, prompt_lengths_N, weights_N, tokens=tokens
        )
    else:
        positions_T, weights_T = reference.positions_and_weights(
            offsets, prompt_lengths_N, weights_N, tokens=tokens
        )
    return DocumentLayout(cu_seqlens=offsets, position_ids_T=positions_T, loss_weights_T=weights_T)
