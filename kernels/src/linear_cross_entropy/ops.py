"""Output layer and cross-entropy in one: chunks of tokens pass through, and the full logits never exist.

Gradients are formed while a chunk's logits are there, so the backward pass is a scaling.
Letters: T tokens, C tokens of one chunk, D model size, V vocabulary rows of this rank (the vocabulary / tp),
P ranks of tp, N numbers of a token.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megaswift.kernels.dispatch import Implementation, choose
from megaswift.kernels.linear_cross_entropy import reference

# Logits held at once. 512 rows keep matrix products at full speed (fp32, 2 CPU cores, D=576, V=49152: 256 to
# 350 rows are within 2 % of the best) and are 1/16 of 8192 tokens.
CHUNK_TOKENS = 512
_SLICE_ROWS = 16384  # rows of a weight gradient added at once where it is summed in a wider type


@torch.compiler.disable
def linear_cross_entropy(
    hidden_TD: torch.Tensor,
    weight_VD: torch.Tensor,
    labels_T: torch.Tensor,
    *,
    loss_weights_T: torch.Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    ignore_index: int | None = None,
    vocab_size: int | None = None,
    softcap: float | None = None,
    right_T: torch.Tensor | None = None,
    chunk_tokens: int = CHUNK_TOKENS,
    implementation: Implementation | None = None,
) -> torch.Tensor:
    """Return each token's cross-entropy [T], float32, not weighted; every rank of `group` calls it alike.

    hidden_TD and weight_VD: one floating type; labels_T: int64 in the whole vocabulary. Tokens labelled
    `ignore_index` have loss 0. Rows of the vocabulary from `vocab_size` on are padding: no logit, gradient 0.
    With `softcap` the logits are softcap * tanh(logits / softcap) (Gemma 2). `loss_weights_T` are the factors
    by which the caller will weight these losses (default: all alike). They do not change the result: a
    gradient that comes back proportional to them needs no second pass, any other costs one. The gradient of
    hidden_TD is this rank's part of the sum over `group`, as behind a column-parallel layer.
    `right_T` (bool [T]) is filled with whether the label is the likeliest token: no logit is above its own, so
    that labels which tie with another token are right; ignored ones are not.
    What moves: 2 numbers per token and rank, gathered; 3 with `right_T`. Raises RuntimeError for a label outside
    the vocabulary.
    """
    rows = weight_VD.shape[0]
    rank, ranks = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
    vocab_size = rows * ranks if vocab_size is None else vocab_size
    ignored_T = (
        torch.zeros_like(labels_T, dtype=torch.bool) if ignore_index is None else labels_T == ignore_index
    )
    inside_T = (labels_T >= 0) & (labels_T < vocab_size)
    torch._assert_async((inside_T | ignored_T).all(), f"a label lies outside the vocabulary of {vocab_size}")
    real_rows = min(max(vocab_size - rank * rows, 0), rows)
    columns_T = labels_T - rank * rows
    columns_T = torch.where(ignored_T | (columns_T < 0) | (columns_T >= real_rows), -1, columns_T)
    weights_T = (~ignored_T).float() if loss_weights_T is None else loss_weights_T.float() * ~ignored_T
    problem = _Problem(
        real_rows=real_rows,
        softcap=softcap,
        chunk_tokens=chunk_tokens,
        group=group,
        needs_gradient=torch.is_grad_enabled(),
        implementation=choose("linear_cross_entropy", hidden_TD.device, implementation),
    )
    losses_T = _LinearCrossEntropy.apply(hidden_TD, weight_VD, columns_T, weights_T, problem, right_T)
    if right_T is not None:
        right_T.masked_fill_(ignored_T, False)
    return losses_T.masked_fill(ignored_T, 0.0)


@dataclass(frozen=True, kw_only=True)
class _Problem:
    real_rows: int  # rows of this rank's weight that are not padding
    softcap: float | None
    chunk_tokens: int
    group: dist.ProcessGroup | None
    needs_gradient: bool
    implementation: Implementation


@dataclass(frozen=True, kw_only=True)
class _Pass:
    losses_T: torch.Tensor
    hidden_grad_TD: torch.Tensor | None
    weight_grad_VD: torch.Tensor | None


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: torch.Tensor,
        weight_VD: torch.Tensor,
        columns_T: torch.Tensor,
        weights_T: torch.Tensor,
        problem: _Problem,
        right_T: torch.Tensor | None,
    ) -> torch.Tensor:
        ctx.problem = problem
        ctx.wanted = tuple(problem.needs_gradient and needed for needed in ctx.needs_input_grad[:2])
        if not ctx.wanted[
            1
        ]:  # rows of the hidden gradient are independent: any weights can be put in afterwards
            weights_T = torch.ones_like(weights_T)
        done = _pass(hidden_TD, weight_VD, columns_T, weights_T, problem, ctx.wanted, right_T)
        if any(ctx.wanted):
            ctx.save_for_backward(
                hidden_TD, weight_VD, columns_T, weights_T, done.hidden_grad_TD, done.weight_grad_VD
            )
        return done.losses_T

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden_TD, weight_VD, columns_T, weights_T, hidden_grad_TD, weight_grad_VD = ctx.saved_tensors
        grad_T = grads[0].float()
        if weight_grad_VD is None:
            return hidden_grad_TD * grad_T[:, None].to(hidden_grad_TD.dtype), None, None, None, None, None
        factor = torch.dot(grad_T, weights_T) / torch.dot(weights_T, weights_T).clamp_min(
            torch.finfo(torch.float32).tiny
        )
        # Proportional up to the rounding of a few float32 products. The host needs the answer: one synchronisation.
        if not torch.allclose(grad_T, factor * weights_T, rtol=1e-6, atol=0.0):
            done = _pass(hidden_TD, weight_VD, columns_T, grad_T, ctx.problem, ctx.wanted)
            return done.hidden_grad_TD, done.weight_grad_VD, None, None, None, None
        # In place: a second tensor of the weight's size would double the peak.
        weight_grad_VD.mul_(factor)
        return (
            None if hidden_grad_TD is None else hidden_grad_TD.mul_(factor),
            weight_grad_VD,
            None,
            None,
            None,
            None,
        )


def _pass(
    hidden_TD: torch.Tensor,
    weight_VD: torch.Tensor,
    columns_T: torch.Tensor,
    weights_T: torch.Tensor,
    problem: _Problem,
    wanted: tuple[bool, bool],
    right_T: torch.Tensor | None = None,
) -> _Pass:
    """Go once over the tokens: losses, the gradients of sum(weights_T * losses_T) that are wanted, and `right_T`."""
    tokens, rows = hidden_TD.shape[0], problem.real_rows
    real_VD = weight_VD[:rows]
    losses_T = torch.empty(tokens, dtype=torch.float32, device=hidden_TD.device)
    hidden_grad_TD = torch.zeros_like(hidden_TD) if wanted[0] else None
    # Chunks are summed in float32 whatever the weight's type.
    weight_sum_VD = (
        torch.zeros(weight_VD.shape, dtype=torch.float32, device=weight_VD.device) if wanted[1] else None
    )
    chunks = -(-tokens // problem.chunk_tokens)
    size = -(-tokens // chunks) if chunks else 0
    buffer_CV = hidden_TD.new_empty(size, rows)
    for start in range(0, tokens, max(size, 1)):
        chunk = slice(start, min(start + size, tokens))
        hidden_CD, columns_C = hidden_TD[chunk], columns_T[chunk]
        logits_CV = _product(hidden_CD, real_VD.t(), out=buffer_CV[: hidden_CD.shape[0]])
        tanh_CV = None
        if problem.softcap is not None:
            tanh_CV = torch.tanh(logits_CV / problem.softcap)
            torch.mul(tanh_CV, problem.softcap, out=logits_CV)
        losses_T[chunk] = _token_losses_(
            logits_CV,
            columns_C,
            weights_T[chunk] if any(wanted) else None,
            problem,
            None if right_T is None else right_T[chunk],
        )
        if tanh_CV is not None:
            logits_CV.mul_(1 - tanh_CV.square())
        if rows and hidden_grad_TD is not None:
            _product(logits_CV, real_VD, out=hidden_grad_TD[chunk])
        if rows and weight_sum_VD is not None:
            add_product_(weight_sum_VD, logits_CV, hidden_CD)
    weight_grad_VD = None if weight_sum_VD is None else weight_sum_VD.to(weight_VD.dtype)
    return _Pass(losses_T=losses_T, hidden_grad_TD=hidden_grad_TD, weight_grad_VD=weight_grad_VD)


def _token_losses_(
    logits_CV: torch.Tensor,
    columns_C: torch.Tensor,
    weights_C: torch.Tensor | None,
    problem: _Problem,
    right_C: torch.Tensor | None,
) -> torch.Tensor:
    """Return the losses of one chunk, leave the gradient of its logits in their place, and fill `right_C`."""

    def merge(
        lse_C: torch.Tensor, target_C: torch.Tensor, max_C: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if problem.group is not None:
            mine_NC = torch.stack([lse_C, target_C] if right_C is None else [lse_C, target_C, max_C])
            ranks = dist.get_world_size(problem.group)
            every_PNC = mine_NC.new_empty(ranks, *mine_NC.shape)
            # gloo takes ranks' parts end to end along dim 0 only, nccl both ways.
            dist.all_gather_into_tensor(every_PNC.flatten(0, 1), mine_NC, group=problem.group)
            lse_C, target_C = torch.logsumexp(every_PNC[:, 0], dim=0), every_PNC[:, 1].sum(dim=0)
            if right_C is not None:
                max_C = every_PNC[:, 2].amax(dim=0)
        if right_C is not None:
            torch.ge(target_C, max_C, out=right_C)
        return lse_C, target_C

    if not problem.real_rows:  # a rank with nothing but padding still takes part in the exchange
        none_C = torch.zeros(columns_C.shape, dtype=torch.float32, device=columns_C.device)
        lowest_C = torch.full_like(none_C, float("-inf"))
        lse_C, target_C = merge(lowest_C, none_C, lowest_C)
        return lse_C - target_C
    if problem.implementation is Implementation.TRITON:
        from megaswift.kernels.linear_cross_entropy import kernel  # here, because triton may be absent

        return kernel.token_losses_(logits_CV, columns_C, weights_C, merge)
    return reference.token_losses_(logits_CV, columns_C, weights_C, merge)


def add_product_(sum_VD: torch.Tensor, gradient_CV: torch.Tensor, hidden_CD: torch.Tensor) -> None:
    """Add gradient^T @ hidden to the first rows of a sum, which may be of a wider type."""
    rows = gradient_CV.shape[1]
    if hidden_CD.dtype == sum_VD.dtype:
        sum_VD[:rows].addmm_(gradient_CV.t(), hidden_CD)
        return
    for start in range(0, rows, _SLICE_ROWS):
        columns = slice(start, min(start + _SLICE_ROWS, rows))
        gradient_VC = gradient_CV[:, columns].t()
        if _multiplies_in_float32(hidden_CD):
            sum_VD[columns].addmm_(gradient_VC.float(), hidden_CD.float())
        else:
            sum_VD[columns].add_(gradient_VC @ hidden_CD)


def _product(a: torch.Tensor, b: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
    return out.copy_(a.float() @ b.float()) if _multiplies_in_float32(a) else torch.mm(a, b, out=out)


def _multiplies_in_float32(x: torch.Tensor) -> bool:
    """Whether products are faster in float32, which sums as GPUs do: CPUs without bfloat16 instructions take 50 times as long."""
    return x.device.type == "cpu" and x.dtype != torch.float32
