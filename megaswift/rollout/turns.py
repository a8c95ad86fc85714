"""Conversations of several turns: what a person's scheduler or environment says to a completion is appended to the kept token ids,
and the model goes on from there.

A scheduler is a function, or a class without arguments whose objects are called: scheduler(messages, completion, **columns) gets
the conversation so far, what the model wrote now, and the other columns of the row. It returns the next message, or several,
or None where the conversation is over; a text is a user's message. What it says carries no loss. It is asked on every rank that
asks the engine, and after a resume again: to the same conversation it must say the same. Environments (rollout/environments.py)
say what a conversation begins with, too, and what its turns are worth.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from megaswift.config.rollout import RolloutConfig
from megaswift.config.rollout_rules import SCHEDULER_GROUP
from megaswift.data.prompts import PromptRow, encode_prompts
from megaswift.data.sample import ROLES, Message, RowError
from megaswift.data.template import Template
from megaswift.errors import TrainingError
from megaswift.rollout.engine import Answer, Prompt, Sampling
from megaswift.rollout.environments import Environments
from megaswift.rollout.episodes import Episode, Episodes, begun
from megaswift.rollout.rewards import function_named

Scheduler = Callable[..., Any]
Complete = Callable[[Sequence[Prompt], Sampling], list[Answer]]
Replies = Callable[[Sequence["_Talk"]], list[Any]]  # what is said to the last answers, None: nothing

PLACE = "(the answer stands here)"  # in a rendered conversation; what follows it is what follows an answer


def load_scheduler(chosen: RolloutConfig) -> Scheduler | None:
    """Return what --multi_turn_scheduler names, FILE.py:NAME or an entry point; raises ConfigError."""
    asked = chosen.multi_turn_scheduler
    if asked is None:
        return None
    found = function_named(asked, asked="multi_turn_scheduler", group=SCHEDULER_GROUP)
    return found() if isinstance(found, type) else found


@dataclass(kw_only=True)
class _Talk:
    """A conversation while it goes on."""

    prompt: Prompt
    row: PromptRow
    asked: tuple[Message, ...]  # what the prompt is made of
    episode: Episode | None = None
    ids: list[int] = field(default_factory=list)  # after the prompt
    own: list[bool] = field(default_factory=list)  # which of them the model wrote
    logps: list[float] = field(default_factory=list)
    turns: list[Message] = field(default_factory=list)  # after the prompt
    experts: np.ndarray | None = None  # as in Answer, of the newest answer and all before it
    stopped: bool = False
    goes_on: bool = True

    @property
    def messages(self) -> list[Message]:
        """All that was said."""
        return [*self.asked, *self.turns]


@dataclass(frozen=True, kw_only=True)
class Talked(Answer):
    """A completion of several turns: `ids` are those of all turns, and `stopped` is said of the last."""

    prompt: np.ndarray  # int32: the row's, or what its environment began with
    asked: tuple[Message, ...]  # what that is made of
    turns: list[Message]
    record: dict[str, Any] | None  # of an environment: Episode.record


@dataclass(frozen=True, kw_only=True)
class Talks:
    """Leads conversations; `decode` makes texts of token ids, `max_length` is the longest document.

    Either the scheduler or environments answer.
    """

    scheduler: Scheduler | None = None
    environments: Environments | None = None
    template: Template
    decode: Callable[[list[int]], str]
    max_turns: int | None
    max_length: int

    def lead(
        self, prompts: Sequence[Prompt], rows: Sequence[PromptRow], complete: Complete, sampling: Sampling
    ) -> list[Talked]:
        """Return whole conversations, each until it is over, cut off, or has no room for another answer.

        Raises UserError, which names the scheduler or the environment, and the row.
        """
        if self.environments is None:
            talks = [
                _Talk(prompt=prompt, row=row, asked=row.messages)
                for prompt, row in zip(prompts, rows, strict=True)
            ]
            return self._lead(talks, self._scheduled, complete, sampling)
        with begun(self.environments, rows) as episodes:
            talks = [
                self._opened(prompt, episode, room=self.max_length - sampling.max_tokens)
                for prompt, episode in zip(prompts, episodes.each, strict=True)
            ]
            return self._lead(talks, partial(_stepped, episodes), complete, sampling)

    def _opened(self, prompt: Prompt, episode: Episode, *, room: int) -> _Talk:
        """Return a conversation that begins as its environment says."""
        row, asked = episode.row, episode.asked
        if asked != row.messages:
            found = encode_prompts(self.template, [row.sample(asked)])[0]
            if isinstance(found, RowError):
                raise TrainingError(
                    f"gym_env={episode.name} at {row.source}: {found.reason}. Begin with what the chat template knows."
                )
            prompt = replace(prompt, ids=found[0].input_ids)
        if len(prompt.ids) > room:
            raise TrainingError(
                f"gym_env={episode.name} begins with {len(prompt.ids)} tokens at {row.source}, and max_length={self.max_length} leaves room "
                f"for {room} before the first answer. Raise --max_length."
            )
        return _Talk(prompt=prompt, row=row, asked=asked, episode=episode)

    def _lead(
        self, talks: list[_Talk], replies: Replies, complete: Complete, sampling: Sampling
    ) -> list[Talked]:
        turn, knows_logps = 0, True
        while going := [talk for talk in talks if talk.goes_on]:
            answers = complete([_next_prompt(talk, turn) for talk in going], sampling)
            turn += 1
            for talk, answer in zip(going, answers, strict=True):
                knows_logps &= answer.logps is not None
                self._take(talk, answer, is_last=turn == self.max_turns)
            for talk, value in zip(going, replies(going), strict=True):
                self._go_on(talk, _messages_of(talk, value), room=sampling.max_tokens)
        return [
            Talked(
                prompt=talk.prompt.ids,
                asked=talk.asked,
                ids=talk.ids,
                stopped=talk.stopped,
                logps=talk.logps if knows_logps else None,
                own=talk.own,
                experts=talk.experts,
                turns=talk.turns,
                record=None if talk.episode is None else talk.episode.record,
            )
            for talk in talks
        ]

    def _take(self, talk: _Talk, answer: Answer, *, is_last: bool) -> None:
        """Append an answer."""
        talk.ids += answer.ids
        talk.own += [True] * len(answer.ids)
        talk.logps += answer.logps or []
        talk.experts = answer.experts
        talk.turns.append({"role": "assistant", "content": self.decode(answer.ids)})
        talk.stopped, talk.goes_on = answer.stopped, answer.stopped and not is_last

    def _go_on(self, talk: _Talk, said: list[Message], *, room: int) -> None:
        """Append what is said to an answer, unless that was the last."""
        if not talk.goes_on:
            return
        talk.goes_on = False
        if not said:
            return
        ids = self._ids_of(talk, said)
        if len(talk.prompt.ids) + len(talk.ids) + len(ids) + room > self.max_length:
            return
        talk.ids += ids
        talk.own += [False] * len(ids)
        talk.logps += [0.0] * len(ids)
        talk.turns += said
        talk.goes_on = True

    def _scheduled(self, talks: Sequence[_Talk]) -> list[Any]:
        """Return what the scheduler says, where a conversation may go on."""
        return [self._of_scheduler(talk) if talk.goes_on else None for talk in talks]

    def _of_scheduler(self, talk: _Talk) -> Any:
        assert self.scheduler is not None, "or environments are asked"
        *before, answer = talk.messages
        try:
            return self.scheduler(before, answer["content"], **talk.row.columns)
        except Exception as error:  # whatever a person's function raises is his to mend
            raise TrainingError(
                f"multi_turn_scheduler fails at {talk.row.source}: {type(error).__name__}: {error}. Mend the scheduler or the row."
            ) from error

    def _ids_of(self, talk: _Talk, said: list[Message]) -> list[int]:
        """Return the tokens between an answer and the next."""
        answer = {"role": "assistant", "content": PLACE}
        try:
            text = self.template.prompt(talk.row.sample([*talk.messages[:-1], answer, *said]))
        except RowError as error:
            raise TrainingError(
                f"{_who(talk)} at {talk.row.source}: {error.reason}. Return messages that the chat template knows."
            ) from error
        rest = text.rpartition(PLACE)[2]
        ids: list[int] = self.template.encoder.encode([rest])[0].tolist()
        return ids[1:] if ids[:1] == talk.ids[-1:] else ids


def _stepped(episodes: Episodes, talks: Sequence[_Talk]) -> list[Any]:
    """Return what environments say, which are asked about the last answers too, for their rewards."""
    return episodes.together([talk.episode.step(talk.messages) for talk in talks if talk.episode is not None])


def _messages_of(talk: _Talk, value: Any) -> list[Message]:
    """Return what was said to an answer as messages; none where the conversation is over."""
    said = value if isinstance(value, list) else [] if value is None else [value]
    said = [{"role": "user", "content": one} if isinstance(one, str) else one for one in said]
    if not all(isinstance(one, dict) and _is_of_an_environment(one) for one in said):
        raise TrainingError(
            f"{_who(talk)} returned {value!r} at {talk.row.source}, not a text, messages with a role (user, tool or system) and a "
            "content, or None. Mend it."
        )
    return said


def _who(talk: _Talk) -> str:
    return "multi_turn_scheduler" if talk.episode is None else f"gym_env={talk.episode.name}"


def _next_prompt(talk: _Talk, turn: int) -> Prompt:
    if not turn:
        return talk.prompt
    ids = np.concatenate([talk.prompt.ids, talk.ids]).astype(np.int32)
    return Prompt(ids=ids, key=(*talk.prompt.key, turn))


def _is_of_an_environment(message: dict[str, Any]) -> bool:
    return message.get("role") in set(ROLES) - {"assistant"} and isinstance(message.get("content"), str)
