"""Which devices this machine shows, without torch."""

import os
from collections.abc import Mapping
from pathlib import Path

from megaswift.launch.environment import visible_gpus

NVIDIA_GPUS = Path("/proc/driver/nvidia/gpus")  # one folder a GPU, made by the kernel driver


def num_gpus(environ: Mapping[str, str] = os.environ) -> int:
    """Return the GPUs that a process started here would see."""
    visible = visible_gpus(environ)
    there = len(list(NVIDIA_GPUS.iterdir())) if NVIDIA_GPUS.is_dir() else 0
    return there if visible is None else min(there, len(visible))


def platform_here(asked: str) -> str:
    """Return "cuda" or "cpu": what --platform says, or what this machine has."""
    if asked != "auto":
        return asked
    return "cuda" if num_gpus() else "cpu"
