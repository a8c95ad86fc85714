"""Activations of the feed-forward part that learn."""

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig


class XIELU(MegatronModule):
    """A parabola for positive input and a shifted exponential below, each with a learned slope (arXiv 2411.13010).

    `beta` and `eps` are constants that the file holds beside the two slopes.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config)
        self.alpha_p = torch.nn.Parameter(torch.zeros(1, dtype=config.params_dtype))
        self.alpha_n = torch.nn.Parameter(torch.zeros(1, dtype=config.params_dtype))
        for name, value in (("beta", 0.5), ("eps", -1e-6)):
            constant = torch.tensor(value, dtype=config.params_dtype)
            self.register_parameter(name, torch.nn.Parameter(constant, requires_grad=False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the activation of x [..., F/tp]."""
        # Each rank of tp sees its part of F only: the gradients of the slopes are summed over tp.
        alpha_p, alpha_n = (
            copy_to_tensor_model_parallel_region(slope) for slope in (self.alpha_p, self.alpha_n)
        )
        positive = F.softplus(alpha_p) * x * x
        negative = (torch.expm1(torch.minimum(x, self.eps)) - x) * (self.beta + F.softplus(alpha_n))
        return torch.where(x > 0, positive, negative) + self.beta * x
