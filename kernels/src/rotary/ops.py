"""Rotary embedding of packed tokens: half and interleaved pairs, partial, and several position axes (mrope).

Letters: A position axes, T packed tokens, H heads, K head size, R half of the rotary dimensions.
"""

from dataclasses import dataclass
from typing import Any

import torch

from megaswift.kernels.dispatch import Implementation, choose
from megaswift.kernels.rotary import reference


@dataclass(frozen=True, kw_only=True)
class RotaryTable:
    """Angles of every token, made once for a batch and read by every layer."""

    cos_TR: torch.Tensor  # float32
    sin_TR: torch.Tensor  # float32


def rotary_table(
    positions: torch.Tensor,
    inverse_frequencies_R: torch.Tensor,
    *,
    axes_R: torch.Tensor | None = None,
    scale: float = 1.0,
) -> RotaryTable:
    """Return the angles of `positions` [T], or [A, T] where `axes_R` names the axis of every frequency.

    `scale` multiplies cosines and sines (attention factor of yarn).
    """
    positions_AT = positions[None] if positions.dim() == 1 else positions
    axes_R = torch.zeros_like(inverse_frequencies_R, dtype=torch.int64) if axes_R is None else axes_R
    cos_TR, sin_TR = reference.rotary_table(positions_AT, inverse_frequencies_R, axes_R, scale=scale)
    return RotaryTable(cos_TR=cos_TR, sin_TR=sin_TR)


def axes_in_blocks(sections: list[int]) -> torch.Tensor:
    """Return the axis of every frequency [R], a run for each (mrope of Qwen2-VL, transformers 5)."""
    return torch.repeat_interleave(torch.arange(len(sections)), torch.tensor(sections))


def axes_in_turn(sections: list[int]) -> torch.Tensor:
    """Return the axis of every frequency [R], in turn, the rest for axis 0 (mrope of Qwen3-VL, transformers 5)."""
    frequencies = torch.arange(sum(sections))
    turn = frequencies % len(sections)
    return torch.where(frequencies < torch.tensor(sections)[turn] * len(sections), turn, 0)


def rotary(
    x_THK: torch.Tensor,
    table: RotaryTable,
    *,
    interleaved: bool = False,
    implementation: Implementation | None = None,
) -> torch.Tensor:
    """Return x with its first 2R dimensions rotated: pairs (j, R + j), or (2j, 2j + 1) where interleaved.

    Computed in float32, returned in the type of x. Differentiable in x only.
    """
    return _Rotary.apply(
        x_THK, table.cos_TR, table.sin_TR, interleaved, choose("rotary", x_THK.device, implementation)
    )


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_THK: torch.Tensor,
        cos_TR: torch.Tensor,
        sin_TR: torch.Tensor,
        interleaved: bool,
        chosen: Implementation,
    ) -> torch.Tensor:
        ctx.save_for_backward(cos_TR, sin_TR)
        ctx.interleaved, ctx.chosen = interleaved, chosen
        if chosen is Implementation.TRITON:
            from megaswift.kernels.rotary import kernel  # here, because triton may be absent

            return kernel.rotate(x_THK, cos_TR, sin_TR, interleaved=interleaved)
        return reference.rotate(x_THK, cos_TR, sin_TR, interleaved=interleaved)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        cos_TR, sin_TR = ctx.saved_tensors
        if ctx.chosen is Implementation.TRITON:
            from megaswift.kernels.rotary import kernel  # here, because triton may be absent

            return (
                kernel.rotate(grads[0], cos_TR, sin_TR, interleaved=ctx.interleaved, sign=-1.0),
                None,
                None,
                None,
                None,
            )
        return (
            reference.rotate(grads[0], cos_TR, -sin_TR, interleaved=ctx.interleaved),
            None,
            None,
            None,
            None,
        )
