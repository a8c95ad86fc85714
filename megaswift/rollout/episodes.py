"""Episodes: environments (rollout/environments.py) while their conversations go on, and what these earn.

All environments of a generation begin, step and end together, so that async ones wait together; a plain one holds up the others.
"""

import asyncio
import inspect
import json
import math
from collections.abc import Coroutine, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

from megaswift.data.prompts import PromptRow
from megaswift.data.sample import Message
from megaswift.errors import TrainingError
from megaswift.rollout.environments import Environments, Request

Action = Coroutine[Any, Any, Any]


@dataclass(kw_only=True)
class Episode:
    """One environment and its conversation."""

    name: str
    env: Any  # like environments.Env
    row: PromptRow
    asked: tuple[Message, ...] = ()  # what the model answers first
    rewards: list[float] = field(default_factory=list)  # of each turn
    infos: list[Any] = field(default_factory=list)  # of the beginning, then of each turn
    done: bool = False

    @property
    def record(self) -> dict[str, Any]:
        """What reward functions and completions.jsonl are told, under ms-swift's names."""
        return {
            "total_reward": sum(self.rewards),
            "step_rewards": self.rewards,
            "gym_done": self.done,
            "num_turns": len(self.rewards),
            "infos": self.infos,
        }

    async def reset(self) -> None:
        """Begin the conversation; raises TrainingError."""
        row = self.row
        request = Request(
            source=row.source, messages=deepcopy(list(row.messages)), data_dict=deepcopy(row.columns)
        )
        value = await self._returned("reset", request)
        text, info, system, *more = (
            (*value, None, None, None) if isinstance(value, tuple) else (value, None, None)
        )
        if any(more) or not isinstance(text, str | None) or not isinstance(system, str | None):
            raise self._wrong("reset", value, "a text, or a text, infos and the system's message")
        self.infos.append(_plain(info))
        own = [message for message in row.messages if message["role"] == "system"]
        first = [{"role": "system", "content": system}] if system else own
        rest = [message for message in row.messages if message["role"] != "system"]
        self.asked = (*first, *(rest if text is None else [{"role": "user", "content": text}]))

    async def step(self, conversation: Sequence[Message]) -> Any:
        """Return what is said to the model, None where the conversation is over; raises TrainingError."""
        value = await self._returned("step", deepcopy(list(conversation)))
        if not isinstance(value, tuple) or len(value) not in (3, 4) or not _is_finite(value[1]):
            raise self._wrong("step", value, "a text, a finite reward, whether all is over, and infos")
        self.rewards.append(float(value[1]))
        self.infos.append(_plain(value[3] if len(value) == 4 else None))
        self.done = bool(value[2])
        return None if self.done else value[0]

    async def close(self) -> None:
        """End it; raises TrainingError."""
        await self._returned("close")

    async def _returned(self, method: str, *given: Any) -> Any:
        try:
            value = getattr(self.env, method)(*given)
            return await value if inspect.isawaitable(value) else value
        except Exception as error:  # whatever a person's environment raises is his to mend
            raise _failure(self.name, self.row, method, error) from error

    def _wrong(self, method: str, value: Any, wanted: str) -> TrainingError:
        return TrainingError(
            f"gym_env={self.name} returned {value!r} from {method} at {self.row.source}, not {wanted}. Mend the environment."
        )


@dataclass(frozen=True, kw_only=True)
class Episodes:
    """The environments of a generation."""

    each: list[Episode] = field(default_factory=list)
    loop: asyncio.AbstractEventLoop  # theirs from beginning to end: what they connect to stays with it

    def together(self, actions: Sequence[Action]) -> list[Any]:
        """Return what environments say; raises the first error of them, once all have spoken."""
        return _sound(self.outcomes(actions))

    def outcomes(self, actions: Sequence[Action]) -> list[Any]:
        """Return what environments say, or raise."""

        async def gathered() -> list[Any]:
            return await asyncio.gather(*actions, return_exceptions=True)

        return self.loop.run_until_complete(gathered())


@contextmanager
def begun(environments: Environments, rows: Sequence[PromptRow]) -> Iterator[Episodes]:
    """Hold an environment for each row; all are closed in the end, whatever happens. Raises UserError."""
    episodes = Episodes(loop=asyncio.new_event_loop())
    try:
        for row in rows:
            episodes.each.append(_made(environments, row))
        episodes.together([episode.reset() for episode in episodes.each])
        yield episodes
    finally:
        closed = episodes.outcomes([episode.close() for episode in episodes.each])
        episodes.loop.close()
    _sound(closed)  # unless something else went wrong before


def _made(environments: Environments, row: PromptRow) -> Episode:
    name, make, config = environments.of(row)
    try:
        env = make(deepcopy(config))
    except Exception as error:  # whatever a person's environment raises is his to mend
        raise _failure(name, row, "__init__", error) from error
    return Episode(name=name, env=env, row=row)


def _failure(name: str, row: PromptRow, method: str, error: Exception) -> TrainingError:
    return TrainingError(
        f"gym_env={name} fails at {row.source} in {method}: {type(error).__name__}: {error}. Mend the environment or the row."
    )


def _sound(outcomes: list[Any]) -> list[Any]:
    for outcome in outcomes:
        if isinstance(outcome, BaseException):
            raise outcome
    return outcomes


def _is_finite(reward: Any) -> bool:
    try:
        return math.isfinite(float(reward))
    except (TypeError, ValueError):
        return False


def _plain(info: Any) -> Any:
    """Return infos as JSON has them, for other ranks and completions.jsonl; other values become their text."""
    return json.loads(json.dumps(info, default=str, skipkeys=True))
