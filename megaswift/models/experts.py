"""Routed experts beside a dense feed-forward part, each with norms of its own before and after it (Gemma 4).

Letters: S sequence, B batch, D model size.
"""

from typing import Any

import torch
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig


class ExpertsBesideDense(MoELayer):
    """Megatron's mixture of experts, whose shared expert is the dense part; the router reads the input as it comes."""

    def __init__(self, config: TransformerConfig, *args: Any, norm: ModuleSpec, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        for name in ("dense_input_norm", "dense_output_norm", "expert_input_norm", "expert_output_norm"):
            built = build_module(
                norm, config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon
            )
            setattr(self, name, built)

    def shared_experts_compute(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return the output [S, B, D] of the dense part."""
        return self.dense_output_norm(super().shared_experts_compute(self.dense_input_norm(hidden_states)))

    def preprocess(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """As Megatron's: prepare tokens [S, B, D] for their experts."""
        return super().preprocess(self.expert_input_norm(hidden_states), *args, **kwargs)

    def postprocess(
        self, output: torch.Tensor, shared_expert_output: torch.Tensor | None, *args: Any
    ) -> torch.Tensor:
        """Return the sum [S, B, D] of both parts, from what came back from the experts."""
        assert shared_expert_output is not None, "the dense part is not overlapped with communication"
        routed_SBD = super().postprocess(output, None, *args)
        return self.expert_output_norm(routed_SBD) + shared_expert_output
