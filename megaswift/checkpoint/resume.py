"""Resuming: which checkpoint a run goes on from, and reading it under the layout of today."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from megaswift.checkpoint.save import SHARDS
from megaswift.checkpoint.state import (
    allocate_states,
    model_tensors,
    optimizer_tensors,
    renew_host_copies,
    restore_loss_scale,
    restore_states_of_the_rank,
    states_of_the_rank,
)
from megaswift.checkpoint.store import Checkpoint, Store, read_checkpoint
from megaswift.checkpoint.torch_dist import load_tensors
from megaswift.errors import CheckpointError
from megaswift.logs import get_logger
from megaswift.parallel.layout import Layout

logger = get_logger(__name__)


def find_checkpoint(store: Store, resume: str) -> Checkpoint | None:
    """Return the checkpoint that --resume means, or None for a fresh start. Rank 0 alone calls it.

    Raises CheckpointError for a folder that is not a complete checkpoint or cannot be resumed from, and where a fresh start
    would mix two runs in one folder.
    """
    newest = store.latest_complete()
    if resume == "never":
        if newest is not None:
            raise CheckpointError(
                f"resume=never but {store.output_dir} holds {newest.folder.name} of an earlier run. "
                "Choose another --output_dir, or --resume auto to go on."
            )
        return None
    chosen = newest if resume == "auto" else read_checkpoint(Path(resume))
    named = named_folder(resume)
    if named is not None and newest is not None and newest.manifest.resumed_from == named:
        # The same command again, of a later slice of the job: not back to where the first one began.
        logger.info("going on from %s, which came from resume=%s", newest.folder.name, resume)
        chosen = newest
    if chosen is not None and not chosen.manifest.resumable:
        raise CheckpointError(
            f"{chosen.folder} holds no optimizer state: it was saved with --save_optim false. "
            "Start a new run from its export in another --output_dir."
        )
    return chosen


def named_folder(resume: str) -> str | None:
    """Return the folder that --resume names, if it names one."""
    return None if resume in ("auto", "never") else str(Path(resume).resolve())


def check_identity(checkpoint: Checkpoint, identity: dict[str, Any]) -> None:
    """Raise CheckpointError where the run's model, adapters or precision are not those of the checkpoint."""
    for name, stored in checkpoint.manifest.identity.items():
        if name in identity and identity[name] != stored:
            raise CheckpointError(
                f"{name}={identity[name]} but {checkpoint.folder} was trained with {name}={stored}. "
                "Give the same value, or another --output_dir for a new run."
            )


def load_checkpoint(checkpoint: Checkpoint, *, chunks: list[Any], optimizer: Any, layout: Layout) -> None:
    """Read weights, optimizer and, under the same layout, random states; every rank of the world calls it.

    `chunks` are this rank's CausalLM chunks, `optimizer` is Megatron's over them and has not stepped.
    """
    manifest = checkpoint.manifest
    allocate_states(optimizer, updates=manifest.updates)
    weights = model_tensors(chunks)
    wanted = {**weights, **optimizer_tensors(optimizer, weights)}
    same_layout = manifest.layout == asdict(layout)
    own = states_of_the_rank(optimizer)
    if same_layout:
        wanted |= own
    elif "subspaces" in own:
        logger.warning("the layout has changed: moments in subspaces of the gradient start anew")
    loaded = load_tensors(checkpoint.folder / SHARDS, wanted)
    for name, value in weights.items():
        # Read in place where the shard is the weight itself; a weight that is saved as two tensors comes back joined.
        data: Any = value.data
        if loaded[name].data_ptr() != data.data_ptr():
            data.detach().copy_(loaded[name])
    renew_host_copies(optimizer)
    if same_layout:
        restore_states_of_the_rank(optimizer, loaded)
    restore_loss_scale(optimizer, manifest.loss_scale)
