"""Whether a run compares its model with a reference or a teacher, whether that is a model in memory, and how it is built."""

from dataclasses import fields, replace

from megaswift.config.preference_rules import NEEDS_REFERENCE
from megaswift.config.run import RunConfig


def compares(run: RunConfig) -> bool:
    """Whether the task needs log-probabilities under a reference model."""
    settings = run.preference
    needs = settings.rlhf_type in NEEDS_REFERENCE and not settings.reference_free and settings.beta != 0
    return run.task == "rlhf" and needs


def distils(run: RunConfig) -> bool:
    """Whether the task compares the model's distributions with a teacher's."""
    return run.task == "rlhf" and run.preference.rlhf_type == "gkd"


def is_taught(run: RunConfig) -> bool:
    """Whether there is a teacher."""
    settings = run.preference
    return run.task == "rlhf" and (settings.teacher_model or settings.teacher_model_server) is not None


def has_teacher_here(run: RunConfig) -> bool:
    """Whether a teacher stands beside the trained model; others are behind HTTP."""
    return run.task == "rlhf" and run.preference.teacher_model is not None


def needs_reference(run: RunConfig) -> bool:
    """Whether a frozen reference stands beside the trained model; an adapted model without its adapters is its own.

    That holds as long as nothing but the adapters trains.
    """
    settings = run.preference
    if not compares(run) or settings.precompute_ref_log_probs:
        return False
    changes = run.tuner.tuner_type == "full" or bool(run.tuner.modules_to_save)
    named = (settings.ref_model, settings.mcore_ref_model, *settings.ref_adapters)
    return changes or any(name is not None for name in named)


def beside(run: RunConfig, *, has_experts: bool) -> RunConfig:
    """Return the settings of a frozen model beside the trained one: those of training are blank, and of experts without any."""
    plain = RunConfig(task=run.task)
    blank = {name: getattr(plain, name) for name in ("tuner", "freeze", "lisa", "optimizer", "muon")}
    training = {
        one.name: getattr(plain.training, one.name)
        for one in fields(plain.training)
        if one.name.startswith("recompute")
    }
    return replace(
        run,
        **blank,
        training=replace(run.training, **training),
        rollout=replace(run.rollout, router_replay_mode="disabled"),
        moe=run.moe if has_experts else plain.moe,
    )
