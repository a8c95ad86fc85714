"""What layers get beside the hidden state: an input of their own (Gemma's per-layer embeddings), keys and values of an earlier layer.

Letters: S sequence of this rank, B batch, D model size, L layers, P size of one layer's input, G kv groups, K head size.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core.tensor_parallel.layers import VocabParallelEmbedding
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig

from megaswift.metadata.meta import ModelMeta
from megaswift.models.branch import ScaledLayer
from megaswift.models.linear import WholeLinear
from megaswift.parallel.layout import padded_vocab_size


@dataclass
class Carried:
    """What one forward pass hands from layer to layer past Megatron's block, which has no argument for it."""

    inputs: tuple[torch.Tensor, ...] = ()  # of each layer [S, B, P]
    keys_values: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(
        default_factory=dict
    )  # by layer [S, B, G, K]

    def clear(self) -> None:
        """Forget a pass that is over."""
        self.inputs, self.keys_values = (), {}


class PerLayerEmbedding(MegatronModule):
    """Inputs of all layers: a second embedding, and a projection of the first (Gemma 4; transformers 5.23, modeling_gemma4.py)."""

    def __init__(self, config: TransformerConfig, meta: ModelMeta, *, norm: ModuleSpec, tp: int) -> None:
        super().__init__(config=config)
        assert meta.layer_inputs is not None, "the model has inputs of layers"
        size = meta.layer_inputs.hidden_size
        self.layers, self.size = meta.num_layers, size
        self.word_embeddings = VocabParallelEmbedding(
            padded_vocab_size(meta.layer_inputs.vocab_size, tp=tp),
            self.layers * size,
            init_method=config.embedding_init_method,
            reduce_scatter_embeddings=config.sequence_parallel,
            config=config,
        )
        self.projection = WholeLinear(config, inputs=config.hidden_size, outputs=self.layers * size)
        self.norm = build_module(norm, config=config, hidden_size=size, eps=config.layernorm_epsilon)

    def forward(self, input_ids: torch.Tensor, embedded_SBD: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return each layer's input [S, B, P], from token ids [B, all S] and what the first embedding made of them."""
        looked_up = self.word_embeddings(input_ids)
        if not self.config.sequence_parallel:
            looked_up = looked_up.transpose(0, 1)
        projected = self.projection(embedded_SBD) * embedded_SBD.shape[-1] ** -0.5
        projected_SBLP = self.norm(projected.unflatten(-1, (self.layers, self.size)))
        looked_up_SBLP = looked_up.unflatten(-1, (self.layers, self.size)) * self.size**0.5
        return ((projected_SBLP + looked_up_SBLP) * 2**-0.5).unbind(2)


class OwnInputLayer(ScaledLayer):
    """A layer with a third branch, which its own input gates."""

    def __init__(
        self, config: TransformerConfig, *args: Any, carried: Carried, size: int, norm: ModuleSpec, **kwargs: Any
    ) -> None:
        super().__init__(config, *args, **kwargs)
        self.carried = carried
        self.input_gate = WholeLinear(config, inputs=config.hidden_size, outputs=size)
        self.input_projection = WholeLinear(config, inputs=size, outputs=config.hidden_size)
        self.input_norm = build_module(
            norm, config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon
        )

    def before_scaling(self, output_SBD: torch.Tensor) -> torch.Tensor:
        """Add the third branch."""
        gate_SBP = self.config.activation_func(self.input_gate(output_SBD))
        own_SBP = self.carried.inputs[self.layer_number - 1]
        return output_SBD + self.input_norm(self.input_projection(gate_SBP * own_SBP))
