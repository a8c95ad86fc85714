"""How unsure a model is of the tokens that carry loss, before a step of training: a forward pass without gradients.

Letters: B batch, S sequence, T tokens that carry loss, D model size.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.utils import unwrap_model

from megaswift.data.batches import MicroBatch
from megaswift.kernels.linear_divergence.ops import OutputLayer
from megaswift.kernels.linear_entropy.ops import linear_entropy
from megaswift.models.causal_lm import CausalLM
from megaswift.tasks.everyone import of_all_ranks
from megaswift.tasks.task import RunModel, look


def entropies_of(batches: list[MicroBatch], chunks: Sequence[Any], *, run: RunModel) -> list[torch.Tensor]:
    """Return the entropy of every token that carries loss, float32 [B, S] of each micro batch, 0 elsewhere.

    Only the last pipeline stage has them; others return []. Every rank of the world calls it alike.
    """
    models = [unwrap_model(chunk) for chunk in chunks]
    with _giving_states(models):
        return look(chunks, batches, partial(_entropies, models[-1]), run=run)


def _entropies(model: CausalLM, batch: MicroBatch, states_BSD: torch.Tensor) -> torch.Tensor:
    chosen_BS = (batch.loss_mask != 0).to(states_BSD.device, non_blocking=True)
    group = model.output_layer.tp_group
    entropies_T = linear_entropy(
        OutputLayer(
            hidden=states_BSD[chosen_BS],
            weight=model.output_weight,
            softcap=model.multipliers.logits_softcap,
        ),
        vocab_size=model.logical_vocab_size,
        group=group if group.size() > 1 else None,
    )
    return torch.zeros(chosen_BS.shape, device=states_BSD.device).masked_scatter(chosen_BS, entropies_T)


@contextmanager
def _giving_states(models: Sequence[CausalLM]) -> Iterator[None]:
    """Let models return hidden states instead of losses."""
    for model in models:
        model.gives_states = True
    try:
        yield
    finally:
        for model in models:
            model.gives_states = False


def quantile_of_all_ranks(
    batches: Sequence[MicroBatch], values: Sequence[torch.Tensor], share: float
) -> float:
    """Return the quantile of the values [B, S] of all tokens that carry loss, between two of them in proportion.

    Every rank of dp and cp calls it. What moves: all values, once around.
    """
    own_T = torch.cat(
        [
            values_BS[(batch.loss_mask != 0).to(values_BS.device)]
            for batch, values_BS in zip(batches, values, strict=True)
        ]
    )
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    sorted_T = of_all_ranks(own_T, group)[0].double().sort().values  # torch.quantile takes 16 million at most
    if not len(sorted_T):
        return 0.0
    place = share * (len(sorted_T) - 1)
    below, above = (float(sorted_T[number]) for number in (math.floor(place), math.ceil(place)))
    return below + (above - below) * (place - math.floor(place))
