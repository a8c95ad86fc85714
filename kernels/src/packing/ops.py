"""Padded batches to packed documents and back, forward and backward.

Letters: B documents, S padded length, T packed tokens.
"""

from typing import Any

import torch

from megaswift.kernels.dispatch import Implementation, choose
from megaswift.kernels.packing import reference


def pack(
    padded_BS: torch.Tensor,
    cu_seqlens: torch.Tensor,
    *,
    tokens: int | None = None,
    implementation: Implementation | None = None,
) -> torch.Tensor:
    """Return the tokens [T, ...] of a right-padded batch [B, S, ...], of any dtype, document after document.

    cu_seqlens: [B + 1] integers on the same device, offsets of the documents in T; no document is longer than
    S. `tokens` is T; without it the last offset is read, which waits for the device. Gradients of padding are
    0.
    """
    chosen = choose("pack", padded_BS.device, implementation)
    tokens = int(cu_seqlens[-1]) if tokens is None else tokens
    return _Pack.apply(padded_BS, cu_seqlens, tokens, chosen)


def unpack(
    packed_T: torch.Tensor,
    cu_seqlens: torch.Tensor,
    *,
    seq_len: int,
    padding: float = 0.0,
    implementation: Implementation | None = None,
) -> torch.Tensor:
    """Return a right-padded batch [B, S, ...] of packed tokens [T, ...], of any dtype, `padding` elsewhere.

    cu_seqlens: [B + 1] integers on the same device, offsets of the documents in T; no document is longer than
    `seq_len`.
    """
    return _Unpack.apply(
        packed_T, cu_seqlens, seq_len, padding, choose("unpack", packed_T.device, implementation)
    )


class _Pack(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, padded_BS: torch.Tensor, cu_seqlens: torch.Tensor, tokens: int, chosen: Implementation
    ) -> torch.Tensor:
        ctx.save_for_backward(cu_seqlens)
        ctx.seq_len, ctx.chosen = padded_BS.shape[1], chosen
        return _pack(padded_BS, cu_seqlens, tokens, chosen)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (cu_seqlens,) = ctx.saved_tensors
        return _unpack(grads[0], cu_seqlens, ctx.seq_len, 0.0, ctx.chosen), None, None, None


class _Unpack(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        packed_T: torch.Tensor,
        cu_seqlens: torch.Tensor,
        seq_len: int,
        padding: float,
        chosen: Implementation,
    ) -> torch.Tensor:
        ctx.save_for_backward(cu_seqlens)
        ctx.tokens, ctx.chosen = packed_T.shape[0], chosen
        return _unpack(packed_T, cu_seqlens, seq_len, padding, chosen)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (cu_seqlens,) = ctx.saved_tensors
        return _pack(grads[0], cu_seqlens, ctx.tokens, ctx.chosen), None, None, None, None


def _pack(
    padded_BS: torch.Tensor, cu_seqlens: torch.Tensor, tokens: int, chosen: Implementation
) -> torch.Tensor:
    if chosen is Implementation.TRITON:
        from megaswift.kernels.packing import kernel  # here, because triton may be absent

        return kernel.pack(padded_BS, cu_seqlens, tokens=tokens)
    return reference.pack(padded_BS, cu_seqlens, tokens=tokens)


def _unpack(
    packed_T: torch.Tensor, cu_seqlens: torch.Tensor, seq_len: int, padding: float, chosen: Implementation
) -> torch.Tensor:
    if chosen is Implementation.TRITON:
        from megaswift.kernels.packing import kernel  # here, because triton may be absent

        return kernel.unpack(packed_T, cu_seqlens, seq_len=seq_len, padding=padding)
    return reference.unpack(packed_T, cu_seqlens, seq_len=seq_len, padding=padding)
