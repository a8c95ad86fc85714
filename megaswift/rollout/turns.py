"""Conversations of several turns: what a person's scheduler says to a completion is appended to the kept token ids, and the model
goes on from there.

A scheduler is a function, or a class without arguments whose objects are called: scheduler(messages, completion, **columns) gets
the conversation so far, what the model wrote now, and the other columns of the row. It returns the next message, or several,
or None where the conversation is over; a text is a user's message. What it says carries no loss. It is asked on every rank that
asks the engine, and after a resume again: to the same conversation it must say the same.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import numpy as np

from megaswift.config.rollout import RolloutConfig
from megaswift.config.rollout_rules import SCHEDULER_GROUP
from megaswift.data.prompts import PromptRow
from megaswift.data.sample import ROLES, Message, RowError, Sample
from megaswift.data.template import Template
from megaswift.errors import ConfigError, TrainingError, nearest
from megaswift.rollout.engine import Answer, Prompt, Sampling
from megaswift.rollout.rewards import functions_of, loaded

Scheduler = Callable[..., Any]
Complete = Callable[[Sequence[Prompt], Sampling], list[Answer]]

PLACE = "(the answer stands here)"  # in a rendered conversation; what follows it is what follows an answer


def load_scheduler(chosen: RolloutConfig) -> Scheduler | None:
    """Return what --multi_turn_scheduler names, FILE.py:NAME or an entry point; raises ConfigError."""
    asked = chosen.multi_turn_scheduler
    if asked is None:
        return None
    file, _, name = asked.rpartition(":")
    if file:
        own = functions_of(Path(file).expanduser(), asked="multi_turn_scheduler")
        if name not in own:
            raise ConfigError(f"multi_turn_scheduler={asked}: {file} has no {name}.{nearest(name, own)}")
        found = own[name]
    else:
        found = loaded(entry_points(group=SCHEDULER_GROUP)[name], asked="multi_turn_scheduler")
    return found() if isinstance(found, type) else found


@dataclass(kw_only=True)
class _Talk:
    """A conversation while it goes on."""

    prompt: Prompt
    row: PromptRow
    ids: list[int] = field(default_factory=list)  # after the prompt
    own: list[bool] = field(default_factory=list)  # which of them the model wrote
    logps: list[float] = field(default_factory=list)
    turns: list[Message] = field(default_factory=list)  # after the prompt
    stopped: bool = False
    goes_on: bool = True


@dataclass(frozen=True, kw_only=True)
class Talked(Answer):
    """A completion of several turns: `ids` are those of all turns, and `stopped` is said of the last."""

    turns: list[Message]


@dataclass(frozen=True, kw_only=True)
class Talks:
    """Leads conversations; `decode` makes texts of token ids, `max_length` is the longest document."""

    scheduler: Scheduler
    template: Template
    decode: Callable[[list[int]], str]
    max_turns: int | None
    max_length: int

    def lead(
        self, prompts: Sequence[Prompt], rows: Sequence[PromptRow], complete: Complete, sampling: Sampling
    ) -> list[Talked]:
        """Return whole conversations, each until it is over, cut off, or has no room for another answer.

        Raises TrainingError, which names the scheduler and the row.
        """
        talks = [_Talk(prompt=prompt, row=row) for prompt, row in zip(prompts, rows, strict=True)]
        turn, knows_logps = 0, True
        while going := [talk for talk in talks if talk.goes_on]:
            answers = complete([_next_prompt(talk, turn) for talk in going], sampling)
            turn += 1
            for talk, answer in zip(going, answers, strict=True):
                knows_logps &= answer.logps is not None
                self._take(talk, answer, is_last=turn == self.max_turns, room=sampling.max_tokens)
        return [
            Talked(
                ids=talk.ids,
                stopped=talk.stopped,
                logps=talk.logps if knows_logps else None,
                own=talk.own,
                turns=talk.turns,
            )
            for talk in talks
        ]

    def _take(self, talk: _Talk, answer: Answer, *, is_last: bool, room: int) -> None:
        """Append an answer, and what the scheduler says to it."""
        messages, text = [*talk.row.messages, *talk.turns], self.decode(answer.ids)
        talk.ids += answer.ids
        talk.own += [True] * len(answer.ids)
        talk.logps += answer.logps or []
        talk.turns.append({"role": "assistant", "content": text})
        talk.stopped, talk.goes_on = answer.stopped, False
        if is_last or not answer.stopped:
            return
        said = self._said(talk.row, messages, text)
        if not said:
            return
        ids = self._ids_of(talk, messages, said, last=answer.ids[-1])
        if len(talk.prompt.ids) + len(talk.ids) + len(ids) + room > self.max_length:
            return
        talk.ids += ids
        talk.own += [False] * len(ids)
        talk.logps += [0.0] * len(ids)
        talk.turns += said
        talk.goes_on = True

    def _said(self, row: PromptRow, messages: list[Message], text: str) -> list[Message]:
        try:
            value = self.scheduler(messages, text, **row.columns)
        except Exception as error:  # whatever a person's function raises is his to mend
            raise TrainingError(
                f"multi_turn_scheduler fails at {row.source}: {type(error).__name__}: {error}. Mend the scheduler or the row."
            ) from error
        said = value if isinstance(value, list) else [] if value is None else [value]
        said = [{"role": "user", "content": one} if isinstance(one, str) else one for one in said]
        if not all(isinstance(one, dict) and _is_of_an_environment(one) for one in said):
            raise TrainingError(
                f"multi_turn_scheduler returned {value!r} at {row.source}, not a text, messages with a role (user, tool or system) "
                "and a content, or None. Mend the scheduler."
            )
        return said

    def _ids_of(self, talk: _Talk, messages: list[Message], said: list[Message], *, last: int) -> list[int]:
        """Return the tokens between an answer, which ends with the token `last`, and the next."""
        answer = {"role": "assistant", "content": PLACE}
        try:
            text = self.template.prompt(Sample(source=talk.row.source, messages=(*messages, answer, *said)))
        except RowError as error:
            raise TrainingError(
                f"multi_turn_scheduler at {talk.row.source}: {error.reason}. Return messages that the chat template knows."
            ) from error
        rest = text.rpartition(PLACE)[2]
        ids: list[int] = self.template.encoder.encode([rest])[0].tolist()
        return ids[1:] if ids[:1] == [last] else ids


def _next_prompt(talk: _Talk, turn: int) -> Prompt:
    if not turn:
        return talk.prompt
    ids = np.concatenate([talk.prompt.ids, talk.ids]).astype(np.int32)
    return Prompt(ids=ids, key=(*talk.prompt.key, turn))


def _is_of_an_environment(message: dict[str, Any]) -> bool:
    return message.get("role") in set(ROLES) - {"assistant"} and isinstance(message.get("content"), str)
