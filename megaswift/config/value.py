"""Words of a command line, or values of a YAML file, to values of a setting's type."""

import json
from pathlib import Path
from typing import Any

from megaswift.config.field import Setting
from megaswift.errors import ConfigError, nearest

Raw = Any  # list[str] from a command line (no words: a bare flag), or whatever YAML holds

TRUE = ("true", "1", "yes", "on")
FALSE = ("false", "0", "no", "off")
NOTHING = ("none", "null", "")


def text_of(name: str, raw: Raw) -> str:
    """Return a raw value as one word; raises ConfigError where there are several."""
    if isinstance(raw, (list, tuple)):
        if not raw:
            return "true"
        if len(raw) > 1:
            raise ConfigError(
                f"{name} takes one value, not {len(raw)}: {' '.join(map(str, raw))}. Quote it if it is one."
            )
        raw = raw[0]
    if raw is None:
        return "none"
    return str(raw).lower() if isinstance(raw, bool) else str(raw)


def truth_of(name: str, raw: Raw) -> bool:
    """Return a raw value as true or false; a bare flag is true."""
    text = text_of(name, raw).lower()
    if text in TRUE:
        return True
    if text in FALSE:
        return False
    raise ConfigError(f"{name}={text} is not true or false.")


def number_of(name: str, raw: Raw) -> float:
    """Return a raw value as a number."""
    text = text_of(name, raw)
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"{name}={text} is not a number.") from None


def value_of(setting: Setting, raw: Raw, *, name: str | None = None) -> Any:
    """Return `raw` in the type of `setting`; raises ConfigError. `name` is the name the user wrote."""
    name = name or setting.flag
    if raw == [] and setting.kind is not bool and setting.kind is not list:
        raise ConfigError(f"{name} has no value. It needs {_article(setting.kind)}: {setting.help}.")
    if setting.several and isinstance(raw, (list, tuple)):
        raw = " ".join(map(str, raw))
    if setting.kind is list:
        return _items(setting, raw, name)
    if setting.kind is dict:
        return _mapping(raw, name)
    if setting.optional and (raw is None or _says_nothing(setting, text_of(name, raw))):
        return None
    if setting.kind is bool:
        return truth_of(name, raw)
    if setting.kind is int:
        return _whole(raw, name)
    if setting.kind is float:
        return number_of(name, raw)
    return _one_of(setting, text_of(name, raw), name)


def _says_nothing(setting: Setting, text: str) -> bool:
    return text.lower() in NOTHING and text not in setting.choices


def _items(setting: Setting, raw: Raw, name: str) -> list[str]:
    if raw is None:
        return []
    items = [str(item) for item in raw] if isinstance(raw, (list, tuple)) else [str(raw)]
    return [_one_of(setting, item, name) for item in items]


def _mapping(raw: Raw, name: str) -> dict[str, Any]:
    if isinstance(raw, dict):
        return dict(raw)
    text = " ".join(raw) if isinstance(raw, list) else str(raw or "{}")
    try:
        mapping = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(
            f'{name}={text} is not JSON ({error.msg} at {error.pos}). Write \'{{"key": "value"}}\'.'
        ) from None
    if not isinstance(mapping, dict):
        raise ConfigError(f'{name}={text} is not a JSON object. Write \'{{"key": "value"}}\'.')
    return mapping


def _whole(raw: Raw, name: str) -> int:
    text = text_of(name, raw)
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"{name}={text} is not a whole number.") from None


def _one_of(setting: Setting, text: str, name: str) -> str:
    if setting.choices and text not in setting.choices:
        raise ConfigError(f"{name}={text} is not one of the choices.{nearest(text, setting.choices)}")
    if text.startswith("~"):
        try:
            Path(text).expanduser()
        except RuntimeError:
            raise ConfigError(
                f"{name}={text} begins in the home of a user whom this machine does not know. Write the folder in full."
            ) from None
    return text


def _article(kind: type) -> str:
    return {int: "a whole number", float: "a number", dict: "a JSON object"}.get(kind, "a value")
