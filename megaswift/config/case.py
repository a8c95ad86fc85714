"""What a rule between settings looks at, and what it hands back."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from megaswift.config.run import RunConfig
from megaswift.metadata.meta import ModelMeta
from megaswift.parallel.layout import Layout


@dataclass(frozen=True, kw_only=True)
class Case:
    """A run, the model it trains and the ranks there are."""

    run: RunConfig
    meta: ModelMeta
    world: int
    platform: str  # "cuda" or "cpu"
    notes: tuple[str, ...] = ()  # what rules decided; rank 0 logs them

    @property
    def model_name(self) -> str:
        """The model's folder name, for messages."""
        return self.meta.folder.name if self.meta.folder else self.meta.model_type

    @property
    def layout(self) -> Layout:
        """Sizes of the process axes that the settings ask for."""
        parallel = self.run.parallel
        return Layout(
            world=self.world,
            tp=parallel.tp,
            pp=parallel.pp,
            vpp=parallel.vpp or 1,
            cp=parallel.cp,
            ep=parallel.ep,
            etp=parallel.etp or 1,
            sequence_parallel=parallel.sequence_parallel,
            pp_first=parallel.pp_first,
            pp_last=parallel.pp_last,
        )

    def change(self, section: str, note: str | None = None, **values: Any) -> "Case":
        """Return the case with settings of one section replaced, and a line about it."""
        run = replace(self.run, **{section: replace(getattr(self.run, section), **values)})
        return replace(self, run=run, notes=(*self.notes, note) if note else self.notes)


# A rule returns None where all is well, a changed case where it decides something, or raises ConfigError.
Rule = Callable[[Case], Case | None]
