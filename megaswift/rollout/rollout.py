"""Completions of the prompts of one step, and what the loss needs to know of them, in flat arrays that are the same on every rank.

Letters: N completions, those of a prompt next to each other; T tokens of all prompts with their completions; F reward functions; S tokens
of a micro batch; L layers with experts, K experts of a token.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megaswift.data.batches import BatchSettings, MicroBatch, TrainData, all_packed
from megaswift.data.encode import EncodedSet
from megaswift.rollout.engine import Answer

FILE = "rollout.npz"
# Arrays of a Rollout by what their entries are of.
OF_COMPLETIONS = ("prompt_lengths", "stopped", "targets", "rewards", "advantages")
OF_TOKENS = ("input_ids", "own", "old_logps", "reference_logps", "sampler_logps", "teacher_logps", "experts")
# What is logged of completions' lengths, under TRL's names.
LENGTHS = ("completions/mean_length", "completions/max_length", "completions/clipped_ratio")


@dataclass(frozen=True, kw_only=True)
class Completions:
    """Prompts, each with a completion."""

    input_ids: np.ndarray  # int32 [T]
    starts: np.ndarray  # int64 [N + 1]
    prompt_lengths: np.ndarray  # int64 [N]
    stopped: np.ndarray  # bool [N]: ended by itself
    own: np.ndarray | None = None  # bool [T]: what the model wrote; None: all behind the prompts
    trains_cut: bool = True  # completions that were cut off carry loss
    targets: np.ndarray | None = None  # float32 [N]: what the rows of the prompts say beside their text

    def __len__(self) -> int:
        return len(self.prompt_lengths)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens that the model wrote, int64 [N]."""
        if self.own is not None:
            return np.add.reduceat(self.own.astype(np.int64), self.starts[:-1])
        return np.diff(self.starts) - self.prompt_lengths

    @cached_property
    def encoded(self) -> EncodedSet:
        """The documents; completions carry loss."""
        weights = np.zeros(len(self.input_ids), np.uint8)
        for number in np.flatnonzero(self.stopped | self.trains_cut):
            some = slice(self.starts[number] + self.prompt_lengths[number], self.starts[number + 1])
            weights[some] = 1 if self.own is None else self.own[some]
        return EncodedSet(
            input_ids=self.input_ids,
            loss_weights=weights,
            starts=self.starts,
            samples=np.arange(len(self)),
            targets=self.targets,
        )

    def micro_batches(
        self, settings: BatchSettings, *, dp_rank: int, dp: int, pad_id: int
    ) -> Iterator[MicroBatch]:
        """Yield the micro batches of one data-parallel rank; `settings.global_batch_size` is N, packed or not."""
        if settings.packing:
            batches = all_packed(self.encoded, settings, dp_rank=dp_rank, dp=dp, pad_id=pad_id)
        else:
            data = TrainData(self.encoded, replace(settings, shuffle=False), pad_id=pad_id)
            batches = data.micro_batches(0, dp_rank=dp_rank, dp=dp)
        yield from batches

    def length_figures(self) -> dict[str, float]:
        """Return what is logged of the lengths."""
        found = self.lengths.mean(), self.lengths.max(), 1 - self.stopped.mean()
        return dict(zip(LENGTHS, map(float, found), strict=True))


def joined(prompts: Sequence[np.ndarray], answers: Sequence[Answer]) -> dict[str, Any]:
    """Return the fields of Completions for prompts [N] and their answers."""
    documents = [
        np.concatenate([prompt, answer.ids]).astype(np.int32)
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    own = None
    if any(answer.own is not None for answer in answers):
        parts = [
            part
            for prompt, answer in zip(prompts, answers, strict=True)
            for part in (np.zeros(len(prompt), bool), answer.own or np.ones(len(answer.ids), bool))
        ]
        own = np.concatenate(parts)
    return {
        "own": own,
        "input_ids": np.concatenate(documents),
        "starts": np.cumsum([0, *map(len, documents)]),
        "prompt_lengths": np.array([len(prompt) for prompt in prompts]),
        "stopped": np.array([answer.stopped for answer in answers]),
    }


def first_experts(tokens: int, like: np.ndarray) -> np.ndarray:
    """Return the first K experts for so many tokens in every layer [tokens, L, K]: a token needs K different ones."""
    return np.broadcast_to(np.arange(like.shape[2], dtype=like.dtype), (tokens, *like.shape[1:]))


@dataclass(frozen=True, kw_only=True)
class Rollout(Completions):
    """Rewarded completions of one generation, those of a prompt next to each other."""

    position: int  # of the first prompt in the endless stream of prompts
    group: int  # completions of a prompt
    rewards: np.ndarray  # float64 [N, F]
    advantages: np.ndarray | None = None  # float32 [N]
    old_logps: np.ndarray | None = None  # float32 [T], of the completions' tokens, 0 elsewhere
    reference_logps: np.ndarray | None = None  # the same under the reference model
    sampler_logps: np.ndarray | None = None  # the same under what drew them, if not the model itself
    teacher_logps: np.ndarray | None = None  # the same under a teacher
    experts: np.ndarray | None = None  # uint8 or int16 [T, L, K], to be replayed

    @cached_property
    def encoded(self) -> EncodedSet:
        """The documents; advantages are their targets."""
        return replace(super().encoded, targets=self.advantages)

    def micro_batches(
        self, settings: BatchSettings, *, dp_rank: int, dp: int, pad_id: int
    ) -> Iterator[MicroBatch]:
        """Yield the micro batches of one data-parallel rank with log-probabilities at the places of the labels."""
        for batch in super().micro_batches(settings, dp_rank=dp_rank, dp=dp, pad_id=pad_id):
            yield replace(
                batch,
                old_logps=self._of_labels(batch, self.old_logps),
                reference_logps=self._of_labels(batch, self.reference_logps),
                sampler_logps=self._of_labels(batch, self.sampler_logps),
                teacher_logps=self._of_labels(batch, self.teacher_logps),
                experts=self._experts(batch),
            )

    def _of_labels(self, batch: MicroBatch, values_T: np.ndarray | None) -> torch.Tensor | None:
        """Return values of tokens at the places of the labels of a micro batch, float32 [1, S]."""
        if values_T is None:
            return None
        assert batch.cu_seqlens is not None, "checked by config/rollout_rules.py"
        found = torch.zeros(batch.input_ids.shape)
        for number, begin in zip(batch.sample_ids, batch.cu_seqlens.tolist(), strict=False):
            labels = values_T[self.starts[number] + 1 : self.starts[number + 1]]
            found[0, begin : begin + len(labels)] = torch.from_numpy(np.ascontiguousarray(labels))
        return found

    def _experts(self, batch: MicroBatch) -> torch.Tensor | None:
        """Return the experts of a micro batch's tokens [1, S, L, K]; padding goes to the first K."""
        if self.experts is None:
            return None
        assert batch.cu_seqlens is not None, "checked by config/rollout_rules.py"
        found = first_experts(batch.input_ids.shape[1], self.experts).copy()
        for number, begin in zip(batch.sample_ids, batch.cu_seqlens.tolist(), strict=False):
            own = self.experts[self.starts[number] : self.starts[number + 1]]
            found[begin : begin + len(own)] = own
        return torch.from_numpy(found)[None]

    def parts(self, size: int) -> list["Rollout"]:
        """Return all completions, so many at a time."""
        return [self._part(first, min(first + size, len(self))) for first in range(0, len(self), size)]

    def _part(self, first: int, last: int) -> "Rollout":
        own, tokens = slice(first, last), slice(self.starts[first], self.starts[last])
        cut: dict[str, Any] = {"starts": self.starts[first : last + 1] - self.starts[first]}
        for names, some in ((OF_COMPLETIONS, own), (OF_TOKENS, tokens)):
            for name in names:
                values = getattr(self, name)
                cut[name] = None if values is None else values[some]
        return replace(self, **cut)

    def figures(self, names: Sequence[str], weights: Sequence[float]) -> dict[str, float]:
        """Return what is logged, under TRL's names; `names` and `weights` are those of the reward functions, if there are some."""
        if not names:
            return self.length_figures()
        total_PG = (self.rewards @ np.array(weights)).reshape(-1, self.group)
        found = {"reward": float(total_PG.mean())}
        if self.group > 1:
            spread_P = total_PG.std(1, ddof=1)
            found["reward_std"] = float(spread_P.mean())
            found["frac_reward_zero_std"] = float((spread_P == 0).mean())
        for name, column in zip(names, self.rewards.T, strict=True):
            found[f"rewards/{name}/mean"] = float(column.mean())
            if len(column) > 1:
                found[f"rewards/{name}/std"] = float(column.std(ddof=1))
        return {**found, **self.length_figures()}

    def save(self, folder: Path) -> None:
        """Write the arrays into `folder`."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        np.savez(folder / FILE, **{name: value for name, value in values.items() if value is not None})

    @classmethod
    def load(cls, folder: Path) -> "Rollout | None":
        """Read what save() wrote; None where there is nothing."""
        if not (folder / FILE).is_file():
            return None
        with np.load(folder / FILE) as arrays:
            values = dict(arrays)
        position, group = int(values.pop("position")), int(values.pop("group"))
        trains_cut = bool(values.pop("trains_cut"))
        return cls(position=position, group=group, trains_cut=trains_cut, **values)
