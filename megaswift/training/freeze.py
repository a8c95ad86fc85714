"""Training a part of the model in full, alone or beside adapters."""

from collections.abc import Sequence

from megaswift.config.freeze import FreezeConfig
from megaswift.config.tuner import TunerConfig
from megaswift.converters.live import live_parameters
from megaswift.converters.lora_targets import whole_tensors
from megaswift.converters.selection import trained_tensors
from megaswift.metadata.meta import ModelMeta
from megaswift.models.causal_lm import CausalLM
from megaswift.models.first_gradient import let_gradients_begin
from megaswift.parallel.layout import Layout


def open_modules(
    chunks: Sequence[CausalLM], meta: ModelMeta, layout: Layout, rank: int, tuner: TunerConfig
) -> None:
    """Let the modules of --modules_to_save train beside the adapters; no rank talks to another. Raises ConfigError."""
    whole = whole_tensors(meta, tuner)
    for parameter in live_parameters(chunks, meta, layout, rank=rank):
        if parameter.planned.tensors[0] in whole:
            parameter.holder.requires_grad_(True)
    for chunk in chunks:
        chunk.layers_alike = chunk.layers_alike and not tuner.modules_to_save
        if chunk.pre_process and chunk.config.recompute_granularity is not None:
            let_gradients_begin(chunk)


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
