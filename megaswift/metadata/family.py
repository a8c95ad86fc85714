"""What a model family is: a declaration of how its config.json becomes a ModelMeta.

A fact is a constant or a function of the config; facts.py makes the functions. The keys with a declared default,
the keys that must hold a certain value and the harmless ones are together all that a config.json may contain.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megaswift.errors import ModelError, nearest
from megaswift.metadata.config_reader import ConfigReader
from megaswift.metadata.harmless import HARMLESS_KEYS, HARMLESS_VALUES


@dataclass(frozen=True, kw_only=True)
class Family:
    """One family of decoder models that share a config vocabulary and a mathematics."""

    name: str  # model_type of config.json
    architecture: str  # class in transformers, where config.json names none
    defaults: Mapping[str, Any]  # config key -> what transformers takes when the key is absent
    facts: Mapping[str, Any]  # field of ModelMeta -> constant, or function of a ConfigReader
    aliases: Mapping[str, str] = field(default_factory=dict)  # other spelling -> key
    harmless_values: Mapping[str, tuple[Any, ...]] = field(
        default_factory=dict
    )  # key -> values that change nothing
    harmless_keys: tuple[str, ...] = ()  # keys that change nothing whatever they hold
    repeats: str | None = (
        None  # not in transformers; its own code is that of this model type under another name
    )
    supported: bool = False  # a model is built and its weights are read; proven by a parity test

    def evaluate(self, values: Mapping[str, Any], *, name: str) -> dict[str, Any]:
        """Return the fields of ModelMeta that a config.json gives; raises ModelError on what is not understood."""
        config = ConfigReader(values, defaults=self.defaults, aliases=self.aliases, name=name)
        facts = {field: fact(config) if callable(fact) else fact for field, fact in self.facts.items()}
        self._check_other_keys(config)
        return facts

    def strange_keys(self, values: Mapping[str, Any]) -> list[str]:
        """Return the keys of a config.json that this family does not know."""
        known = {*self.defaults, *self.aliases, *self.harmless_keys, *self.harmless_values}
        known |= {*HARMLESS_KEYS, *HARMLESS_VALUES, "rope_scaling"}
        return sorted(key for key, value in values.items() if key not in known and value is not None)

    def _check_other_keys(self, config: ConfigReader) -> None:
        """Refuse every key without a declared default, unless it is known to change nothing or holds null."""
        accepted = {**HARMLESS_VALUES, **self.harmless_values}
        known = {*self.defaults, *self.harmless_keys, *HARMLESS_KEYS, "rope_scaling"}
        for key, value in sorted(config.values.items()):
            if key in known or value is None:
                continue
            if key not in accepted:
                raise ModelError(
                    f"{key}={value!r} in config.json of {config.name} is not known for the family {self.name} "
                    f"and may change the mathematics.{nearest(key, self.defaults)} Remove the key if it means nothing."
                )
            if value not in accepted[key]:
                choice = " or ".join(repr(one) for one in accepted[key])
                raise config.fail(key, f"The family {self.name} is built for {choice} only.")
