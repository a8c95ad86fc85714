"""Tensors seen as plain integers, so that copying kernels serve every dtype and keep every bit."""

import torch

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def as_integers(x: torch.Tensor) -> torch.Tensor:
    """Return `x` seen as integers of the same width; the storage is shared."""
    return x.view(_INTEGERS[x.element_size()])


@torch.compiler.assume_constant_result
def bits_of(value: float, dtype: torch.dtype) -> int:
    """Return the integer whose bits are `value` in `dtype`."""
    return int(as_integers(torch.tensor([value]).to(dtype)).item())
