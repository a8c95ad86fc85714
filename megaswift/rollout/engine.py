"""What generates completions: token ids in, token ids and their log-probabilities out, with weights that the trainer hands over.

The trained model by itself is one such engine (rollout/generate.py), vLLM in the same process or behind HTTP are two more.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

Weights = Iterator[
    tuple[str, torch.Tensor]
]  # tensors under the names of the model's file, each once, in any order


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen, and when a completion ends."""

    temperature: float
    top_p: float  # 1: all tokens
    top_k: int  # below 1: all tokens
    max_tokens: int
    stop_ids: tuple[int, ...]
    repetition_penalty: float = 1.0  # of tokens that the prompt or the completion holds already


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One completion that is asked for; several of the same ids differ in their key."""

    ids: np.ndarray  # int32 [tokens]
    key: tuple[int, ...]  # decides what is drawn: the same key draws the same


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A completion."""

    ids: list[int]  # with the token at which it stopped
    stopped: bool  # at one of stop_ids, not for want of room
    own: list[bool] | None = (
        None  # which ids the model wrote, not an environment between its turns; None: all
    )
    # log of the probability with which each token was drawn, after temperature, top_k and top_p; None: the trained model's own
    logps: list[float] | None = None
    # [tokens - 1, layers, experts of a token], of the prompt and all ids but the last, in all layers or in those with experts; None:
    # not told
    experts: np.ndarray | None = None


class RolloutEngine(Protocol):
    """Answers prompts with the weights that it was given last; raises UserError."""

    adapts: bool  # takes an adapter, and answers with it, once it has the base model

    def load(self, weights: Weights, adapter: str | None = None) -> None:
        """Take the weights of the whole model, or those of the adapter that this adapter_config.json describes.

        Needs not exhaust `weights` where it fails.
        """
        ...

    def complete(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Answer]:
        """Return one completion of each prompt."""
        ...

    def rest(self) -> None:
        """Give back what is not needed until the next load()."""
        ...


ADAPTER = "megaswift"  # what vLLM calls the adapter that is trained; the first and only one, so that its number is 1


@dataclass(frozen=True, kw_only=True)
class Seat:
    """What one rank of the trainer does when completions are generated; prompts are dealt to `of` engines in turn."""

    number: int  # of the engine that this rank belongs to
    of: int
    loads: bool  # hands weights to the engine
    answers: bool  # calls it
    reports: bool  # tells the other ranks what it said; one rank an engine does


def seed_of(prompt: Prompt) -> int:
    """Return a seed of 63 bits that the key decides, for engines that draw by themselves."""
    return int(np.random.SeedSequence(prompt.key).generate_state(1, np.uint64)[0] >> 1)
