"""Norms for ranks without Transformer Engine; unlike Megatron's torch norms they allow sequence parallelism.

Their weights are marked sequence_parallel where activations are sharded along the sequence, so that Megatron sums their
gradients over tp (distributed/finalize_model_grads.py).

Letters: D normalised size, S sequence, B batch, H heads, K head size.
"""

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint


class RMSNorm(torch.nn.Module):
    """Scale the last dimension to unit root mean square (Zhang and Sennrich 2019, eq. 4).

    A zero-centred norm multiplies by 1 + weight, in float32 (Gemma; transformers 5.23, modeling_gemma.py).
    """

    def __init__(
        self,
        config: TransformerConfig,
        hidden_size: int,
        eps: float = 1e-5,
        *,
        zero_centered: bool = False,
        **_: Any,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.zero_centered = zero_centered
        initial = torch.zeros if zero_centered else torch.ones
        self.weight = shared_parameter(initial(hidden_size, dtype=config.params_dtype), config)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x normalised: [..., D] -> [..., D], statistics in float32."""
        return _RMSNorm.apply(x, self.weight, self.eps, self.zero_centered)


class _RMSNorm(torch.autograd.Function):
    """Saves the input and one number a row; plain autograd would save four tensors of the input's size."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float, zero_centered: bool
    ) -> torch.Tensor:
        x32 = x.float()
        inverse_rms = torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, inverse_rms)
        ctx.zero_centered = zero_centered
        if zero_centered:
            return (x32 * inverse_rms * (1.0 + weight.float())).to(x.dtype)
        # The product with the weight is taken in the weights' dtype, as transformers does (modeling_llama.py, LlamaRMSNorm).
        return (x32 * inverse_rms).to(x.dtype) * weight

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, inverse_rms = ctx.saved_tensors
        normal = x.float() * inverse_rms
        scale = 1.0 + weight.float() if ctx.zero_centered else weight.float()
        grad_normal = grad.float() * scale
        grad_x = inverse_rms * (grad_normal - normal * (grad_normal * normal).mean(-1, keepdim=True))
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = (grad.float() * normal).flatten(0, -2).sum(0).to(weight.dtype)
        return grad_x.to(x.dtype), grad_weight, None, None


class LayerNorm(torch.nn.Module):
    """Mean zero and variance one along the last dimension (Ba et al. 2016, eq. 4), with or without a bias."""

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, *, bias: bool = True, **_: Any
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = shared_parameter(torch.ones(hidden_size, dtype=config.params_dtype), config)
        self.bias = (
            shared_parameter(torch.zeros(hidden_size, dtype=config.params_dtype), config) if bias else None
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x normalised: [..., D] -> [..., D]."""
        return torch.nn.functional.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


def shared_parameter(value: torch.Tensor, config: TransformerConfig) -> torch.nn.Parameter:
    """Return a parameter that every rank of tp has whole, for a module that sees this rank's part of the sequence."""
    parameter = torch.nn.Parameter(value)
    parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]  # read by Megatron
    return parameter


class AllHeadsRMSNorm(torch.nn.Module):
    """One root mean square over all heads of q or of k together, whose weight is cut over tp like the heads are.

    `heads` are those of the whole sharded model. It may have more than the file: padded ones are zero and do not count.
    Every rank of tp must call it: it sums one number a token over tp, forwards and backwards.
    """

    def __init__(
        self,
        config: TransformerConfig,
        hidden_size: int,
        eps: float,
        *,
        heads: int,
        real_heads: int,
        **_: Any,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.group = parallel_state.get_tensor_model_parallel_group()
        self.real_size = real_heads * hidden_size
        local_heads = heads // self.group.size()
        self.weight = torch.nn.Parameter(torch.ones(local_heads * hidden_size, dtype=config.params_dtype))
        set_tensor_model_parallel_attributes(self.weight, True, 0, 1)

    def forward(self, x_SBHK: torch.Tensor) -> torch.Tensor:
        """Return q or k normalised: [S, B, H/tp, K] of one dtype, statistics in float32."""
        x = x_SBHK.flatten(-2).float()
        squares = reduce_from_tensor_model_parallel_region(x.square().sum(-1, keepdim=True), group=self.group)
        # Every rank scales its own heads by the sum: the gradient of the sum is that of all ranks together.
        squares = copy_to_tensor_model_parallel_region(squares, group=self.group)
        normal = x * torch.rsqrt(squares / self.real_size + self.eps)
        return (normal.to(x_SBHK.dtype) * self.weight).view_as(x_SBHK)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: dict[str, Any] | None = None
    ) -> Any:
        """Return Megatron's sharded state: the weight is cut along dim 0."""
        return make_sharded_tensors_for_checkpoint(
            {"weight": self.weight},
            prefix,
            {"weight": 0},
            sharded_offsets,
            tp_group=self.group,
            dp_cp_group=(metadata or {}).get("dp_cp_group")
            or parallel_state.get_data_parallel_group(with_context_parallel=True),
        )
