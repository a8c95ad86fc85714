"""Which implementation of a kernel runs: the one asked for, else the fastest that can, else the reference."""

import enum
import functools
import importlib.util

import torch

from megaswift.logs import get_logger

logger = get_logger(__name__)


class Implementation(enum.Enum):
    """How a kernel is carried out."""

    REFERENCE = "reference"  # plain torch; runs everywhere
    TRITON = "triton"  # CUDA tensors, or CPU tensors in Triton's interpreter


@torch.compiler.assume_constant_result
def choose(kernel: str, device: torch.device, asked: Implementation | None = None) -> Implementation:
    """Return the implementation of `kernel` for tensors on `device`, and say once which it is.

    Asking for what cannot run here gives the reference and one warning. The interpreter is used only when
    asked for.
    """
    return _choose(kernel, device.type, asked)


@functools.cache
def _choose(kernel: str, device_type: str, asked: Implementation | None) -> Implementation:
    obstacle = _obstacle_to_triton(device_type)
    if asked is Implementation.TRITON and obstacle:
        logger.warning("%s: the reference runs in place of the Triton kernel, because %s", kernel, obstacle)
        return Implementation.REFERENCE
    automatic = Implementation.REFERENCE if obstacle or device_type != "cuda" else Implementation.TRITON
    chosen = asked or automatic
    logger.debug("%s on %s: %s kernel", kernel, device_type, chosen.value)
    return chosen


def _obstacle_to_triton(device_type: str) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device_type == "cuda":
        return None
    import triton  # here, because it takes 0.1 s and may be absent

    # `knobs` came with Triton 3.4; older ones are used on CUDA only.
    if hasattr(triton, "knobs") and triton.knobs.runtime.interpret:
        return None
    return f"the tensors are on {device_type} and Triton's interpreter is off"
