"""config.json as a family reads it: typed values, and defaults of absent keys."""

from collections.abc import Mapping
from typing import Any

from megaswift.errors import ModelError


class ConfigReader:
    """The keys of one config.json, with the types and the defaults that its family declares."""

    def __init__(
        self, values: Mapping[str, Any], *, defaults: Mapping[str, Any], aliases: Mapping[str, str], name: str
    ) -> None:
        """Read `values`; absent keys have `defaults`, `aliases` maps other spellings to keys.

        `name` is the model's folder or id, for messages. Raises ModelError when two spellings disagree.
        """
        self.defaults = defaults
        self.name = name
        self.values = dict(values)
        for other, key in aliases.items():
            if other in self.values:
                value = self.values.pop(other)
                if self.values.setdefault(key, value) != value:
                    raise self.fail(key, f"{other}={value!r} says otherwise; keep one of the two.")

    def get(self, key: str, kind: type | None = None) -> Any:
        """Return the value of `key`, or its default where the file has none; raises ModelError.

        The type must be `kind`, or the default's. JSON null is what the default None means, nothing else.
        """
        default = self.defaults[key]
        value = self.values.get(key, default)
        if value is None and default is None:
            return None
        return self._typed(key, value, kind or type(default))

    def nullable(self, key: str, kind: type) -> Any:
        """Return the value of `key` like get(), where JSON null is allowed whatever the default is."""
        value = self.values.get(key, self.defaults[key])
        return None if value is None else self._typed(key, value, kind)

    def _typed(self, key: str, value: Any, kind: type) -> Any:
        """Return `value` as `kind`; an integer will do where a float is meant, nothing else is converted."""
        if kind is float and type(value) is int:
            return float(value)
        if kind is not type(None) and type(value) is not kind:
            raise self.fail(key, f"It must be of type {kind.__name__}, not {type(value).__name__}.")
        return value

    def fail(self, key: str, rule: str) -> ModelError:
        """Return the error that says which value of `key` is wrong and why; the caller raises it."""
        return ModelError(f"{key}={self.values.get(key)!r} in config.json of {self.name} is wrong. {rule}")
