"""The models that the trained one is compared with, or learns from: frozen beside it, or behind HTTP."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from megaswift.checkpoint.store import Checkpoint
from megaswift.config.reference import has_teacher_here, needs_reference
from megaswift.config.run import RunConfig
from megaswift.metadata.meta import ModelMeta
from megaswift.parallel.agreement import alike
from megaswift.parallel.layout import Layout
from megaswift.platforms.platform import Platform
from megaswift.tasks.task import CallIn
from megaswift.training.following import kept_reference
from megaswift.training.reference import reference_copy, teacher_copy
from megaswift.training.set_aside import room_beside_a_teacher
from megaswift.training.teachers import Teachers, start_teachers


@dataclass(frozen=True, kw_only=True)
class Guides:
    """What a run has of them; chunks are this rank's."""

    reference: Sequence[Any] | None = None
    teacher: Sequence[Any] | None = None
    call_in: CallIn = nullcontext  # brings the teacher to memory
    served: Teachers | None = None  # teachers elsewhere, in place of the one here

    @property
    def frozen(self) -> tuple[Any, ...]:
        """All chunks."""
        return (*(self.reference or ()), *(self.teacher or ()))


def load_guides(
    run: RunConfig,
    meta: ModelMeta,
    layout: Layout,
    platform: Platform,
    *,
    checkpoint: Checkpoint | None,
    group: Any,
) -> Guides:
    """Return those of a resolved run; every rank of the world calls it. Raises UserError.

    `meta` are the facts of the trained model, `checkpoint` is the one that the run goes on from, `group` holds all ranks and is
    patient.
    """
    served = start_teachers(run, meta, device=platform.device, group=group)
    reference = teacher = None
    call_in: CallIn = nullcontext
    if needs_reference(run):
        kept = alike(lambda: kept_reference(run, checkpoint))
        reference = reference_copy(run, meta, layout, platform, group=group, kept=kept)
    if has_teacher_here(run):
        teacher = teacher_copy(run, meta, layout, platform, group=group)
        call_in = room_beside_a_teacher(run, teacher)
    return Guides(reference=reference, teacher=teacher, call_in=call_in, served=served)
