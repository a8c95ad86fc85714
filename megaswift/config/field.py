"""How a setting is declared: its default, its help, its flag and its choices, in one line."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints


def setting(
    default: Any,
    help: str,
    *,
    flag: str | None = None,
    choices: tuple[str, ...] = (),
    aliases: tuple[str, ...] = (),
    several: bool = False,
) -> Any:
    """Declare one dataclass field of a settings section.

    `flag` is the command-line name where it differs from the field's; `aliases` are other names users know. With `several` a
    text may be given as several words, which are joined by blanks.
    The value of the type is checked by config/value.py, which reads the annotation.
    """
    metadata = {"help": help, "flag": flag, "choices": choices, "aliases": aliases, "several": several}
    if isinstance(default, (list, dict)):
        kind = type(default)
        copy = default.copy()
        return field(default_factory=lambda: kind(copy), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One declared setting as the parser and the help see it."""

    section: str  # attribute of RunConfig
    name: str  # attribute of the section
    flag: str  # command-line name, without dashes
    kind: type  # str, int, float, bool, list or dict; list items are str
    optional: bool  # None is a value: "choose for me"
    default: Any
    help: str
    choices: tuple[str, ...]
    aliases: tuple[str, ...]
    several: bool


def declared(config: type) -> Mapping[str, Setting]:
    """Return flag -> Setting for every field of every section of `config` (a dataclass of dataclasses)."""
    return _declared(config)


@cache  # reading the annotations takes 10 ms, and rules ask for every layout that the planner finds
def _declared(config: type) -> Mapping[str, Setting]:
    found: dict[str, Setting] = {}
    for section, section_type in get_type_hints(config).items():
        if section_type is str:  # RunConfig.task is not a flag
            continue
        hints = get_type_hints(section_type)
        blank = section_type()
        for one in fields(section_type):
            kind, optional = _kind(hints[one.name])
            flag = one.metadata["flag"] or one.name
            found[flag] = Setting(
                section=section,
                name=one.name,
                flag=flag,
                kind=kind,
                optional=optional,
                default=getattr(blank, one.name),
                help=one.metadata["help"],
                choices=one.metadata["choices"],
                aliases=one.metadata["aliases"],
                several=one.metadata["several"],
            )
    return found


def _kind(annotation: Any) -> tuple[type, bool]:
    """Return the plain type of an annotation, and whether None is allowed: `list[str]` -> (list, False)."""
    if isinstance(annotation, UnionType) or get_origin(annotation) is Union:
        rest = [part for part in get_args(annotation) if part is not type(None)]
        assert len(rest) == 1, f"a setting has one type, perhaps with None: {annotation}"
        return _kind(rest[0])[0], True
    return get_origin(annotation) or annotation, False
