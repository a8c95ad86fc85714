"""Which task a run has."""

from collections.abc import Callable, Sequence
from typing import Any

from megaswift.config.preference import PreferenceConfig
from megaswift.config.reference import compares
from megaswift.config.rollout_rules import generates
from megaswift.config.run import RunConfig
from megaswift.data.forms import Form, form_for
from megaswift.data.tokenizer import load_tokenizer, pad_id_of
from megaswift.metadata.meta import ModelMeta
from megaswift.tasks import cpo, dpo, orpo
from megaswift.tasks.answers import Answers, Outcome
from megaswift.tasks.grpo import Grpo, at_temperature
from megaswift.tasks.preference import Kto, Preference
from megaswift.tasks.rm import RewardModel, as_reward_model
from megaswift.tasks.sft import NextToken
from megaswift.tasks.task import RunModel, Task, run_model

# rlhf_type -> the loss of pairs, and the names of what it logs
PAIR_LOSSES: dict[str, tuple[Callable[[Answers, PreferenceConfig], Outcome], tuple[str, ...]]] = {
    "dpo": (dpo.dpo_loss, dpo.METRICS),
    "orpo": (orpo.orpo_loss, orpo.METRICS),
    "simpo": (cpo.simpo_loss, cpo.METRICS),
    "cpo": (cpo.cpo_loss, cpo.METRICS),
}


def form_of(run: RunConfig) -> Form:
    """Return what the rows of a run must hold."""
    return form_for(run.preference.rlhf_type if run.task == "rlhf" else None)


def trained_model(run: RunConfig, meta: ModelMeta) -> ModelMeta:
    """Return the facts of the model that the task trains: a reward model has another head, and GRPO's logits are divided by
    the temperature at which it samples. Raises UserError."""
    if generates(run):
        return at_temperature(meta, run.rollout.temperature)
    if run.task != "rlhf" or run.preference.rlhf_type != "rm":
        return meta
    tokenizer = load_tokenizer(str(meta.folder), trust_remote_code=run.model.trust_remote_code)
    return as_reward_model(meta, pad_id=pad_id_of(tokenizer))


def make_task(
    run: RunConfig,
    meta: ModelMeta,
    *,
    reference: Sequence[Any] | None = None,
    run_model: RunModel = run_model,
) -> Task:
    """Return the task of a resolved run on the model of trained_model().

    `reference` are the chunks of a frozen model to compare with, where there is one.

    Pre-training differs from fine-tuning in the data alone: its loss mask is one everywhere.
    """
    if run.task != "rlhf":
        return NextToken(run=run_model)
    settings = run.preference
    if settings.rlhf_type == "kto":
        return Kto(settings, reference=reference, run=run_model)
    if settings.rlhf_type == "grpo":
        return Grpo(settings, run.rollout, run=run_model)
    if settings.rlhf_type == "rm":
        return RewardModel(settings, pad_id=int(str(meta.raw["pad_token_id"])), run=run_model)
    loss, metrics = PAIR_LOSSES[settings.rlhf_type]
    return Preference(
        settings, loss, metrics=metrics, compares=compares(run), reference=reference, run=run_model
    )
