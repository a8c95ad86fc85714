"""The end of a branch of a decoder layer, and layers whose branches stand beside each other.

Letters: S sequence, B batch, D model size.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer


class BranchEnd(torch.nn.Module):
    """Norm a branch's output, multiply it by a constant and add it to the residual; takes the place of bias_dropout_add."""

    def __init__(self, config: TransformerConfig, *, norm: ModuleSpec | None, multiplier: float) -> None:
        super().__init__()
        self.norm = (
            build_module(norm, config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon)
            if norm
            else None
        )
        self.multiplier = multiplier

    def forward(self, training: bool, fused: bool) -> Callable[..., torch.Tensor]:
        """Return the function that Megatron then calls with (output, bias), the residual and the dropout."""

        def add(
            branch: tuple[torch.Tensor, torch.Tensor | None], residual_SBD: torch.Tensor, dropout: float
        ) -> torch.Tensor:
            output_SBD, bias_D = branch
            # Megatron enables gradients around this call whatever the mode: without one to pass on there must be no graph.
            with torch.set_grad_enabled(output_SBD.requires_grad or residual_SBD.requires_grad):
                if bias_D is not None:
                    output_SBD = output_SBD + bias_D
                if self.norm is not None:
                    output_SBD = self.norm(output_SBD)
                if self.multiplier != 1.0:
                    output_SBD = output_SBD * self.multiplier
                return residual_SBD + F.dropout(output_SBD, dropout, training)

        return add


class ParallelLayer(TransformerLayer):
    """Attention and feed-forward part read the same normed input (Wang and Komatsuzaki 2021, GPT-J)."""

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, None]:
        """Return the layer's output [S, B, D], and nothing for the next layer's cross-attention."""
        normed_SBD = self.input_layernorm(hidden_states)
        attention = self.self_attention(
            normed_SBD,
            attention_mask=kwargs.get("attention_mask"),
            rotary_pos_emb=kwargs.get("rotary_pos_emb"),
            packed_seq_params=kwargs.get("packed_seq_params"),
        )
        for end, output in ((self.self_attn_bda, attention), (self.mlp_bda, self.mlp(normed_SBD))):
            hidden_states = end(self.training, self.config.bias_dropout_fusion)(
                output, hidden_states, self.hidden_dropout
            )
        return hidden_states, None


class ScaledLayer(TransformerLayer):
    """A layer whose output is multiplied by a number of the file, which is not trained (Gemma 4)."""

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        scalar = torch.ones(1, dtype=config.params_dtype, device=torch.cuda.current_device())
        self.register_buffer("layer_scalar", scalar)

    def forward(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As Megatron's: return the layer's output [S, B, D], and what cross-attention would read."""
        output_SBD, context = super().forward(*args, **kwargs)
        return self.before_scaling(output_SBD) * self.layer_scalar, context

    def before_scaling(self, output_SBD: torch.Tensor) -> torch.Tensor:
        """Return what is multiplied, for layers that have more branches."""
        return output_SBD
