"""The generalised Jensen-Shannon divergence of two output layers; chunks of tokens pass through, full logits never exist.

The teacher may also be elsewhere and have told its likeliest tokens alone.

With q of the student, p of the teacher, m = beta p + (1 - beta) q (reference.py), the gradient by the student's logits z is
dL/dz_v = q_v (g_v - sum_u q_u g_u), g = (1 - beta) log(q / m); for beta 0 it is q - p, for beta 1 g = log(q / p). It is formed while
a chunk's logits are there, so the backward pass is a scaling.

Letters: T tokens, C tokens of one chunk, K largest logits, D model size, E that of the teacher, V vocabulary rows of this rank (the vocabulary / tp).
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megaswift.kernels.linear_cross_entropy.ops import add_product_

CHUNK_TOKENS = 256  # half of linear_cross_entropy's: two models' logits are held at once
NOTHING = -1e30  # a logit without probability; finite, so that it has no logarithm of 0


@dataclass(frozen=True, kw_only=True)
class OutputLayer:
    """What a model's output layer makes of hidden states."""

    hidden: torch.Tensor  # [T, D] or [T, E]
    weight: torch.Tensor  # [V, D] or [V, E]: this rank's rows
    softcap: float | None = None  # logits become softcap * tanh(logits / softcap)


@dataclass(frozen=True, kw_only=True)
class Likeliest:
    """The log-probabilities of the likeliest tokens of each place, which somebody else has computed."""

    ids: torch.Tensor  # int [T, K]: rows of the vocabulary, different ones for a place
    logps: torch.Tensor  # [T, K]; they need not add up to 1


@torch.compiler.disable
def linear_divergence(
    student: OutputLayer,
    teacher: OutputLayer | Likeliest,
    loss_weights_T: torch.Tensor,
    *,
    beta: float,
    vocab_size: int,
    top_k: int | None = None,
    group: dist.ProcessGroup | None = None,
    chunk_tokens: int = CHUNK_TOKENS,
) -> torch.Tensor:
    """Return sum(loss_weights_T * divergence_T), without dimensions; every rank of `group` calls it alike.

    With `top_k` both distributions are those among the tokens with the teacher's so many largest logits, and with all that
    are as large as the last of them; with Likeliest, those among these.

    It is differentiable by the student's tensors; the gradient of its hidden states is this rank's part of the sum over
    `group`, as behind a column-parallel layer. Rows of the vocabulary from `vocab_size` on are padding. Logits and sums are
    float32, or float64 where the hidden states are. What moves: 6 numbers per token over `group`, and `top_k` from each rank.
    """
    rank, rows = (0 if group is None else dist.get_rank(group)), student.weight.shape[0]
    if isinstance(teacher, Likeliest):
        assert top_k is None, f"top_k={top_k} of tokens that are chosen already"
    else:
        assert teacher.weight.shape[0] == rows, (
            f"{teacher.weight.shape[0]} rows of the teacher, {rows} of the student"
        )
    problem = _Problem(
        teacher=teacher,
        softcap=student.softcap,
        loss_weights_T=loss_weights_T,
        beta=beta,
        top_k=top_k,
        first_row=rank * rows,
        rows=min(max(vocab_size - rank * rows, 0), rows),
        group=group,
        chunk_tokens=chunk_tokens,
        needs_gradient=torch.is_grad_enabled(),
    )
    total: torch.Tensor = _LinearDivergence.apply(student.hidden, student.weight, problem)
    return total


@dataclass(frozen=True, kw_only=True)
class _Problem:
    teacher: OutputLayer | Likeliest
    softcap: float | None
    loss_weights_T: torch.Tensor
    beta: float
    top_k: int | None
    first_row: int  # of the vocabulary that this rank has
    rows: int  # of this rank's weights that are not padding
    group: dist.ProcessGroup | None
    chunk_tokens: int
    needs_gradient: bool

    def total(self, values: torch.Tensor) -> torch.Tensor:
        """Return the sum of the values of all ranks."""
        if self.group is not None:
            dist.all_reduce(values, group=self.group)
        return values


class _LinearDivergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_TD: torch.Tensor, weight_VD: torch.Tensor, problem: _Problem
    ) -> torch.Tensor:
        wanted = [problem.needs_gradient and needed for needed in ctx.needs_input_grad[:2]]
        wide = torch.float64 if hidden_TD.dtype == torch.float64 else torch.float32
        real_VD = weight_VD[: problem.rows]
        total = torch.zeros((), dtype=wide, device=hidden_TD.device)
        hidden_grad_TD = torch.zeros_like(hidden_TD) if wanted[0] else None
        weight_sum_VD = torch.zeros_like(weight_VD, dtype=wide) if wanted[1] else None
        for start in range(0, len(hidden_TD), problem.chunk_tokens):
            chunk = slice(start, start + problem.chunk_tokens)
            hidden_CD = hidden_TD[chunk]
            logits_CV, slope_CV = logits_of(hidden_CD, real_VD, problem.softcap, wide)
            teacher_CV, is_left_out_CV = _teacher_logits(problem, chunk, wide)
            if is_left_out_CV is not None:
                logits_CV, teacher_CV = (
                    logits.masked_fill(is_left_out_CV, NOTHING) for logits in (logits_CV, teacher_CV)
                )
            losses_C, grad_CV = _divergence(logits_CV, teacher_CV, problem)
            weights_C = problem.loss_weights_T[chunk].to(wide)
            total += torch.dot(losses_C, weights_C)
            grad_CV.mul_(weights_C[:, None])
            if slope_CV is not None:
                grad_CV.mul_(slope_CV)
            narrow_CV = grad_CV.to(hidden_TD.dtype)
            if hidden_grad_TD is not None:
                hidden_grad_TD[chunk] = narrow_CV @ real_VD
            if weight_sum_VD is not None:
                add_product_(weight_sum_VD, narrow_CV, hidden_CD)
        ctx.save_for_backward(
            hidden_grad_TD, None if weight_sum_VD is None else weight_sum_VD.to(weight_VD.dtype)
        )
        return total

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden_grad_TD, weight_grad_VD = ctx.saved_tensors
        # In place: a second tensor of the weight's size would double the peak.
        return (
            None if hidden_grad_TD is None else hidden_grad_TD.mul_(grads[0]),
            None if weight_grad_VD is None else weight_grad_VD.mul_(grads[0]),
            None,
        )


def logits_of(
    hidden_CD: torch.Tensor, weight_VD: torch.Tensor, softcap: float | None, wide: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the logits [C, V] of hidden states, and their derivative by what the soft cap was put on, if there is one."""
    logits_CV = (hidden_CD @ weight_VD.t()).to(wide)
    if softcap is None:
        return logits_CV, None
    tanh_CV = torch.tanh(logits_CV / softcap)
    return softcap * tanh_CV, 1 - tanh_CV.square()


def logsumexp(logits_CV: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """Return the logarithm of the sum of exponentials over the logits of all ranks [C]."""
    own_C = logits_CV.logsumexp(1)
    if group is None:
        return own_C
    top_C = own_C.clone()
    dist.all_reduce(top_C, op=dist.ReduceOp.MAX, group=group)
    parts_C = (own_C - top_C).exp()
    dist.all_reduce(parts_C, group=group)
    return top_C + parts_C.log()


def _teacher_logits(
    problem: _Problem, chunk: slice, wide: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the teacher's logits of a chunk by this rank's rows [C, V], and which of them do not count, if some do not."""
    teacher, rows = problem.teacher, problem.rows
    if isinstance(teacher, Likeliest):
        return _spread_out(teacher, chunk, first_row=problem.first_row, rows=rows, wide=wide)
    logits_CV, _ = logits_of(teacher.hidden[chunk], teacher.weight[:rows], teacher.softcap, wide)
    if problem.top_k is None:
        return logits_CV, None
    return logits_CV, logits_CV < _least(logits_CV, problem.top_k, problem.group)


def _spread_out(
    teacher: Likeliest, chunk: slice, *, first_row: int, rows: int, wide: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return log-probabilities at the places of their tokens among this rank's rows [C, V], and where there is none."""
    places_CK = teacher.ids[chunk].long() - first_row
    # Those of other ranks go to a column more, which is cut off.
    places_CK = places_CK.where((places_CK >= 0) & (places_CK < rows), rows)
    logits_CV = torch.full((len(places_CK), rows + 1), NOTHING, dtype=wide, device=places_CK.device)
    logits_CV.scatter_(1, places_CK, teacher.logps[chunk].to(wide))
    logits_CV = logits_CV[:, :rows]
    return logits_CV, logits_CV == NOTHING


def _least(logits_CV: torch.Tensor, top_k: int, group: dist.ProcessGroup | None) -> torch.Tensor:
    """Return the last of the `top_k` largest logits of all ranks [C, 1]; -inf where there are not as many."""
    largest_CK = logits_CV.new_full((len(logits_CV), top_k), -math.inf)
    own = min(top_k, logits_CV.shape[1])
    largest_CK[:, :own] = logits_CV.topk(own, dim=1).values
    if group is not None:
        every = [torch.empty_like(largest_CK) for _ in range(dist.get_world_size(group))]
        dist.all_gather(every, largest_CK, group=group)
        largest_CK = torch.cat(every, dim=1)
    return largest_CK.topk(top_k, dim=1).values[:, -1:]


def _divergence(
    student_CV: torch.Tensor, teacher_CV: torch.Tensor, problem: _Problem
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the divergence of every token [C], and its gradient by this rank's logits of the student [C, V]."""
    beta = problem.beta
    log_q_CV, log_p_CV = (
        logits_CV - logsumexp(logits_CV, problem.group)[:, None] for logits_CV in (student_CV, teacher_CV)
    )
    q_CV = log_q_CV.exp()
    if beta == 0:
        p_CV = log_p_CV.exp()
        losses_C = problem.total((p_CV * (log_p_CV - log_q_CV)).sum(1))
        return losses_C, q_CV - p_CV
    if beta == 1:
        lead_CV = log_q_CV - log_p_CV
        losses_C = problem.total((q_CV * lead_CV).sum(1))
        return losses_C, q_CV * (lead_CV - losses_C[:, None])
    log_m_CV = torch.logaddexp(log_p_CV + math.log(beta), log_q_CV + math.log1p(-beta))
    lead_CV = (1 - beta) * (log_q_CV - log_m_CV)
    to_student_C = (q_CV * lead_CV).sum(1)
    to_teacher_C = (beta * log_p_CV.exp() * (log_p_CV - log_m_CV)).sum(1)
    sums_2C = problem.total(torch.stack([to_student_C, to_teacher_C]))
    return sums_2C.sum(0), q_CV * (lead_CV - sums_2C[0, :, None])
