"""Megatron-Core's process groups for one layout."""

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.transformer.transformer_config import TransformerConfig

from megaswift.parallel.layout import Layout


def initialise(layout: Layout, *, seed: int, timeout_min: float) -> None:
    """Create the groups of every axis and seed Megatron's random states; every rank calls it."""
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp if layout.vpp > 1 else None,
        context_parallel_size=layout.cp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp,
        distributed_timeout_minutes=max(1, round(timeout_min)),
    )
    tensor_parallel.model_parallel_cuda_manual_seed(seed)


def context_levels(layout: Layout) -> list[int] | None:
    """Return the sizes of Megatron's nested context groups, the inner one first; None where one group does all."""
    return [layout.cp_inner, layout.cp_ring] if min(layout.cp_inner, layout.cp_ring) > 1 else None


def nest_context(layout: Layout, *, timeout_min: float) -> None:
    """Create the nested groups of the cp ranks where a layout has both levels; every rank of the world calls it.

    Megatron (0.16.1) makes them with all others, when the documents that decide are not known yet, and needs einops for it;
    they are kept where it keeps its own.
    """
    levels = context_levels(layout)
    if levels is None:
        return
    rank, inner = dist.get_rank(), layout.cp_inner
    timeout = timedelta(minutes=timeout_min)
    mine: dict[str, Any] = {}
    for first in range(0, layout.world, layout.tp * layout.cp):
        for tp_rank in range(layout.tp):
            members = [first + tp_rank + layout.tp * cp_rank for cp_rank in range(layout.cp)]
            nested = [("inner", members[start : start + inner]) for start in range(0, layout.cp, inner)]
            nested += [("ring", members[place::inner]) for place in range(inner)]
            for level, ranks in nested:
                group = parallel_state.create_group(ranks, timeout=timeout, group_desc=f"CONTEXT_{level}")
                if rank in ranks:
                    mine[level] = group
    parallel_state._HIERARCHICAL_CONTEXT_PARALLEL_GROUPS = [mine["inner"], mine["ring"]]


@dataclass(frozen=True, kw_only=True)
class ContextGroups:
    """The groups that a sequence is spread over; None where one rank does that part."""

    ring: Any = None  # ranks that hold different keys
    inner: Any = None  # ranks that exchange heads for tokens


def context_groups(config: TransformerConfig) -> ContextGroups:
    """Return this rank's groups for the way in which attention crosses ranks (parallel/context.py)."""
    if config.context_parallel_size == 1:
        return ContextGroups()
    if config.cp_comm_type == "a2a+p2p":
        inner, ring = parallel_state.get_hierarchical_context_parallel_groups()
        return ContextGroups(ring=ring, inner=inner)
    whole = parallel_state.get_context_parallel_group()
    return ContextGroups(inner=whole) if config.cp_comm_type == "a2a" else ContextGroups(ring=whole)


def destroy() -> None:
    """Free the groups, so that another layout can be initialised in the same processes; every rank calls it."""
    groups = parallel_state._global_process_group_list or []
    parallel_state.destroy_model_parallel()  # forgets the groups (0.16-0.19) and leaves most running: threads, in gloo
    for group in groups:
        if (
            dist.distributed_c10d._world.pg_map.get(group) is not None
        ):  # as Megatron asks for those that it does end
            dist.destroy_process_group(group)
