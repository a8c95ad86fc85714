"""Reward models: one number for an answer, learnt from which of two answers is better.

With r_w and r_l the rewards of the chosen and the rejected answer and m the margin of the pair (0 where it has none):
L = -log sigmoid(r_w - r_l - m)     Ouyang et al. 2022 (arXiv 2203.02155), eq. 1; margin: Touvron et al. 2023 (arXiv 2307.09288), eq. 2
  + c * (r_w + r_l)^2               center_rewards_coefficient: Eisenstein et al. 2023 (arXiv 2312.09244), eq. 2
The reward is the score of the last token that is not padding, where transformers' sequence classification reads it.

Letters: B rows, S tokens of a row, N documents of a micro batch, P pairs: N = 2P.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F

from megaswift.config.preference import PreferenceConfig
from megaswift.data.batches import MicroBatch
from megaswift.errors import ConfigError
from megaswift.metadata.meta import ModelMeta
from megaswift.tasks.answers import Outcome
from megaswift.tasks.preference import rows_loss
from megaswift.tasks.task import Loss, RunModel, run_model

METRICS = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")


class RewardModel:
    """The task of `megaswift rlhf --rlhf_type rm`."""

    metrics: Sequence[str] = METRICS

    def __init__(self, settings: PreferenceConfig, *, pad_id: int, run: RunModel = run_model) -> None:
        """`pad_id` is the token that does not count as an answer's last: the exported model's pad_token_id."""
        self._settings, self._pad_id, self._run = settings, pad_id, run

    def prepare(self, batches: list[MicroBatch], chunks: Sequence[Any]) -> list[MicroBatch]:
        """Return the batches as they are."""
        return batches

    def forward_step(self, data_iterator: Iterator[MicroBatch], model: Any) -> tuple[torch.Tensor, Any]:
        """Run one micro batch through a model whose output layer is a ScoreHead."""
        batch = next(data_iterator)
        return self._run(batch, model), partial(self._pairs_loss, batch)

    def summary(self, means: dict[str, float]) -> dict[str, float]:
        """Return the means as they are."""
        return means

    def _pairs_loss(self, batch: MicroBatch, scores_BS1: torch.Tensor) -> Loss:
        rewards_N = last_scores(batch, scores_BS1, pad_id=self._pad_id)
        margins = None if batch.targets is None else batch.targets.to(rewards_N)
        outcome = rm_loss(rewards_N, margins, self._settings)
        return rows_loss(outcome, loss_tokens=torch.tensor(float(rewards_N.numel())).to(rewards_N))


def last_scores(batch: MicroBatch, scores_BS1: torch.Tensor, *, pad_id: int) -> torch.Tensor:
    """Return the score of each document's last token that is not `pad_id`, float64 [N]."""
    rows, seq_len = batch.input_ids.shape
    if batch.cu_seqlens is None:
        bounds = [(row * seq_len, (row + 1) * seq_len) for row in range(rows)]
    else:
        ends = batch.cu_seqlens.tolist()
        bounds = list(pairwise(ends))[: len(batch.sample_ids)]
    counts = (batch.input_ids != pad_id).reshape(-1)
    last = [start + int(counts[start:end].nonzero().max()) for start, end in bounds]
    return scores_BS1.reshape(-1)[torch.tensor(last, dtype=torch.long, device=scores_BS1.device)].double()


def rm_loss(rewards_N: torch.Tensor, margins_P: torch.Tensor | None, settings: PreferenceConfig) -> Outcome:
    """Return the loss of every pair; a margin that is nan is 0."""
    chosen_P, rejected_P = rewards_N[0::2], rewards_N[1::2]
    lead_P = chosen_P - rejected_P
    losses_P = -F.logsigmoid(lead_P if margins_P is None else lead_P - margins_P.nan_to_num(0.0))
    if settings.center_rewards_coefficient is not None:
        losses_P = losses_P + settings.center_rewards_coefficient * (chosen_P + rejected_P).square()
    metrics = {
        "rewards/chosen": chosen_P,
        "rewards/rejected": rejected_P,
        "rewards/margins": lead_P,
        "rewards/accuracies": (lead_P > 0).double(),
    }
    return Outcome(losses_R=losses_P, metrics={name: values.detach() for name, values in metrics.items()})


def as_reward_model(meta: ModelMeta, *, pad_id: int) -> ModelMeta:
    """Return the facts of the model with a ScoreHead, and a config.json that transformers opens for sequence classification.

    Raises ConfigError where transformers has no such class for the model.
    """
    from transformers.models.auto import modeling_auto  # seconds, and only reward models pay them

    name = modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.get(meta.model_type)
    if name is None:
        raise ConfigError(
            f"rlhf_type=rm: transformers has no sequence classification for model_type={meta.model_type}, so its reward model could "
            "not be opened. Choose another model."
        )
    changes = {
        "architectures": [name],
        "num_labels": 1,
        "id2label": {"0": "LABEL_0"},
        "label2id": {"LABEL_0": 0},
        "pad_token_id": pad_id,
    }
    return replace(
        meta,
        scores=True,
        tied_embeddings=False,
        lm_head_bias=False,
        multipliers=replace(meta.multipliers, logits=1.0, logits_softcap=None),
        architecture=name,
        raw={**meta.raw, **changes},
    )
