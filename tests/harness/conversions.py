"""Conversions of tiny models, as several test files make them."""

import tempfile
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file

from megaswift.converters.conversion import carry_out
from megaswift.converters.dcp_model import find_checkpoint
from megaswift.converters.offline import to_hf, to_mcore
from megaswift.metadata.read import get_model_meta
from tests.harness.tiny import save_tiny

_FOLDER = tempfile.TemporaryDirectory(prefix="megaswift-test-")  # goes with the process


@cache
def saved(name: str) -> Path:
    """Return the folder of a tiny model, which nobody changes."""
    return save_tiny(name, Path(_FOLDER.name) / name, dtype=torch.bfloat16)


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """Return all tensors of a folder's safetensors files."""
    found: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
    return found


def there(
    folder: Path,
    output: Path,
    *,
    max_bytes: int = 100_000,
    dtype: str | None = None,
    fsync: bool | None = None,
) -> Path:
    """Convert a Hugging Face folder to a torch_dist checkpoint."""
    meta = get_model_meta(folder)
    conversion = to_mcore(meta, folder, dtype=dtype, vocab_multiple=1, max_bytes=max_bytes)
    return carry_out(conversion, output, source=folder, fsync=fsync)


def back(folder: Path, checkpoint: Path, output: Path, *, dtype: str | None = None) -> Path:
    """Convert a torch_dist checkpoint back to a Hugging Face folder."""
    conversion = to_hf(get_model_meta(folder), find_checkpoint(checkpoint), dtype=dtype, max_bytes=120_000)
    return carry_out(conversion, output, source=checkpoint)


def files_of(folder: Path) -> dict[str, bytes]:
    """Return the bytes of every file below a folder, by its name there."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
