"""Saving: every rank writes its part, and either all of them are in the checkpoint or there is none."""

import errno
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedBase
from torch.distributed.checkpoint import CheckpointException

from megaswift.checkpoint.state import local_bytes
from megaswift.checkpoint.store import Checkpoint, Manifest, Store
from megaswift.checkpoint.torch_dist import save_tensors
from megaswift.errors import CheckpointError, UserError
from megaswift.parallel.agreement import agree, agree_on_first

SHARDS = "megatron"  # the folder of the state that a run resumes from
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

# Writes one more part of a checkpoint, such as the export, into an empty folder; every rank calls it.
Writer = Callable[[Path], None]
T = TypeVar("T")


def save_checkpoint(
    store: Store,
    manifest: Manifest,
    *,
    tensors: Mapping[str, ShardedBase],
    writers: Mapping[str, Writer],
    texts: Mapping[str, str],
    keep: int | None,
) -> Checkpoint:
    """Save `tensors` (none: no state to resume from), what `writers` write into folders of their names, and small `texts`.

    Every rank of the world calls it. Raises CheckpointError where the disk is full or refuses; nothing of the save is then
    left, and older checkpoints are as they were. Once the new one is complete, those beyond `keep` are deleted.
    """
    expected = torch.tensor([local_bytes(dict(tensors))], device=torch.cuda.current_device())
    dist.all_reduce(expected)
    parts: dict[str, Writer] = dict(writers)
    if tensors:
        parts = {SHARDS: lambda folder: save_tensors(folder, tensors), **parts}
    folder = agree_on_first(lambda: _begin(store, manifest.step, int(expected), list(parts), texts))
    try:
        for name, write in parts.items():
            _write(write, folder / name, step=manifest.step)
        checkpoint = agree_on_first(lambda: _told(lambda: store.commit(folder, manifest), step=manifest.step))
    except BaseException:
        if dist.get_rank() == 0:
            store.discard(folder)
        raise
    agree_on_first(lambda: store.rotate(keep))
    return checkpoint


def _begin(store: Store, step: int, expected_bytes: int, parts: list[str], texts: Mapping[str, str]) -> Path:
    def begin() -> Path:
        folder = store.begin(step, expected_bytes=expected_bytes)
        try:
            for name in parts:
                (folder / name).mkdir()
            for name, text in texts.items():
                (folder / name).write_text(text, encoding="utf-8")
            # A quota or a full tmpfs shows here, where only rank 0 has to say so.
            probe = folder / "probe"
            probe.write_bytes(b"\0" * 2**16)
            probe.unlink()
        except OSError:
            store.discard(folder)
            raise
        return folder

    return _told(begin, step=step)


def _write(write: Writer, folder: Path, *, step: int) -> None:
    # A writer's collectives come before its files, so that ranks meet again here when one of them cannot write.
    agree(lambda: _told(lambda: write(folder), step=step))


def _told(action: Callable[[], T], *, step: int) -> T:
    try:
        return action()
    except UserError:
        raise
    except (OSError, CheckpointException, RuntimeError) as error:
        cause = _first_cause(error)
        if cause is None:
            raise
        advice = "Free some space" if cause.errno in FULL else "Make the folder writable"
        raise CheckpointError(
            f"The checkpoint of step {step} could not be written: {cause.strerror or cause}. Older checkpoints are intact. "
            f"{advice} and start the same command again."
        ) from error


def _first_cause(error: BaseException) -> OSError | None:
    """Return the operating system's refusal behind an error of torch's writers, or None where there is none."""
    if isinstance(error, CheckpointException):
        inner = next((pair[0] for pair in error.failures.values()), None)
        return _first_cause(inner) if inner is not None else None
    behind: BaseException | None = error
    while behind is not None:
        if isinstance(behind, OSError):
            return behind
        behind = behind.__cause__ or behind.__context__
    # torch.save closes its archive after a failed write and reports that instead; between ranks the reason is lost.
    if any(name in str(error) for name in ("PytorchStreamWriter", "inline_container")):
        return OSError(errno.ENOSPC, "a file could not be written to its end")
    return None
