"""Megatron-Core's process groups for one layout."""

import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

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


def destroy() -> None:
    """Free the groups, so that another layout can be initialised in the same processes; every rank calls it."""
    groups = parallel_state._global_process_group_list or []
    parallel_state.destroy_model_parallel()  # forgets the groups (0.16-0.19) and leaves most running: threads, in gloo
    for group in groups:
        if dist.distributed_c10d._world.pg_map.get(group) is not None:  # as Megatron asks for those that it does end
            dist.destroy_process_group(group)
