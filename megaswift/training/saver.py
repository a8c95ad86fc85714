"""What is saved of a run, all at once or while the training goes on."""

import platform as python_platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist

from megaswift.checkpoint.resume import named_folder
from megaswift.checkpoint.save import BegunSave, Writer, begin_save, finish_save
from megaswift.checkpoint.state import loss_scale, model_tensors, optimizer_tensors, states_of_the_rank
from megaswift.checkpoint.store import Manifest, Store
from megaswift.config.dump import dump_run
from megaswift.config.run import RunConfig
from megaswift.errors import UserError
from megaswift.logs import get_logger
from megaswift.metadata.meta import ModelMeta
from megaswift.parallel.agreement import TakenAlong
from megaswift.parallel.layout import Layout
from megaswift.training.engine import Engine
from megaswift.training.loop import Progress
from megaswift.training.setup import identity_of
from megaswift.training.validations import Validations

logger = get_logger(__name__)


@dataclass(kw_only=True)
class Saver:
    """Everything that a save needs to know; called with the progress, on every rank.

    With --async_save a call only begins a save, which `finish` makes a checkpoint; there is one at a time.
    """

    run: RunConfig
    meta: ModelMeta
    layout: Layout
    store: Store
    engine: Engine
    writers: dict[str, Writer]
    validations: Validations
    group: Any = None  # of all ranks, for tensors in host memory; None: the world
    tell: Callable[[Path], object] | None = None  # gets the folder of each complete checkpoint, on every rank

    _begun: BegunSave | None = field(default=None, init=False)
    _since: float = field(default=0.0, init=False)  # of perf_counter()
    _stood_s: float = field(default=0.0, init=False)

    def __call__(self, progress: Progress) -> float | None:
        """Save the run as it is after `progress`, or begin to; raises CheckpointError.

        Returns the seconds from the beginning of a save to the end of it, where this call completed one.
        """
        before_s = self.finish()
        settings, engine = self.run.checkpoint, self.engine
        self._since = perf_counter()
        with engine.settled_parameters():
            tensors = {}
            if settings.save_optim or not self.writers:
                tensors = model_tensors([chunk.module for chunk in engine.chunks])
            if settings.save_optim:
                tensors |= {
                    **optimizer_tensors(engine.optimizer, tensors),
                    **states_of_the_rank(engine.optimizer),
                }
            self._begun = begin_save(
                self.store,
                self._manifest(progress),
                tensors=tensors,
                writers=self.writers,
                texts={"run.yaml": dump_run(self.run)},
                keep=settings.save_total_limit,
                in_background=settings.async_save,
            )
        self._stood_s = perf_counter() - self._since
        return before_s if settings.async_save else self.finish()

    @property
    def is_under_way(self) -> bool:
        """Whether a save has begun and is no checkpoint yet."""
        return self._begun is not None

    def is_written(self) -> bool:
        """Return whether `finish` would wait for no rank's disk; every rank calls it while a save is under way."""
        assert self._begun is not None
        written = torch.tensor(int(self._begun.is_written))
        dist.all_reduce(written, op=dist.ReduceOp.MIN, group=self.group)
        return bool(written)

    def finish(self) -> float | None:
        """Make the save that is under way a checkpoint; None where there is none.

        Returns the seconds that it takes who waits for it, as far as this rank knows. Every rank calls it; raises CheckpointError
        where its writing has failed.
        """
        if self._begun is None:
            return None
        begun, self._begun = self._begun, None
        came = perf_counter()
        checkpoint = finish_save(begun)
        now = perf_counter()
        stood_s = self._stood_s + now - came
        # Who waits here waits for the writing; who comes later stood still beside it.
        seconds = min(now - self._since, stood_s + begun.writing_s)
        size = sum(checkpoint.manifest.files.values()) / 1e6
        beside = f", of which training stood still for {stood_s:.1f} s" if begun.thread else ""
        logger.info("saved %s: %.1f MB in %.1f s%s", checkpoint.folder, size, seconds, beside)
        if self.tell is not None:
            self.tell(checkpoint.folder)
        return seconds + perf_counter() - now

    @contextmanager
    def completing(self) -> Iterator[None]:
        """Make the save that is under way a checkpoint also where a run ends by an error, which all ranks leave with together."""
        try:
            yield
        except (UserError, TakenAlong) as error:
            if isinstance(error, TakenAlong) or error.is_known:  # else others may be amid collectives
                self.finish()
            raise

    def _manifest(self, progress: Progress) -> Manifest:
        return Manifest(
            **asdict(progress),
            resumable=self.run.checkpoint.save_optim,
            layout=asdict(self.layout),
            identity=identity_of(self.run, self.meta),
            seed=self.run.training.seed,
            versions=versions(),
            loss_scale=loss_scale(self.engine.optimizer),
            resumed_from=named_folder(self.run.checkpoint.resume),
            validations=None if self.validations.step is None else asdict(self.validations),
        )


def versions() -> dict[str, str]:
    """Return the versions that a checkpoint was written with."""
    found = {name: version(name) for name in ("megaswift", "megatron-core", "transformers")}
    return {"python": python_platform.python_version(), "torch": torch.__version__, **found}
