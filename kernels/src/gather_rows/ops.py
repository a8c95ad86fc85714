"""Rows of a tensor chosen by an index: how packed batches are cut for cp ranks and put together again.

Letters: T rows of the source, C rows chosen.
"""

from typing import Any

import torch

from megaswift.kernels.dispatch import Implementation, choose
from megaswift.kernels.gather_rows import reference


def gather_rows(
    source_T: torch.Tensor,
    index_C: torch.Tensor,
    *,
    fill: float = 0.0,
    implementation: Implementation | None = None,
) -> torch.Tensor:
    """Return rows [C, ...] of source [T, ...], of any dtype; `fill` where the index is -1.

    index_C: integers on the same device, no row named twice (the backward pass writes each gradient row
    once).
    """
    return _GatherRows.apply(source_T, index_C, fill, choose("gather_rows", source_T.device, implementation))


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, source_T: torch.Tensor, index_C: torch.Tensor, fill: float, chosen: Implementation
    ) -> torch.Tensor:
        ctx.save_for_backward(index_C)
        ctx.rows, ctx.chosen = source_T.shape[0], chosen
        if chosen is Implementation.TRITON:
            from megaswift.kernels.gather_rows import kernel  # here, because triton may be absent

            return kernel.gather_rows(source_T, index_C, fill=fill)
        return reference.gather_rows(source_T, index_C, fill=fill)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (index_C,) = ctx.saved_tensors
        if ctx.chosen is Implementation.TRITON:
            from megaswift.kernels.gather_rows import kernel  # here, because triton may be absent

            return kernel.scatter_rows(grads[0], index_C, rows=ctx.rows), None, None, None
        return reference.scatter_rows(grads[0], index_C, rows=ctx.rows), None, None, None
