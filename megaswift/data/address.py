"""What tokenised sets depend on, and their address: the same files, tokenizer and settings give the same, all others another."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from megaswift.config.data import DataConfig
from megaswift.data.forms import Form
from megaswift.data.sources import FileSet
from megaswift.data.template import Template

ENCODING = 2  # raised whenever the same rows would become other tokens
BLOCK = 1 << 20  # bytes hashed at once
SETTINGS = (
    "columns",
    "split_dataset_ratio",
    "interleave_prob",
    "stopping_strategy",
    "model_name",
    "model_author",
)

Facts = dict[str, Any]  # JSON


def template_facts(template: Template, *, form: Form, stop_ids: Iterable[int]) -> Facts:
    """Return what the tokens of one row depend on."""
    return {
        "encoding": ENCODING,
        "form": form.name,
        "tokenizer": _tokenizer_digest(template),
        "stop_ids": sorted(stop_ids),
        "use_chat_template": template.uses_chat_template,
        "loss_scale": "+".join([template.loss_scale, *template.part_rules]),
        "system": template.system,
        "variables": template.variables,
        "max_length": template.max_length,
        "truncation_strategy": template.truncation_strategy,
    }


def set_facts(train: Sequence[FileSet], val: Sequence[FileSet], config: DataConfig, *, seed: int) -> Facts:
    """Return what the rows and their order depend on; every file is read once for it."""
    draws = bool(config.split_dataset_ratio or config.interleave_prob)
    draws |= any(one.source.rows is not None for one in (*train, *val))
    return {
        "train": [_set_facts(one) for one in train],
        "val": [_set_facts(one) for one in val],
        "seed": seed if draws else None,
        "dataset_shuffle": config.dataset_shuffle if config.interleave_prob else None,
        **settings_facts(config),
    }


def settings_facts(config: DataConfig) -> Facts:
    """Return the settings that say which rows are read, as they were given."""
    return {name: getattr(config, name) for name in SETTINGS}  # the names are fields of DataConfig


def address_of(facts: Facts) -> str:
    """Return the name of the folder that holds what these facts give."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def _set_facts(one: FileSet) -> list[Any]:
    return [[_digest(path) for path in one.files], one.source.rows, one.source.is_self_cognition]


def _digest(path: Path) -> str:
    """Return the hash of a file, or of all files of a saved data set with their names; its own name is no part of it."""
    digest = hashlib.sha256(path.suffix.lower().encode())
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if not file.is_file():
            continue
        if file != path:
            digest.update(file.relative_to(path).as_posix().encode() + b"\0")
        with file.open("rb") as opened:
            while block := opened.read(BLOCK):
                digest.update(block)
    return digest.hexdigest()


def _tokenizer_digest(template: Template) -> str:
    tokenizer = template.tokenizer
    text = json.dumps(
        [tokenizer.backend_tokenizer.to_str(), template.chat_template, tokenizer.special_tokens_map],
        sort_keys=True,
        default=str,
    )
    return hashlib.sha256(text.encode()).hexdigest()
