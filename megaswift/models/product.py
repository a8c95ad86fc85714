"""Megatron's parallel linears with another matrix product, and its messages between ranks of tp as they are."""

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)

from megaswift.models.causal_lm import CausalLM

Product = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # x [T, D], w [F, D] -> x w^T [T, F]


class OwnProductLinear:
    """A mixin in front of one of Megatron's parallel linears; see replace_product."""

    product: Product

    def _forward_impl(
        self,
        input: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        *,
        sequence_parallel: bool = False,
        allreduce_dgrad: bool = False,
        tp_group: Any = None,
        **_: Any,
    ) -> torch.Tensor:
        """Return input @ weight^T + bias; takes the place of Megatron's product."""
        if sequence_parallel:
            input = gather_from_sequence_parallel_region(
                input, tensor_parallel_output_grad=True, group=tp_group
            )
        elif allreduce_dgrad:
            input = copy_to_tensor_model_parallel_region(input, group=tp_group)
        output = self.product(input.flatten(0, -2), weight).unflatten(0, input.shape[:-1])
        return output if bias is None else output + bias


def replace_product(linear: Any, product: Product) -> None:
    """Let a ColumnParallelLinear or RowParallelLinear multiply by `product`, whatever it multiplied by before."""
    if not isinstance(linear, OwnProductLinear):
        kind = type(linear)
        linear.__class__ = type(f"OwnProduct{kind.__name__}", (OwnProductLinear, kind), {})
    linear.product = product


def multiply_in_float32(model: CausalLM) -> None:
    """Let the decoder's linears of a half-precision model add up in float32, as a GPU does, and faster where a CPU lacks half products.

    On AVX2 oneDNN's bfloat16 products take 5 to 40 times as long as float32 ones with the conversions. Embedding and
    output layer are not linears of the decoder; kernels/linear_cross_entropy does the same for the latter.
    """
    for module in model.modules():
        is_linear = isinstance(module, ColumnParallelLinear | RowParallelLinear)
        if is_linear and module is not getattr(model, "output_layer", None):
            replace_product(module, _Float32Product.apply)


def has_half_products(dtype: torch.dtype) -> bool:
    """Say whether this CPU has fast products for `dtype` (oneDNN: AVX-512, AMX, ARM's bf16)."""
    if dtype is not torch.float32 and not torch.backends.mkldnn.is_available():
        return False
    if dtype is torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if dtype is torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return True


class _Float32Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: torch.Tensor, w_FD: torch.Tensor) -> torch.Tensor:
        needs_x, needs_w = ctx.needs_input_grad
        ctx.save_for_backward(x_TD if needs_w else None, w_FD if needs_x else None)
        return (x_TD.float() @ w_FD.float().t()).to(x_TD.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        x_TD, w_FD = ctx.saved_tensors
        grad_TF = grads[0].float()
        dtype = grads[0].dtype
        grad_x = None if w_FD is None else (grad_TF @ w_FD.float()).to(dtype)
        grad_w = None if x_TD is None else (grad_TF.t() @ x_TD.float()).to(dtype)
        return grad_x, grad_w
