"""Block FP8, in plain torch.

Letters: M rows, N columns, P and Q blocks along them.
"""

import torch
import torch.nn.functional as F


def quantise(
    x_MN: torch.Tensor, *, block_rows: int, block_columns: int, dtype: torch.dtype, power_of_two: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return values [M, N] of an FP8 type and scales [P, Q], float32, with x = values * scale."""
    rows, columns = x_MN.shape
    padded = F.pad(x_MN.float(), (0, -columns % block_columns, 0, -rows % block_rows))
    blocks_PaQb = padded.unflatten(1, (-1, block_columns)).unflatten(0, (-1, block_rows))
    largest = torch.finfo(dtype).max
    # NaN does not spoil the scale of its block; it stays NaN itself.
    amax_PQ = blocks_PaQb.abs().nan_to_num(nan=0.0, posinf=float("inf")).amax(dim=(1, 3))
    # The smallest normal scale at least: 0 / 0 would be NaN.
    tiny = torch.finfo(torch.float32).tiny
    scales_PQ = torch.where(amax_PQ > 0, (amax_PQ / largest).clamp(min=tiny), 1.0)
    if power_of_two:
        scales_PQ = ((scales_PQ.view(torch.int32) + 0x7FFFFF) & 0x7F800000).view(
            torch.float32
        )  # up to the next exponent
    scaled = (blocks_PaQb / scales_PQ[:, None, :, None]).clamp(-largest, largest)
    return scaled.flatten(2, 3).flatten(0, 1)[:rows, :columns].to(dtype), scales_PQ


def dequantise(
    values_MN: torch.Tensor,
    scales_PQ: torch.Tensor,
    *,
    block_rows: int,
    block_columns: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Return values * scale [M, N] in `dtype`."""
    rows, columns = values_MN.shape
    scales_MN = scales_PQ.repeat_interleave(block_rows, 0)[:rows].repeat_interleave(block_columns, 1)[
        :, :columns
    ]
    return (values_MN.float() * scales_MN).to(dtype)
