"""Environments: what answers the model between its turns, and says what each turn is worth.

An environment is a class like Env, and needs not inherit from it; every completion has one of its own. The methods are those of
ms-swift 4.6 (swift/rollout/gym_env.py), and may be async as there. They are asked again after a
resume: to the same conversation they must say the same.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoints, entry_points
from pathlib import Path
from typing import Any

from megaswift.config.environment_rules import ENVIRONMENT_GROUP
from megaswift.config.reward import RewardConfig
from megaswift.data.prompts import PromptRow, PromptRows
from megaswift.data.sample import Message
from megaswift.errors import ConfigError, DataError, nearest
from megaswift.rollout.rewards import contents_of, loaded

Make = Callable[[dict[str, Any]], Any]  # env_config -> what is like Env
COLUMN = "env_config"  # of rows: what their environment is made with, and maybe its name
CATALOGUE = "envs"  # a dictionary of a file: its environments under names of their own


@dataclass(frozen=True, kw_only=True)
class Request:
    """What an environment begins with; the names are those of ms-swift's RolloutInferRequest."""

    source: str  # "file:line" of the row
    messages: list[Message]  # the row's conversation, up to where the model answers
    data_dict: dict[str, Any]  # its other columns


class Env(ABC):
    """An environment of one conversation; the methods may be async."""

    def __init__(self, env_config: dict[str, Any]) -> None:
        """`env_config` is that column of the row, {} where there is none."""
        self.env_config = env_config

    @abstractmethod
    def reset(self, config: Request) -> Any:
        """Return what the user says first: a text, or a text, infos for the log, and the system's message.

        It stands in for the row's conversation, of which a system message stays where there is no other; None: the row's own.
        """

    @abstractmethod
    def step(self, action: list[Message]) -> Any:
        """Return what the user says next, the reward of the turn, whether the conversation is over, and infos for the log.

        `action` is the conversation, which ends with what the model wrote.
        """

    @abstractmethod
    def close(self) -> Any:
        """Give back what the environment holds, be it reset or not."""


METHODS = ("reset", "step", "close")


@dataclass(frozen=True, kw_only=True)
class Environments:
    """Environments by name; `default` is the name for rows that have none."""

    own: Mapping[str, Make]
    offered: EntryPoints
    default: str | None

    def of(self, row: PromptRow) -> tuple[str, Make, dict[str, Any]]:
        """Return the name of a row's environment, its class, and what it is made with; raises ConfigError or DataError."""
        config = row.columns.get(COLUMN)
        config = {} if config is None else config
        if not isinstance(config, dict):
            raise DataError(f"{COLUMN}={config!r} at {row.source} is not an object. Mend the row.")
        name = config.get("name") or self.default
        if name is None:
            raise DataError(
                f"{COLUMN} at {row.source} has no name of an environment. Add it, or give --gym_env for all rows."
            )
        if name in self.own:
            return name, self.own[name], config
        if name not in self.offered.names:
            raise DataError(
                f"{COLUMN} at {row.source} names {name}, which is no environment of --gym_env, --external_plugins or the entry points "
                f"{ENVIRONMENT_GROUP}.{nearest(str(name), [*self.own, *self.offered.names])}"
            )
        return name, loaded(self.offered[name], asked="gym_env"), config

    def check(self, rows: PromptRows) -> None:
        """Look for the environment of every row; raises ConfigError or DataError."""
        for number in range(len(rows)):
            self.of(rows[number])


def load_environments(chosen: RewardConfig) -> Environments:
    """Return environments of --external_plugins, of the file of --gym_env, and of installed packages; raises ConfigError."""
    own: dict[str, Make] = {}
    for path in chosen.external_plugins:
        own |= _environments_of(Path(path).expanduser(), asked="external_plugins")
    file, _, default = (chosen.gym_env or "").rpartition(":")
    if file:
        own |= _environments_of(Path(file).expanduser(), asked="gym_env")
    offered = entry_points(group=ENVIRONMENT_GROUP)
    known = own if file else {*own, *offered.names}
    if default and default not in known:
        raise ConfigError(
            f"gym_env={chosen.gym_env}: {file or ' '.join(chosen.external_plugins)} has no environment {default}, a class with "
            f"{', '.join(METHODS)}.{nearest(default, known)}"
        )
    return Environments(own=own, offered=offered, default=default or None)


def _environments_of(path: Path, *, asked: str) -> dict[str, Make]:
    """Return the classes of a file that are environments, by their names and by those of its catalogue."""
    found = contents_of(path, asked=asked)
    named = found.get(CATALOGUE)
    every = {**found, **named} if isinstance(named, dict) else found
    return {
        name: value
        for name, value in every.items()
        if isinstance(value, type)
        and value is not Env
        and all(callable(getattr(value, one, None)) for one in METHODS)
    }
