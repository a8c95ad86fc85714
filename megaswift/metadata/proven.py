"""The note beside a model of an unknown type that says which known family it was proven to be.

`megaswift convert --verify` writes it; reading a folder takes it for what it says as long as config.json is the same.
"""

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megaswift.metadata.files import read_json_if_there

NOTE = "megaswift_family.json"
# What an export changes without changing the mathematics.
_NOT_COUNTED = frozenset(
    {"dtype", "torch_dtype", "transformers_version", "quantization_config", "_name_or_path"}
)


def proven_family(config: Mapping[str, Any], folder: Path) -> str | None:
    """Return the family that the folder's note names for this config.json, or None."""
    note = read_json_if_there(folder / NOTE)
    family = note.get("family")
    return family if isinstance(family, str) and note.get("config") == _fingerprint(config) else None


def write_note(config: Mapping[str, Any], folder: Path, *, family: str, compared_with: str) -> None:
    """Write the note; raises OSError where the folder cannot be written."""
    note = {"family": family, "compared_with": compared_with, "config": _fingerprint(config)}
    (folder / NOTE).write_text(json.dumps(note, indent=1) + "\n", encoding="utf-8")


def _fingerprint(config: Mapping[str, Any]) -> str:
    counted = {key: value for key, value in config.items() if key not in _NOT_COUNTED}
    return f"{zlib.crc32(json.dumps(counted, sort_keys=True).encode()):08x}"
