"""Full training of a part of the model."""

from collections.abc import Sequence

from megaswift.config.freeze import FreezeConfig
from megaswift.converters.live import live_parameters
from megaswift.converters.selection import trained_tensors
from megaswift.metadata.meta import ModelMeta
from megaswift.models.causal_lm import CausalLM
from megaswift.models.first_gradient import let_gradients_begin
from megaswift.parallel.layout import Layout


def freeze(
    chunks: Sequence[CausalLM], meta: ModelMeta, layout: Layout, rank: int, chosen: FreezeConfig
) -> None:
    """Leave gradients to the parameters that `chosen` lets train; no rank talks to another. Raises ConfigError.

    Every rank computes the choice for the whole model, so that copies of a parameter on several ranks agree.
    """
    trained = trained_tensors(meta, chosen)
    for parameter in live_parameters(chunks, meta, layout, rank=rank):
        if parameter.planned.tensors[0] not in trained:
            parameter.holder.requires_grad_(False)
    for chunk in chunks:
        chunk.all_trains = chunk.layers_alike = False
        if chunk.pre_process:
            let_gradients_begin(chunk)
