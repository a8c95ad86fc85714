"""Makes rollouts: completions of prompts, rewarded and compared, with the log-probabilities that a loss needs.

The ranks that ask for completions (training/author.py) reward them at once. With the trained model as engine, sampling and
order depend on seed and position in the stream of prompts alone.

Letters: N completions, T tokens of all prompts with their completions.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from megaswift.config.reward_rules import reward_names, reward_weights
from megaswift.config.rollout_rules import uses_of_a_generation
from megaswift.config.run import RunConfig
from megaswift.data.batches import BatchSettings, TrainData
from megaswift.data.prompt_set import PromptSet
from megaswift.data.prompts import PromptRows
from megaswift.data.tokenizer import load_tokenizer, pad_id_of
from megaswift.metadata.meta import ModelMeta
from megaswift.models.lora import adapters_off
from megaswift.parallel.agreement import agree
from megaswift.parallel.layout import Layout
from megaswift.rollout.chosen_experts import told_experts
from megaswift.rollout.engine import Answer, Prompt
from megaswift.rollout.rollout import Rollout, joined
from megaswift.rollout.turns import Talked, Talks
from megaswift.tasks.advantages import advantages, decoupled_advantages
from megaswift.tasks.task import RunModel
from megaswift.training.author import Author, stop_ids_of
from megaswift.training.engine import Engine
from megaswift.training.guides import Guides
from megaswift.training.judge import Completion, Judge, load_judge, load_talks
from megaswift.training.log_probs import LogProbs
from megaswift.training.reporters import JsonLines
from megaswift.training.set_aside import room_for_authors

OTHERS = (0, 0, 1)  # behind seed, position and round: keys of completions go on otherwise


@dataclass(kw_only=True)
class Roller:
    """Makes rollouts. `group` holds all ranks and is patient."""

    run: RunConfig
    meta: ModelMeta
    layout: Layout
    engine: Engine
    prompts: TrainData
    rows: PromptRows  # behind the prompts
    held_back: PromptSet | None = None  # prompts that are not learnt from
    settings: BatchSettings
    run_model: RunModel
    group: Any
    guides: Guides
    table: JsonLines | None  # of completions; rank 0's, where they are logged

    def __post_init__(self) -> None:
        self.asked = PromptSet(encoded=self.prompts.encoded, rows=self.rows)
        self.names, self.weights = reward_names(self.run.reward), reward_weights(self.run.reward)
        folder, trust = str(self.meta.folder), self.run.model.trust_remote_code
        self.tokenizer = load_tokenizer(folder, trust_remote_code=trust)
        self.pad_id = pad_id_of(self.tokenizer)
        self.log_probs = LogProbs(
            self.settings, self.meta, self.layout, pad_id=self.pad_id, run_model=self.run_model
        )
        self.author = Author(
            self.run,
            self.meta,
            self.layout,
            [chunk.module for chunk in self.engine.chunks],
            stop_ids=stop_ids_of(self.meta, self.tokenizer),
            pad_id=self.pad_id,
            group=self.group,
            aside=room_for_authors(self.run, self.engine, self.guides.frozen),
        )
        self.judge = agree(self._load_judge, group=self.group)
        self.talks = agree(self._load_talks, group=self.group)

    def _load_judge(self) -> Judge:
        device, reports = next(self.engine.chunks[0].parameters()).device, self.author.seat.reports
        return load_judge(self.run, self.meta, self.tokenizer, device=device, reports=reports)

    def _load_talks(self) -> Talks | None:
        rows = [self.rows] if self.held_back is None else [self.rows, self.held_back.rows]
        return load_talks(self.run, rows, self.tokenizer, stop_ids=self.author.sampling.stop_ids)

    def roll(self, entries: np.ndarray, *, position: int, step: int) -> Rollout:
        """Return rewarded completions of these prompts; every rank of the world calls it. Raises UserError."""
        with self.engine.settled_parameters():
            found = self._completions(entries, position)
            entries, found = self._lively(entries, found, position)
            rollout = self._with_logps(self.joined(self.asked, entries, found, position=position))
        rollout = self._with_advantages(rollout)
        if self.table is not None:
            self.write(self.asked, entries, found, step=step, advantages=rollout.advantages)
        return rollout

    def _lively(
        self, entries: np.ndarray, found: list[Completion], position: int
    ) -> tuple[np.ndarray, list[Completion]]:
        """Replace groups without a spread of rewards, which teach nothing, by those of other prompts.

        Yu et al. 2025, DAPO (arXiv 2503.14476), section 3.2; which prompts they are follows from seed and position. Groups that
        are dull after --max_resample_times stay.
        """
        chosen, entries = self.run.rollout, entries.copy()
        for again in range(1, chosen.max_resample_times + 1) if chosen.dynamic_sample else ():
            dull = self._dull(found)
            if not dull:
                break
            seed = np.random.SeedSequence((self.run.training.seed, position, again, *OTHERS))
            random = np.random.Generator(np.random.Philox(seed))
            others = random.permutation(self.prompts.num_items)[: len(dull)]
            more, group = self._completions(others, position, again=again), chosen.num_generations
            lively = sorted(set(range(len(others))) - set(self._dull(more)))
            for place, other in zip(dull, lively, strict=False):
                entries[place] = others[other]
                found[place * group : (place + 1) * group] = more[other * group : (other + 1) * group]
        return entries, found

    def _dull(self, found: list[Completion]) -> list[int]:
        """Return the groups whose completions are all worth the same."""
        rewards_PG = (np.array([one.rewards for one in found]) @ np.array(self.weights)).reshape(
            -1, self.run.rollout.num_generations
        )
        return np.flatnonzero(rewards_PG.max(1) == rewards_PG.min(1)).tolist()

    def _completions(self, entries: np.ndarray, position: int, *, again: int = 0) -> list[Completion]:
        places = range(len(entries) * self.run.rollout.num_generations)
        return self.completions(self.asked, entries, [self._key(place, position, again) for place in places])

    def completions(
        self, asked: PromptSet, entries: np.ndarray, keys: Sequence[tuple[int, ...]]
    ) -> list[Completion]:
        """Return rewarded completions of prompts, a group for each; every key decides one, those of a prompt next to each other."""
        group = len(keys) // len(entries)
        prompts = [Prompt(ids=asked.ids(entries[place // group]), key=key) for place, key in enumerate(keys)]

        def judged(places: Sequence[int], answers: Sequence[Answer]) -> list[Completion]:
            return [
                one
                for start in range(0, len(places), group)
                for one in self.judge.judged(
                    asked.row(entries[places[start] // group]), answers[start : start + group]
                )
            ]

        talks = self.talks
        if talks is None:
            return self.author.write(prompts, judged, together=group)

        def lead(places: Sequence[int], prompts: Sequence[Prompt], *how: Any) -> list[Talked]:
            return talks.lead(prompts, [asked.row(entries[place // group]) for place in places], *how)

        return self.author.write(prompts, judged, together=group, lead=lead)

    def _key(self, place: int, position: int, again: int) -> tuple[int, ...]:
        """Return what decides a completion: the prompt's place in the endless stream of prompts, and its own in the group."""
        prompt, generation = divmod(place, self.run.rollout.num_generations)
        key = self.run.training.seed, position + prompt, generation
        return (*key, 0, again) if again else key  # a fourth number counts turns

    def joined(
        self, asked: PromptSet, entries: np.ndarray, found: list[Completion], *, position: int
    ) -> Rollout:
        """Return completions of prompts as they are learnt from, but for what is found out about them yet."""
        group, targets = len(found) // len(entries), asked.encoded.targets
        replays = self.run.rollout.router_replay_mode == "R3"
        prompts = [
            one.prompt(asked.ids(entry)) for entry, one in zip(np.repeat(entries, group), found, strict=True)
        ]
        return Rollout(
            targets=None if targets is None else np.repeat(targets[entries], group),
            **joined(prompts, [one.answer for one in found]),
            position=position,
            group=group,
            trains_cut=not self.run.rollout.overlong_filter,
            rewards=np.array([one.rewards for one in found], np.float64),
            sampler_logps=_sampler_logps(prompts, found),
            experts=told_experts(prompts, [one.answer for one in found], self.meta) if replays else None,
        )

    def _with_logps(self, rollout: Rollout) -> Rollout:
        """Add what the loss and the rewards compare with, as far as they do, and the experts that are to be replayed."""
        chosen, compares, guides = self.run.rollout, bool(self.run.preference.beta), self.guides
        reference = teacher = None
        unled = replace(rollout, experts=None)  # other models choose their own
        if compares and guides.reference is not None:
            reference = self.log_probs.of(unled, guides.reference)
        elif compares:
            with adapters_off(self.engine.chunks):
                reference = self.log_probs.of(unled, self.engine.chunks)
        if guides.teacher is not None:
            with guides.call_in():
                teacher = self.log_probs.of(unled, guides.teacher)
        elif guides.served is not None:
            teacher = guides.served.logps(rollout)
        rollout = replace(rollout, reference_logps=reference, teacher_logps=teacher)
        if chosen.router_replay_mode == "R2":
            old, experts = self.log_probs.with_experts(rollout, self.engine.chunks)
            return replace(rollout, old_logps=old, experts=experts)
        if uses_of_a_generation(chosen) > 1 or chosen.kl_in_reward:
            return replace(rollout, old_logps=self.log_probs.of(rollout, self.engine.chunks))
        return rollout

    def _with_advantages(self, rollout: Rollout) -> Rollout:
        if not self.names:  # a teacher is all there is
            return replace(rollout, advantages=np.zeros(len(rollout), np.float32))
        if self.run.rollout.scale_rewards == "gdpo":
            rewards_PGF = torch.from_numpy(rollout.rewards).unflatten(0, (-1, rollout.group))
            found_PG = decoupled_advantages(rewards_PGF, self.weights)
            return replace(rollout, advantages=found_PG.flatten().float().numpy())
        totals_N = rollout.rewards @ np.array(self.weights)
        if self.run.rollout.kl_in_reward:
            assert rollout.old_logps is not None and rollout.reference_logps is not None
            lead_T = rollout.old_logps.astype(np.float64) - rollout.reference_logps
            totals_N = totals_N - self.run.preference.beta * np.add.reduceat(lead_T, rollout.starts[:-1])
        found_PG = advantages(torch.from_numpy(totals_N).view(-1, rollout.group), self.run.rollout)
        return replace(rollout, advantages=found_PG.flatten().float().numpy())

    def write(
        self,
        asked: PromptSet,
        entries: np.ndarray,
        found: list[Completion],
        *,
        step: int,
        advantages: np.ndarray | None = None,
    ) -> None:
        """Write a line into the table for every completion; those of held-back prompts have no advantages."""
        assert self.table is not None
        rows = np.repeat(entries, len(found) // len(entries))
        for place, (entry, one) in enumerate(zip(rows, found, strict=True)):
            row, judged = asked.row(entry), one.judged
            self.table.report(
                {
                    "step": step,
                    "source": row.source,
                    "prompt": row.messages if judged.asked is None else judged.asked,
                    "completion": judged.text,
                    **({"turns": judged.turns} if self.talks is not None else {}),
                    **({"environment": judged.record} if judged.record is not None else {}),
                    "tokens": len(judged.ids),
                    "rewards": dict(zip(self.names, one.rewards, strict=True)),
                    **(
                        {"held_back": True} if advantages is None else {"advantage": float(advantages[place])}
                    ),
                }
            )


def _sampler_logps(prompts: Sequence[np.ndarray], found: Sequence[Completion]) -> np.ndarray | None:
    """Return the log-probability with which each token was drawn, float32 [T], 0 in prompts; None where the model itself drew."""
    parts = [
        part
        for prompt, one in zip(prompts, found, strict=True)
        if one.answer.logps is not None
        for part in (np.zeros(len(prompt), np.float32), np.array(one.answer.logps, np.float32))
    ]
    return np.concatenate(parts) if parts else None
