"""Megatron's torch_dist format, written by this process itself and read by Megatron."""

from collections.abc import Mapping
from concurrent.futures import Future
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedBase
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, WriteItem
from torch.distributed.checkpoint.utils import _DistWrapper


class HostCopies(MCoreSavePlanner):
    """Has the planned part of this rank copied to host memory, so that it can be written while training changes the tensors."""

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        """Copy what the plan names."""
        plan = super().finish_plan(new_plan)
        resolve = super().resolve_data
        self._copies: dict[MetadataIndex, torch.Tensor | BytesIO] = {
            item.index: _copied(resolve(item)) for item in plan.items
        }
        torch.cuda.synchronize()  # copies to pinned memory do not wait
        return plan

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | BytesIO:
        """Return the copy, which the writer asks for once."""
        return self._copies.pop(write_item.index)


class DirectSave(TorchDistSaveShardedStrategy):
    """Megatron's format, plan and protocol, but torch's writer.

    Megatron's own writer (0.16-0.19) starts a manager process that outlives a killed rank and forks one process a file,
    which a multi-threaded rank must not do; torch's writes from this process, syncs, and reports an error on any rank to all.
    """

    def __init__(self, *, copies: bool) -> None:
        """With `copies`, tensors may change as soon as the plan is made."""
        super().__init__("torch_dist", 1)
        self._copies = copies

    def async_save(self, sharded_state_dict: Any, checkpoint_dir: Any) -> AsyncRequest:
        """Plan; every rank of the world calls it. Raises CheckpointException on all ranks alike, as the request's end does.

        The request writes this rank's part in whatever thread runs it: the collectives are all in the plan and in the end, which
        waits for the writing. So does dcp.save (torch 2.13), here cut into these three.
        """
        by_key, _, _ = _replace_state_dict_keys_with_sharded_keys(
            sharded_state_dict, self.keep_only_main_replica
        )
        state = mcore_to_pyt_state_dict(by_key, False)
        kind = HostCopies if self._copies else MCoreSavePlanner
        planner = kind(dedup_replicated_tensors=False, flatten_state_dict=False)
        # Copying ahead from a GPU is on the current device, and a new thread's is the first one.
        ahead = {"per_thread_copy_ahead": 0} if self._copies else {}
        writer = dcp.FileSystemWriter(checkpoint_dir, sync_files=True, **ahead)
        ranks = _DistWrapper(None, use_dist=True, coordinator_rank=0)
        metadata: Metadata | None = None  # of all ranks, on the first

        def plan_of_the_rank() -> SavePlan:
            first = ranks.is_coordinator
            planner.set_up_planner(state, storage_meta=writer.storage_meta(), is_coordinator=first)
            writer.set_up_storage_writer(first)
            return writer.prepare_local_plan(planner.create_local_plan())

        def plans_of_all(plans: list[SavePlan]) -> list[SavePlan]:
            nonlocal metadata
            plans, metadata = planner.create_global_plan(plans)
            return writer.prepare_global_plan(plans)

        plan = planner.finish_plan(ranks.reduce_scatter("plan", plan_of_the_rank, plans_of_all))
        written: Future[Any] = Future()

        def write() -> None:
            try:
                written.set_result(writer.write_data(plan, planner).value())
            except Exception as error:  # noqa: BLE001 - the end raises it, on all ranks
                written.set_exception(error)

        def write_metadata(results: list[Any]) -> None:
            assert metadata is not None, "the first rank planned"
            writer.finish(metadata, results)

        def end() -> None:
            ranks.all_reduce("write", written.result, write_metadata)

        return AsyncRequest(write, (), [end])


def begin_tensors(folder: Path, tensors: Mapping[str, ShardedBase], *, copies: bool) -> AsyncRequest:
    """Plan the writing of sharded tensors into the empty `folder`, each shard by one of the ranks that hold it.

    Every rank calls it, then the request's `async_fn`, in any thread, then each of its `finalize_fns`. With `copies`, the
    tensors may change from now on: what this rank writes is in host memory.
    """
    replicas = parallel_state.get_data_parallel_group(with_context_parallel=True)
    strategy = FullyParallelSaveStrategyWrapper(DirectSave(copies=copies), replicas)
    return dist_checkpointing.save(dict(tensors), str(folder), strategy, async_sharded_save=True)


def load_tensors(folder: Path, tensors: Mapping[str, ShardedBase]) -> dict[str, Any]:
    """Return what `folder` holds for each of `tensors`, however it was sharded; every rank calls it.

    Tensors that carry data are read in place. Raises CheckpointingException for a tensor that is not there.
    """
    loaded: dict[str, Any] = dist_checkpointing.load(dict(tensors), str(folder))
    return {name: loaded[name] for name in tensors}


def _copied(value: torch.Tensor | BytesIO) -> torch.Tensor | BytesIO:
    if isinstance(value, BytesIO):  # of an object, packed when the plan began
        return value
    copy = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda, requires_grad=False)
    return copy.copy_(value.detach(), non_blocking=True)
