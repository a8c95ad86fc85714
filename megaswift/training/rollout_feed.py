"""What one rank is fed when the model writes its own training data: parts of the rollouts (training/roller.py) that are its own."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from megatron.core import parallel_state

from megaswift.checkpoint.store import Checkpoint
from megaswift.config.rollout_rules import uses_of_a_generation
from megaswift.config.run import RunConfig
from megaswift.data.batches import BatchSettings, MicroBatch, TrainData
from megaswift.metadata.meta import ModelMeta
from megaswift.parallel.layout import Layout
from megaswift.rollout.rollout import Rollout
from megaswift.tasks.task import RunModel
from megaswift.training.author import completions_table
from megaswift.training.engine import Engine
from megaswift.training.feed import TrainFeed
from megaswift.training.guides import Guides
from megaswift.training.roller import Roller
from megaswift.training.setup import Sets

KEPT = "rollout"  # the folder of a checkpoint with completions that are not used up
MADE_WITH = "made_with.json"  # there
# Settings of RolloutConfig that completions are only learnt with, or that are of others.
OF_THE_LOSS = (
    "importance_sampling_level",
    "epsilon",
    "epsilon_high",
    "delta",
    "off_policy_sequence_mask_delta",
    "top_entropy_quantile",
    "log_entropy",
    "log_completions",
    "num_generations_eval",
)
GUIDES = (
    "ref_model",
    "mcore_ref_model",
    "ref_adapters",
    "teacher_model",
    "teacher_model_server",
    "teacher_tag_key",
)


class RolloutFeed(TrainFeed):
    """This data-parallel rank's share of the completions of each step's prompts; every rank of the world calls it alike."""

    phase, patient = "generating completions", True

    def __init__(
        self,
        data: TrainData,
        roller: Roller,
        *,
        settings: BatchSettings,
        dp_rank: int,
        dp: int,
        kept: Rollout | None = None,
    ) -> None:
        """`data` are the prompts, `settings` those of batches of completions; `kept` may be what a checkpoint was amidst."""
        super().__init__(data, dp_rank=dp_rank, dp=dp)
        self.roller, self._settings, self._rollout = roller, settings, kept
        chosen = roller.run.rollout
        self._iterations, self._uses = chosen.num_iterations, uses_of_a_generation(chosen)

    def batch(self, consumed: int) -> list[MicroBatch]:
        """Return the micro batches of the step that follows `consumed` prompts, each counted as often as it is used."""
        position, part = self._place(consumed)
        size, parts = self._settings.global_batch_size, self._uses // self._iterations
        if self._rollout is None or (self._rollout.position, len(self._rollout)) != (position, parts * size):
            firsts = range(position, position + parts * self.items_per_step, self.items_per_step)
            entries = np.concatenate([self.roller.prompts.items(first) for first in firsts])
            step = consumed // self.items_per_step + 1
            self._rollout = None  # memory for the next one
            self._rollout = self.roller.roll(entries, position=position, step=step)
        return list(
            self._rollout.parts(size)[part].micro_batches(
                self._settings, dp_rank=self._dp_rank, dp=self._dp, pad_id=self.roller.pad_id
            )
        )

    def _place(self, consumed: int) -> tuple[int, int]:
        """Return the first prompt of the generation that a step learns from, and which part of its completions it takes.

        All parts have their turn, and then, in further iterations, again.
        """
        use = consumed // self.items_per_step % self._uses
        position = (consumed - use * self.items_per_step) // self._iterations
        return position, use % (self._uses // self._iterations)

    def epoch(self, consumed: int) -> float:
        """Return how often the prompts were seen."""
        return super().epoch(consumed) / self._iterations

    def epochs_done(self, consumed: int) -> int:
        """Return how many epochs of prompts ended with the items before."""
        return super().epochs_done(consumed) // self._iterations

    def sample_ids(self, consumed: int) -> list[int]:
        """Return the prompts of the step that follows `consumed`."""
        position, part = self._place(consumed)
        return super().sample_ids(position + part * self.items_per_step)

    def figures(self) -> dict[str, float]:
        """Return rewards and lengths of the newest completions."""
        assert self._rollout is not None, "asked after a step"
        return self._rollout.figures(self.roller.names, self.roller.weights)

    def writers(self) -> dict[str, Callable[[Path], None]]:
        """Return what writes the completions that later steps use again."""
        return {KEPT: self._save} if self._uses > 1 else {}

    def _save(self, folder: Path) -> None:
        if self._rollout is not None and dist.get_rank() == 0:
            self._rollout.save(folder)
            made = json.dumps(made_with(self.roller.run), indent=1)
            (folder / MADE_WITH).write_text(made + "\n", encoding="utf-8")


def rollout_feed(
    run: RunConfig,
    meta: ModelMeta,
    layout: Layout,
    engine: Engine,
    sets: Sets,
    guides: Guides,
    *,
    checkpoint: Checkpoint | None,
    run_model: RunModel,
    group: Any,
) -> RolloutFeed:
    """Return the feed of a resolved run; `checkpoint` is the one that it goes on from. Every rank calls it; raises UserError."""
    assert sets.rows is not None and isinstance(sets.train, TrainData), "the rows are prompts"
    roller = Roller(
        run=run,
        meta=meta,
        layout=layout,
        engine=engine,
        prompts=sets.train,
        rows=sets.rows,
        held_back=sets.held_back,
        settings=sets.settings,
        run_model=run_model,
        group=group,
        guides=guides,
        table=completions_table(run, checkpoint),
    )
    return RolloutFeed(
        sets.train,
        roller,
        settings=sets.settings,
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp=layout.dp,
        kept=None if checkpoint is None else _kept(run, checkpoint),
    )


def _kept(run: RunConfig, checkpoint: Checkpoint) -> Rollout | None:
    """Return the completions that a checkpoint was amidst; None where this run would make others, which it does then."""
    file = checkpoint.folder / KEPT / MADE_WITH
    if not file.is_file() or json.loads(file.read_text(encoding="utf-8")) != made_with(run):
        return None
    return Rollout.load(checkpoint.folder / KEPT)


def made_with(run: RunConfig) -> dict[str, Any]:
    """Return the settings that completions, their rewards and what they are compared with follow from, as JSON has them."""
    rollout = {name: value for name, value in asdict(run.rollout).items() if name not in OF_THE_LOSS}
    guides = {name: getattr(run.preference, name) for name in GUIDES}
    return {
        "rollout": rollout,
        "reward": asdict(run.reward),
        "guides": guides,
        "compares": bool(run.preference.beta),
        "use_vllm": run.sampler.use_vllm,
    }
