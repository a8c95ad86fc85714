"""A reference model that follows the trained one: Gorbatovski et al. 2024, TR-DPO (arXiv 2404.09656), as TRL's SyncRefModelCallback.

Every --ref_model_sync_steps steps its weights become alpha x the trained model's + (1 - alpha) x its own. They are no longer
those of any folder, so every checkpoint holds them, and a resumed run reads them there.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megaswift.checkpoint.store import Checkpoint
from megaswift.config.run import RunConfig
from megaswift.converters.export import export_hf
from megaswift.errors import ConfigError
from megaswift.metadata.meta import ModelMeta
from megaswift.parallel.layout import Layout
from megaswift.training.engine import Engine
from megaswift.training.loop import Step
from megaswift.training.reference import reference_meta

FOLDER = "reference"  # of a checkpoint


class FollowReference:
    """A callback that moves the reference; every rank has the same part of both models."""

    def __init__(self, engine: Engine, reference: Sequence[Any], *, every_steps: int, alpha: float) -> None:
        """Raises ConfigError where the reference is a model of another shape."""
        self._engine, self._every_steps, self._alpha = engine, every_steps, alpha
        chunks = [chunk.module for chunk in engine.chunks]
        trained, following = (
            {
                (number, name): value
                for number, chunk in enumerate(models)
                for name, value in chunk.named_parameters()
            }
            for models in (chunks, reference)
        )
        shapes, others = ({name: value.shape for name, value in one.items()} for one in (trained, following))
        if shapes != others:
            raise ConfigError(
                "sync_ref_model=true needs a ref_model of the same shape as the trained model. Choose one, or leave it out."
            )
        self._pairs = [(following[name], value) for name, value in trained.items()]

    @torch.no_grad()
    def after_step(self, step: Step) -> bool:
        """Move the reference where it is time."""
        if step.progress.step % self._every_steps == 0:
            with self._engine.settled_parameters():
                for follower, trained in self._pairs:
                    follower.mul_(1 - self._alpha).add_(trained.to(follower), alpha=self._alpha)
        return False


def kept_reference(run: RunConfig, checkpoint: Checkpoint | None) -> Path | None:
    """Return where a resumed run finds the weights of its reference; None: where it began. Raises ConfigError."""
    if checkpoint is None or not run.preference.sync_ref_model:
        return None
    folder = checkpoint.folder / FOLDER
    if not folder.is_dir():
        raise ConfigError(
            f"sync_ref_model=true: {checkpoint.folder} holds no reference, as its run had none that follows. Leave it out, or start anew."
        )
    return folder


def reference_writers(
    run: RunConfig, meta: ModelMeta, layout: Layout, reference: Sequence[Any] | None
) -> dict[str, Callable[[Path], None]]:
    """Return what writes the reference into a checkpoint, where it follows."""
    if not run.preference.sync_ref_model or reference is None:
        return {}
    own, dtype = reference_meta(run, meta), run.model.torch_dtype or meta.dtype

    def write(folder: Path) -> None:
        export_hf(reference, own, layout, dist.get_rank(), folder, dtype=dtype)

    return {FOLDER: write}
