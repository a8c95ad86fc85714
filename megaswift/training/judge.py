"""What completions are worth: reward functions, reward models and environments, on the ranks that ask for completions."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megaswift.config.environment_rules import has_environments
from megaswift.config.run import RunConfig
from megaswift.converters.live import TORCH_DTYPES
from megaswift.converters.tensor_files import DTYPE_NAMES
from megaswift.data.prompts import PromptRow, PromptRows
from megaswift.data.template import Template
from megaswift.metadata.meta import ModelMeta
from megaswift.rollout.engine import Answer
from megaswift.rollout.environments import Environments, load_environments
from megaswift.rollout.rewards import Judged, RewardFunction, load_rewards, rewards_of
from megaswift.rollout.turns import Talked, Talks, load_scheduler


@dataclass(frozen=True, kw_only=True)
class Completion:
    """What one rank tells the others about a completion."""

    answer: Answer
    judged: Judged
    rewards: list[float]

    def prompt(self, given: np.ndarray) -> np.ndarray:
        """Return what it completes: the prompt that was `given`, unless an environment began otherwise."""
        return self.answer.prompt if isinstance(self.answer, Talked) else given


@dataclass(frozen=True, kw_only=True)
class Judge:
    """Rewards completions; environments reward theirs by themselves."""

    rewards: dict[str, RewardFunction]
    tokenizer: Any

    def judged(self, row: PromptRow, answers: Sequence[Answer]) -> list[Completion]:
        """Return the completions of one row with their rewards; raises UserError."""
        judged = [self._as_judged(answer) for answer in answers]
        of_functions = rewards_of(self.rewards, row, judged)
        found = []
        for number, (answer, one) in enumerate(zip(answers, judged, strict=True)):
            rewards = [values[number] for values in of_functions]
            if one.record is not None:
                rewards.append(one.record["total_reward"])
            found.append(Completion(answer=answer, judged=one, rewards=rewards))
        return found

    def _as_judged(self, answer: Answer) -> Judged:
        if isinstance(answer, Talked):
            own = [token for token, is_own in zip(answer.ids, answer.own or (), strict=True) if is_own]
            return Judged(ids=own, turns=answer.turns, asked=answer.asked, record=answer.record)
        text = self.tokenizer.decode(answer.ids, skip_special_tokens=True)
        return Judged(ids=answer.ids, turns=[{"role": "assistant", "content": text}])


def load_judge(
    run: RunConfig, meta: ModelMeta, tokenizer: Any, *, device: torch.device, reports: bool
) -> Judge:
    """Return reward functions, and where this rank `reports` what completions are worth the reward models. Raises UserError."""
    functions, wanted = load_rewards(run.reward), run.reward.reward_model
    if not wanted or not reports:
        return Judge(rewards=functions, tokenizer=tokenizer)
    from megaswift.rollout.reward_models import load_reward_models  # transformers' models: seconds

    dtype = TORCH_DTYPES[DTYPE_NAMES[run.model.torch_dtype or meta.dtype]]
    models = load_reward_models(run, device=device, dtype=dtype)
    return Judge(rewards={**functions, **models}, tokenizer=tokenizer)


def load_talks(
    run: RunConfig, rows: Sequence[PromptRows], tokenizer: Any, *, stop_ids: tuple[int, ...]
) -> Talks | None:
    """Return what leads conversations of several turns about any of `rows`, where there are any; raises UserError."""
    environments = _environments(run, rows) if has_environments(run.reward) else None
    scheduler = load_scheduler(run.rollout) if environments is None else None
    if scheduler is None and environments is None:
        return None
    assert run.data.max_length is not None, "resolved"
    return Talks(
        scheduler=scheduler,
        environments=environments,
        template=Template.from_config(run.data, tokenizer, max_length=None, stop_ids=stop_ids),
        decode=partial(tokenizer.decode, skip_special_tokens=True),
        max_turns=run.rollout.max_turns,
        max_length=run.data.max_length,
    )


def _environments(run: RunConfig, rows: Sequence[PromptRows]) -> Environments:
    environments = load_environments(run.reward)
    for some in rows if dist.get_rank() == 0 else ():  # one looks at the rows for all
        environments.check(some)
    return environments
