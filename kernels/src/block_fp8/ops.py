"""FP8 with one scale a block: 128 x 128 for weights, 1 x 128 for activations, 1 x 32 for both in MXFP8.

Letters: M rows, N columns, P and Q blocks along them.
"""

import enum
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from megaswift.kernels.block_fp8 import reference
from megaswift.kernels.dispatch import Implementation, choose


class Block(enum.Enum):
    """Rows and columns that share a scale."""

    SQUARE = (128, 128)
    ROW = (1, 128)
    MX = (
        1,
        32,
    )  # OCP Microscaling formats, 1.0; the reference alone has it: on GPUs Transformer Engine quantises


@dataclass(frozen=True, kw_only=True)
class BlockFp8:
    """A matrix in FP8: x = values * scale of the block."""

    values_MN: torch.Tensor  # float8_e4m3fn or float8_e5m2
    scales_PQ: torch.Tensor  # float32; [ceil(M / rows), ceil(N / columns)]
    block: Block


def quantise(
    x_MN: torch.Tensor,
    *,
    block: Block,
    dtype: torch.dtype = torch.float8_e4m3fn,
    power_of_two: bool = False,
    implementation: Implementation | None = None,
) -> BlockFp8:
    """Return `x_MN` in FP8, rounded to nearest even; the largest value of a block becomes the largest of `dtype`.

    `power_of_two` rounds scales up to powers of two, which Blackwell's blocks want. A block of zeros has
    scale 1.
    """
    chosen = _choose(x_MN.device, block, implementation)
    rows, columns = block.value
    values_MN, scales_PQ = _module(chosen).quantise(
        x_MN, block_rows=rows, block_columns=columns, dtype=dtype, power_of_two=power_of_two
    )
    return BlockFp8(values_MN=values_MN, scales_PQ=scales_PQ, block=block)


def dequantise(
    quantised: BlockFp8, dtype: torch.dtype, *, implementation: Implementation | None = None
) -> torch.Tensor:
    """Return the matrix [M, N] in `dtype`, multiplied in float32."""
    chosen = _choose(quantised.values_MN.device, quantised.block, implementation)
    rows, columns = quantised.block.value
    return _module(chosen).dequantise(
        quantised.values_MN, quantised.scales_PQ, block_rows=rows, block_columns=columns, dtype=dtype
    )


def round_trip(
    x_MN: torch.Tensor,
    *,
    block: Block,
    dtype: torch.dtype = torch.float8_e4m3fn,
    power_of_two: bool = False,
    implementation: Implementation | None = None,
) -> torch.Tensor:
    """Return `x_MN` as FP8 would have kept it, in its own dtype; gradients pass unchanged."""
    return _RoundTrip.apply(x_MN, block, dtype, power_of_two, implementation)


class _RoundTrip(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_MN: torch.Tensor,
        block: Block,
        dtype: torch.dtype,
        power_of_two: bool,
        implementation: Implementation | None,
    ) -> torch.Tensor:
        quantised = quantise(
            x_MN, block=block, dtype=dtype, power_of_two=power_of_two, implementation=implementation
        )
        return dequantise(quantised, x_MN.dtype, implementation=implementation)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return grads[0], None, None, None, None


def _choose(device: torch.device, block: Block, asked: Implementation | None) -> Implementation:
    return Implementation.REFERENCE if block is Block.MX else choose("block_fp8", device, asked)


def _module(chosen: Implementation) -> ModuleType:
    if chosen is Implementation.TRITON:
        from megaswift.kernels.block_fp8 import kernel  # here, because triton may be absent

        return kernel
    return reference
