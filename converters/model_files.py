"""The files of a Hugging Face folder beside its weights: copied as they are, config.json brought up to date."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megaswift.metadata.meta import ModelMeta

# Tokenizer, generation settings, chat template, remote code, licence. Weights in any format are left behind.
COPIED_SUFFIXES = frozenset({".json", ".jinja", ".txt", ".model", ".tiktoken", ".py", ".md"})
WRITTEN_ANEW = frozenset({"config.json", "README.md"})
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
MAX_COPIED_BYTES = 200_000_000  # the largest tokenizer files are some tens of megabytes


def model_files(source: Path) -> list[Path]:
    """Return every small file that belongs to the model but holds no weights, but for those that are written anew."""
    return [
        path
        for path in sorted(source.iterdir())
        if path.suffix in COPIED_SUFFIXES
        and path.is_file()
        and path.stat().st_size <= MAX_COPIED_BYTES
        and path.name not in WRITTEN_ANEW
        and not path.name.endswith(".index.json")
    ]


def copy_model_files(source: Path, target: Path) -> list[str]:
    """Copy model_files(); return their names."""
    files = model_files(source)
    for path in files:
        shutil.copyfile(path, target / path.name)
    return [path.name for path in files]


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy the tokenizer of a model folder, and its chat template."""
    for path in model_files(source):
        if path.name in TOKENIZER_FILES:
            shutil.copyfile(path, target / path.name)


def config_json(meta: ModelMeta, *, dtype: str, quantization: Mapping[str, Any] | None = None) -> str:
    """Return the text of config.json for weights of `dtype`, with the quantization that holds now, or without one."""
    config = dict(meta.raw)
    config.pop("quantization_config", None)
    if quantization is not None:
        config["quantization_config"] = dict(quantization)
    keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["torch_dtype"]
    return json.dumps(config | dict.fromkeys(keys, dtype), indent=2, ensure_ascii=False) + "\n"
