"""Help texts, made from the declarations of the settings."""

import shutil
import textwrap
from collections.abc import Mapping

from megaswift.config.aliases import TRANSLATIONS
from megaswift.config.field import Setting, declared
from megaswift.config.parse import TASK_DEFAULTS
from megaswift.config.run import RunConfig

INDENT = 6


def task_help(task: str) -> str:
    """Return the help of a training command: every flag by section, with default, choices and other names."""
    lines = [f"usage: megaswift {task} [file.yaml] --model MODEL --dataset ROWS... [--flag value ...]", ""]
    lines += _wrap(
        "Flags override the YAML file (file.yaml, or --config file.yaml). Lists take several words, booleans true or false "
        "(a bare flag is true), JSON values are quoted. Relaunching the same command resumes.",
        0,
    )
    lines += _sections(RunConfig(task=task), TASK_DEFAULTS[task])
    lines += ["", "names of ms-swift and transformers that are translated:"]
    lines += _wrap(" ".join(f"--{name}" for name in sorted(TRANSLATIONS)), INDENT)
    return "\n".join(lines) + "\n"


def sections_help(config: object) -> str:
    """Return the flags of a dataclass of settings, section by section."""
    return "\n".join(_sections(config, {})) + "\n"


def _sections(config: object, other_defaults: Mapping[str, object]) -> list[str]:
    lines: list[str] = []
    section = None
    for setting in declared(type(config)).values():
        if setting.section != section:
            section = setting.section
            lines += ["", f"{section}:"]
        lines += _entry(setting, other_defaults.get(setting.flag, setting.default))
    return lines


def _entry(setting: Setting, default: object) -> list[str]:
    value = "|".join(setting.choices) or {
        bool: "true|false",
        int: "N",
        float: "X",
        list: "WORD...",
        dict: "JSON",
    }.get(setting.kind, "TEXT")
    facts = [] if default in (None, [], {}) else [f"default: {_text(default)}"]
    if setting.aliases:
        facts.append(f"also --{', --'.join(setting.aliases)}")
    return [
        f"  --{setting.flag} {value}",
        *_wrap(setting.help + (f" ({'; '.join(facts)})" if facts else ""), INDENT),
    ]


def _text(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return (
        " ".join(map(str, value))
        if isinstance(value, list)
        else f"{value:g}"
        if isinstance(value, float)
        else str(value)
    )


def _wrap(text: str, indent: int) -> list[str]:
    width = min(110, shutil.get_terminal_size().columns)
    return textwrap.wrap(text, width, initial_indent=" " * indent, subsequent_indent=" " * indent)
