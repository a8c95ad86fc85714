"""`megaswift models`: the families that are known, or the facts about one model."""

import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

from megaswift.errors import ConfigError
from megaswift.metadata.catalogue import FAMILIES
from megaswift.metadata.meta import ModelMeta
from megaswift.metadata.read import get_model_meta

HELP = """\
usage: megaswift models [MODEL]

Without MODEL: the model types that are known, and which of them can be trained.
With MODEL, a folder or a hub id: the facts that training will use.
"""
LONG = ("raw", "template", "generation")  # whole files; `template` is told as yes or no


def run(argv: list[str]) -> int:
    """Run the command and return its exit code."""
    if {"-h", "--help"} & set(argv):
        sys.stdout.write(HELP)
        return 0
    words = [word for word in argv if word != "--model"]
    if len(words) > 1 or any(word.startswith("-") for word in words):
        raise ConfigError(f"megaswift models takes one model, not {' '.join(argv)}.")
    sys.stdout.write(_facts(get_model_meta(words[0])) if words else _families())
    return 0


def _families() -> str:
    """Return one line a family: its model type, and whether it can be trained or only described."""
    width = max(map(len, FAMILIES))
    return "".join(
        f"{name:<{width}}  {'train' if family.supported else 'facts only'}\n"
        for name, family in sorted(FAMILIES.items())
    )


def _facts(meta: ModelMeta) -> str:
    """Return the facts that differ from 'nothing unusual', one a line."""
    lines = [f"{one.name}: {_text(getattr(meta, one.name))}" for one in fields(meta) if _tells(meta, one)]
    lines.append(f"template: {'in the tokenizer' if meta.template else 'none'}")
    return "\n".join(lines) + "\n"


def _tells(meta: ModelMeta, one: Any) -> bool:
    value = getattr(meta, one.name)
    return one.name not in LONG and value is not None and value != () and value != one.default


def _text(value: object) -> str:
    if isinstance(value, tuple) and len(value) > 8 and len(set(value)) == 1:
        return f"{value[0]} x {len(value)}"
    return (
        " ".join(map(str, value))
        if isinstance(value, tuple)
        else str(value.resolve() if isinstance(value, Path) else value)
    )
