"""Megatron's torch_dist format, written by this process itself and read by Megatron."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedBase
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)


class DirectSave(TorchDistSaveShardedStrategy):
    """Megatron's format and plan, but torch's synchronous writer.

    Megatron's own writer (0.16-0.19) starts a manager process that outlives a killed rank and forks one process a file,
    which a multi-threaded rank must not do; torch's writes from this process, syncs, and reports an error on any rank to all.
    """

    def save(self, sharded_state_dict: Any, checkpoint_dir: Any) -> None:
        """Write this rank's part; every rank of the world calls it. Raises CheckpointException on all ranks alike."""
        by_key, _, _ = _replace_state_dict_keys_with_sharded_keys(
            sharded_state_dict, self.keep_only_main_replica
        )
        dcp.save(
            mcore_to_pyt_state_dict(by_key, False),
            storage_writer=dcp.FileSystemWriter(checkpoint_dir, sync_files=True),
            planner=MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
        )


def save_tensors(folder: Path, tensors: Mapping[str, ShardedBase]) -> None:
    """Write sharded tensors into the empty `folder`, each shard by one of the ranks that hold it; every rank calls it."""
    replicas = parallel_state.get_data_parallel_group(with_context_parallel=True)
    strategy = FullyParallelSaveStrategyWrapper(DirectSave("torch_dist", 1), replicas)
    dist_checkpointing.save(dict(tensors), str(folder), strategy)


def load_tensors(folder: Path, tensors: Mapping[str, ShardedBase]) -> dict[str, Any]:
    """Return what `folder` holds for each of `tensors`, however it was sharded; every rank calls it.

    Tensors that carry data are read in place. Raises CheckpointingException for a tensor that is not there.
    """
    loaded: dict[str, Any] = dist_checkpointing.load(dict(tensors), str(folder))
    return {name: loaded[name] for name in tensors}
