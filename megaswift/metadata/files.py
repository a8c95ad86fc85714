"""Read the small JSON files of a model folder, and the dtype in the header of its weights."""

import json
import struct
from pathlib import Path
from typing import Any

from megaswift.errors import ModelError


def read_json(path: Path) -> dict[str, Any]:
    """Return the dictionary that a JSON file holds; raises ModelError where it holds none."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path} is missing. A model folder needs it; check the path or fetch it.") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ModelError(f"{path} cannot be read: {error}. Fetch the file again.") from None
    if not isinstance(values, dict):
        raise ModelError(f"{path} holds a {type(values).__name__}, not a dictionary. Fetch the file again.")
    return values


def read_json_if_there(path: Path) -> dict[str, Any]:
    """Return the dictionary of a JSON file, or an empty one where there is no such file."""
    return read_json(path) if path.is_file() else {}


_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


def first_dtype(folder: Path) -> str | None:
    """Return the dtype of the first floating tensor in a folder's first safetensors file; None where there is none.

    The header is a little-endian 8-byte length, then JSON (https://github.com/huggingface/safetensors#format).
    """
    for path in sorted(folder.glob("*.safetensors"))[:1]:
        try:
            with path.open("rb") as file:
                (length,) = struct.unpack("<Q", file.read(8))
                header = json.loads(file.read(min(length, path.stat().st_size)))
        except (OSError, struct.error, ValueError):
            return None  # reading the weights says what is wrong with them
        for name, tensor in header.items():
            if name != "__metadata__" and tensor["dtype"] in _DTYPES:
                return _DTYPES[tensor["dtype"]]
    return None
