"""What the validations of a run found so far."""

from dataclasses import dataclass, field

from megaswift.checkpoint.store import Checkpoint, Criterion, figures_of
from megaswift.config.reward_rules import reward_names
from megaswift.config.rollout_rules import generates
from megaswift.config.run import RunConfig
from megaswift.errors import ConfigError
from megaswift.logs import get_logger
from megaswift.metadata.meta import ModelMeta
from megaswift.rollout.nlg import SCORES
from megaswift.rollout.rollout import LENGTHS
from megaswift.tasks.catalogue import logged_beside_the_loss

logger = get_logger(__name__)


@dataclass(kw_only=True)
class Validations:
    """The newest figures of the held-back rows, and the best one; every checkpoint keeps both, so that a resumed run counts on."""

    criterion: Criterion = field(default_factory=Criterion)
    step: int | None = None  # of the newest
    figures: dict[str, float] = field(default_factory=dict)  # its figures
    best: float | None = None
    since: int = 0  # validations after the best

    def add(self, step: int, figures: dict[str, float]) -> None:
        """Take the figures after a step; a validation without the one that counts changes nothing else."""
        self.step, self.figures = step, figures
        figure = self.criterion.figure(figures)
        if figure is not None and self.criterion.is_better(figure, than=self.best):
            self.best, self.since = figure, 0
        elif self.criterion.metric in figures:
            self.since += 1
        else:
            logger.warning(
                "the validation after step %d has no metric_for_best_model=%s, and no say in what is best: it reports %s",
                step,
                self.criterion.metric,
                ", ".join(figures),
            )

    def are_enough(self, patience: int | None) -> bool:
        """Return whether the best is `patience` validations ago."""
        return patience is not None and self.since >= patience


def criterion_of(run: RunConfig) -> Criterion:
    """Return what is best in a resolved run."""
    metric, greater = run.logging.metric_for_best_model, run.logging.greater_is_better
    assert metric is not None and greater is not None, "resolved"
    return Criterion(metric=metric, greater_is_better=greater)


def resumed_validations(run: RunConfig, checkpoint: Checkpoint | None) -> Validations:
    """Return the validations of a resolved run that goes on; where another figure counts now, the newest is the best so far."""
    stored, criterion = checkpoint.manifest.validations if checkpoint else None, criterion_of(run)
    if stored is None:
        return Validations(criterion=criterion)
    figures = figures_of(stored)
    found = Validations(criterion=criterion, step=stored["step"], figures=figures)
    if Criterion(**stored.get("criterion", {})) == criterion:
        found.best, found.since = stored["best" if "best" in stored else "lowest"], stored["since"]
    else:
        found.best = criterion.figure(figures)
    return found


def check_metric(run: RunConfig, meta: ModelMeta) -> None:
    """Raise ConfigError where no validation of a resolved run will report its metric_for_best_model; `meta` is the trained model's."""
    metric = run.logging.metric_for_best_model
    assert metric is not None, "resolved"
    if run.training.enable_channel_loss and metric.startswith("loss_"):
        return  # channels are in the rows, which nobody has read yet
    if generates(run):
        known = ["reward", *(f"rewards/{name}/mean" for name in reward_names(run.reward)), *LENGTHS]
    else:
        known = ["loss", *logged_beside_the_loss(run, meta)]
    known += SCORES if run.logging.predict_with_generate else []
    if metric not in known:
        raise ConfigError(
            f"metric_for_best_model={metric} is not what validations report here. Choose from {', '.join(known)}."
        )
