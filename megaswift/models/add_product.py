"""What an adapter adds to the output of its linear.

Letters: T tokens, F features, R rank.
"""

from typing import Any

import torch


class AddProduct(torch.autograd.Function):
    """output + scale * low B^T, in the storage of `output`, which no linear keeps for its backward pass.

    Both gradients are formed with the R rows first: on processors [R, T] x [T, F] takes a third of [F, T] x [T, R].
    """

    @staticmethod
    def forward(
        ctx: Any, output: torch.Tensor, low: torch.Tensor, b_FR: torch.Tensor, scale: float
    ) -> torch.Tensor:
        ctx.save_for_backward(low, b_FR)
        ctx.scale = scale
        ctx.mark_dirty(output)
        output.view(-1, b_FR.shape[0]).addmm_(low.flatten(0, -2), b_FR.t(), alpha=scale)
        return output

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None]:  # type: ignore[override]  # one gradient
        low, b_FR = ctx.saved_tensors
        grad_TF, low_TR = grad.flatten(0, -2), low.flatten(0, -2)
        grad_low_RT = torch.mm(b_FR.t(), grad_TF.t()).mul_(ctx.scale)
        grad_b_RF = torch.mm(low_TR.t(), grad_TF).mul_(ctx.scale)
        # Contiguous, both of them: Megatron's sum over tp forgets its result otherwise (mappings.py, _reduce, 0.16.1).
        return grad, grad_low_RT.t().contiguous().view(low.shape), grad_b_RF.t().contiguous(), None
