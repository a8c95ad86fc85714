"""Where the backward pass ends in a model that trains in part."""

from typing import Any

import torch

from megaswift.models.causal_lm import CausalLM


def let_gradients_begin(chunk: CausalLM) -> None:
    """Have the first layer that trains see an input with a gradient, as in full training.

    A recomputed part whose inputs need no gradient gives its output none (megatron/core/tensor_parallel/random.py, 0.16.1,
    CheckpointFunction), and fused layers may ask their input whether there is anything to compute. Below that layer nothing is
    kept for a backward pass, unless whole layers are recomputed: their chunks need a gradient from the bottom. Inputs of later
    pipeline stages always have one.
    """
    trained = [
        layer for layer in chunk.decoder.layers if any(one.requires_grad for one in layer.parameters())
    ]
    if trained and chunk.config.recompute_granularity == "full":
        chunk.embedding.register_forward_hook(lambda module, inputs, output: output.requires_grad_(True))
    elif trained:
        trained[0].register_forward_pre_hook(_with_gradient, with_kwargs=True)


def _with_gradient(layer: Any, args: Any, kwargs: Any) -> None:
    if torch.is_grad_enabled():
        hidden_states = args[0] if args else kwargs["hidden_states"]
        hidden_states.requires_grad_(True)
