"""Attention over packed documents spread over cp ranks: ring, gathered keys, exchanged heads, or two of them.

Letters: T tokens of this rank (all tokens / cp), N tokens of all ranks of one exchange, H query heads, G
key/value heads, K head size of queries and keys, L head size of values, F features of a token.
"""

import enum
import math
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist

from megaswift.errors import ConfigError
from megaswift.kernels.context_attention import blocks_cpu, blocks_cuda, transport
from megaswift.kernels.context_attention.index import pack_order, rank_order
from megaswift.kernels.context_attention.partial import HeadSizes, Partial
from megaswift.kernels.context_attention.plan import ContextPlan
from megaswift.kernels.context_attention.segments import Pattern, Segment, gathered_segments, ring_segments
from megaswift.kernels.gather_rows.ops import gather_rows


class Keys(enum.Enum):
    """How the keys of other ring ranks come to a rank's queries."""

    RING = "ring"  # from neighbour to neighbour, while the ones at hand are worked on
    GATHERED = "gathered"  # all at once


@torch.compiler.disable  # messages between ranks stay out of compiled graphs
def context_attention(
    query_THK: torch.Tensor,
    key_TGK: torch.Tensor,
    value_TGL: torch.Tensor,
    plan: ContextPlan,
    *,
    pattern: Pattern,
    ring_group: dist.ProcessGroup | None = None,
    inner_group: dist.ProcessGroup | None = None,
    keys: Keys = Keys.RING,
    sinks_H: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the output [T, H, L] of this rank's tokens, `rank_tokens(plan, cp rank)`; every cp rank calls it.

    `ring_group` has plan.ring ranks and spreads keys; `inner_group` has plan.inner ranks and exchanges heads
    for tokens (Ulysses); either is None where its size is 1. G divides H. Key/value heads that the inner
    ranks do not divide are sent more than once. `sinks_H`: float logits of one key without a value per head.
    What moves per rank, elements: ring and gathered keys (R - 1) T G (K + L) forward and twice that backward,
    half of it sums in float32; exchanged heads (U - 1) / U T (H (K + L) + G' (K + L)), as much backward.
    Raises ConfigError where heads cannot be exchanged.
    """
    sizes = tuple(1 if group is None else dist.get_world_size(group) for group in (ring_group, inner_group))
    assert sizes == (plan.ring, plan.inner), (
        f"groups of {sizes} ranks for a plan of {(plan.ring, plan.inner)}"
    )
    spread = _Spread(plan=plan, pattern=pattern, group=ring_group if plan.ring > 1 else None, keys=keys)
    if inner_group is None or plan.inner == 1:
        return _SpreadAttention.apply(query_THK, key_TGK, value_TGL, sinks_H, spread)
    query_NHK, key_NGK, value_NGL = _exchange_heads(query_THK, key_TGK, value_TGL, inner_group)
    if sinks_H is not None:
        sinks_H = sinks_H.chunk(plan.inner)[dist.get_rank(inner_group)]
    out_NHL = _SpreadAttention.apply(query_NHK, key_NGK, value_NGL, sinks_H, spread)
    out_TF = transport.ExchangeTokens.apply(out_NHL.flatten(1), inner_group)
    return out_TF.unflatten(1, (query_THK.shape[1], -1))


def _exchange_heads(
    query_THK: torch.Tensor, key_TGK: torch.Tensor, value_TGL: torch.Tensor, group: dist.ProcessGroup
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return queries, keys and values of all tokens of the group and this rank's heads, in one exchange."""
    ranks, heads, groups = dist.get_world_size(group), query_THK.shape[1], key_TGK.shape[1]
    sent_groups = math.lcm(groups, ranks)
    if heads % sent_groups:
        raise ConfigError(
            f"{heads} query heads and {groups} key/value heads of one tensor-parallel rank cannot be exchanged "
            f"among {ranks} ranks. The query heads must be a multiple of {sent_groups}. "
            "Choose cp_comm_type p2p or all_gather, or fewer ranks for a2a."
        )
    copies = sent_groups // groups
    parts = (query_THK, key_TGK.repeat_interleave(copies, dim=1), value_TGL.repeat_interleave(copies, dim=1))
    by_rank = [part.unflatten(1, (ranks, -1)).flatten(2) for part in parts]
    every_NF = transport.ExchangeHeads.apply(torch.cat(by_rank, dim=2).flatten(1), group)
    split = every_NF.split([part.shape[2] for part in by_rank], dim=1)
    query_NHK, key_NGK, value_NGL = (
        flat.unflatten(1, (-1, part.shape[2])) for flat, part in zip(split, parts, strict=True)
    )
    return query_NHK, key_NGK, value_NGL


@dataclass(frozen=True, kw_only=True)
class _Spread:
    plan: ContextPlan
    pattern: Pattern
    group: dist.ProcessGroup | None
    keys: Keys

    @property
    def rank(self) -> int:
        return 0 if self.group is None else dist.get_rank(self.group)


class _SpreadAttention(torch.autograd.Function):
    """Attention of this rank's queries to the keys of all ring ranks; M is the larger head size."""

    @staticmethod
    def forward(
        ctx: Any,
        query_THK: torch.Tensor,
        key_TGK: torch.Tensor,
        value_TGL: torch.Tensor,
        sinks_H: torch.Tensor | None,
        spread: _Spread,
    ) -> torch.Tensor:
        sizes = HeadSizes(groups=key_TGK.shape[1], key=key_TGK.shape[2], value=value_TGL.shape[2])
        local_TF = torch.cat([key_TGK.flatten(1), value_TGL.flatten(1)], dim=1)
        query_THM = sizes.pad(query_THK)
        partial = Partial.empty(query_THM)
        blocks = _blocks(query_THK.device)
        for segments, _, at_hand_NF in _steps(local_TF, spread):
            blocks.attend(partial, sizes.inputs(query_THM, at_hand_NF), segments, spread.pattern)
        out_THM, lse_TH = partial.out_THK, partial.lse_TH
        if sinks_H is not None:
            whole_TH = torch.logaddexp(lse_TH, sinks_H.float())
            out_THM, lse_TH = out_THM * torch.exp(lse_TH - whole_TH)[..., None], whole_TH
        out_THL = out_THM[..., : sizes.value].to(query_THK.dtype).contiguous()
        ctx.save_for_backward(query_THK, local_TF, sinks_H, out_THL, lse_TH)
        ctx.sizes, ctx.spread = sizes, spread
        return out_THL

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query_THK, local_TF, sinks_H, out_THL, lse_TH = ctx.saved_tensors
        sizes, spread = ctx.sizes, ctx.spread
        query_THM, out_THM, grad_out_THM = (sizes.pad(x) for x in (query_THK, out_THL, grads[0].contiguous()))
        grad_query_THM = torch.zeros(query_THM.shape, dtype=torch.float32, device=query_THM.device)
        home = None if spread.group is None else transport.Homecoming(spread.group)
        blocks = _blocks(query_THK.device)
        ours_NF = None
        for segments, source, at_hand_NF in _steps(local_TF, spread):
            inputs = sizes.inputs(query_THM, at_hand_NF)
            sums = sizes.gradients(grad_query_THM, inputs)
            blocks.attend_backward(sums, inputs, grad_out_THM, out_THM, lse_TH, segments, spread.pattern)
            if source == spread.rank:
                ours_NF = sizes.join(sums)
            elif home is not None:
                home.add(sizes.join(sums))
        assert ours_NF is not None, "one of the steps is our own"
        if home is not None and spread.keys is Keys.RING:
            ours_NF = ours_NF + home.wait()
        elif home is not None:
            ours_NF = transport.scatter_sum(
                gather_rows(ours_NF, rank_order(spread.plan, ours_NF.device)), spread.group
            )
        grad_key_TGK, grad_value_TGL = sizes.split(ours_NF.to(query_THK.dtype))
        grad_query_THK = grad_query_THM[..., : sizes.key].to(query_THK.dtype)
        return (
            grad_query_THK,
            grad_key_TGK,
            grad_value_TGL,
            _sink_gradient(sinks_H, lse_TH, out_THL, grads[0]),
            None,
        )


def _steps(
    local_TF: torch.Tensor, spread: _Spread
) -> Iterator[tuple[tuple[Segment, ...], int, torch.Tensor]]:
    """Yield (segments, ring rank of the keys, keys and values at hand); keys of the whole pack come as our own."""
    plan, pattern, rank = spread.plan, spread.pattern, spread.rank
    if spread.group is None:
        yield gathered_segments(plan, pattern, rank), rank, local_TF
    elif spread.keys is Keys.GATHERED:
        every_NF = gather_rows(transport.gather(local_TF, spread.group), pack_order(plan, local_TF.device))
        yield gathered_segments(plan, pattern, rank), rank, every_NF
    else:
        for source, at_hand_TF in transport.circulate(local_TF, spread.group):
            yield ring_segments(plan, pattern, rank, source), source, at_hand_TF


def _sink_gradient(
    sinks_H: torch.Tensor | None, lse_TH: torch.Tensor, out_THL: torch.Tensor, grad_out_THL: torch.Tensor
) -> torch.Tensor | None:
    """Return the gradient of the sinks from this rank's queries: a sink takes its share from every output."""
    if sinks_H is None:
        return None
    share_TH = torch.exp(sinks_H.float() - lse_TH)
    return -(share_TH * (grad_out_THL.float() * out_THL.float()).sum(-1)).sum(0).to(sinks_H.dtype)


def _blocks(device: torch.device) -> ModuleType:
    return blocks_cuda if device.type == "cuda" else blocks_cpu
