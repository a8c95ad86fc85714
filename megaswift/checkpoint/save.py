"""Saving: every rank writes its part, and either all of them are in the checkpoint or there is none."""

import errno
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Thread
from time import perf_counter
from typing import TypeVar

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedBase
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from torch.distributed.checkpoint import CheckpointException

from megaswift.checkpoint.state import local_bytes
from megaswift.checkpoint.store import Checkpoint, Manifest, Store
from megaswift.checkpoint.torch_dist import begin_tensors
from megaswift.errors import CheckpointError, UserError
from megaswift.parallel.agreement import agree, agree_on_first

SHARDS = "megatron"  # the folder of the state that a run resumes from
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

# Writes one more part of a checkpoint, such as the export, into an empty folder; every rank calls it.
Writer = Callable[[Path], None]
T = TypeVar("T")


class Writing(Thread):
    """Writes in the background, and knows how long it took."""

    seconds = 0.0

    def run(self) -> None:
        """Write."""
        began = perf_counter()
        super().run()
        self.seconds = perf_counter() - began


@dataclass(frozen=True, kw_only=True)
class BegunSave:
    """A save whose tensors may still be on their way to the disk; finish_save() makes a checkpoint of it."""

    store: Store
    manifest: Manifest
    folder: Path
    keep: int | None
    tensors: AsyncRequest | None  # none: no state to resume from
    thread: Writing | None  # of the tensors, in the background

    @property
    def is_written(self) -> bool:
        """Whether this rank has written its part, or has failed to: finish_save() would not wait for it."""
        return self.thread is None or not self.thread.is_alive()

    @property
    def writing_s(self) -> float:
        """How long this rank has written in the background, once it has."""
        return 0.0 if self.thread is None else self.thread.seconds


def begin_save(
    store: Store,
    manifest: Manifest,
    *,
    tensors: Mapping[str, ShardedBase],
    writers: Mapping[str, Writer],
    texts: Mapping[str, str],
    keep: int | None,
    in_background: bool,
) -> BegunSave:
    """Write what `writers` write into folders of their names, and small `texts`; then `tensors` (none: no state to resume from).

    Every rank of the world calls it, and finish_save() before it begins another one. `in_background`, the tensors may change
    from now on: copies in host memory are written by a thread that takes part in no collective. Raises CheckpointError where
    the disk is full or refuses; nothing of the save is then left, and older checkpoints are as they were.
    """
    expected = torch.tensor([local_bytes(dict(tensors))], device=torch.cuda.current_device())
    dist.all_reduce(expected)
    parts = [*writers, *([SHARDS] if tensors else [])]
    folder = agree_on_first(lambda: _begin(store, manifest.step, int(expected), parts, texts))
    request, thread = None, None
    with _discarded_on_failure(store, folder):
        for name, write in writers.items():
            _together(partial(write, folder / name), step=manifest.step)
        if tensors:
            shards = folder / SHARDS
            request = _together(
                lambda: begin_tensors(shards, tensors, copies=in_background), step=manifest.step
            )
            if in_background:
                thread = Writing(target=request.async_fn, name="checkpoint")
                thread.start()
            else:
                request.async_fn()
    return BegunSave(store=store, manifest=manifest, folder=folder, keep=keep, tensors=request, thread=thread)


def finish_save(save: BegunSave) -> Checkpoint:
    """Wait until all ranks have written their parts and make the save a checkpoint; every rank of the world calls it.

    Raises CheckpointError as begin_save() does. Once the new one is complete, those beyond `keep` are deleted.
    """
    step = save.manifest.step
    with _discarded_on_failure(save.store, save.folder):
        if save.tensors is not None:
            for end in save.tensors.finalize_fns:
                _together(end, step=step)
        checkpoint = agree_on_first(
            lambda: _told(lambda: save.store.commit(save.folder, save.manifest), step=step)
        )
    agree_on_first(lambda: save.store.rotate(save.keep))
    return checkpoint


@contextmanager
def _discarded_on_failure(store: Store, folder: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        if dist.get_rank() == 0:
            store.discard(folder)
        raise


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


def _together(action: Callable[[], T], *, step: int) -> T:
    # The collectives of an action come before its files, so that ranks meet again here when one of them cannot write.
    return agree(lambda: _told(action, step=step))


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
