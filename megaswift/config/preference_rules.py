"""Rules of `megaswift rlhf`: which settings belong to which preference loss, and what they are when not given."""

from typing import Any

from megaswift.config.case import Case
from megaswift.config.loss_forms import JUDGE_ALONE, LOSS_TYPES, weighted_forms
from megaswift.config.preference import PreferenceConfig
from megaswift.config.reranker import TASK_TYPES
from megaswift.config.run import RunConfig
from megaswift.errors import ConfigError, nearest

# setting -> the rlhf_types that read it
BELONGS: dict[str, tuple[str, ...]] = {
    "discopop_tau": ("dpo",),
    "loss_weights": ("dpo",),
    "ld_alpha": ("dpo",),
    "f_divergence_type": ("dpo",),
    "f_alpha_divergence_coef": ("dpo",),
    "label_smoothing": ("dpo", "cpo", "simpo"),
    "rpo_alpha": ("dpo",),
    "reference_free": ("dpo",),
    "cpo_alpha": ("cpo", "simpo"),
    "simpo_gamma": ("simpo",),
    "desirable_weight": ("kto",),
    "undesirable_weight": ("kto",),
    "calculate_kl": ("kto",),
    "center_rewards_coefficient": ("rm",),
    "ref_model": ("dpo", "kto", "grpo"),
    "mcore_ref_model": ("dpo", "kto", "grpo"),
    "ref_adapters": ("dpo", "kto", "grpo"),
    "precompute_ref_log_probs": ("dpo", "kto"),
    "sync_ref_model": ("dpo", "grpo"),
    "ref_model_mixup_alpha": ("dpo", "grpo"),
    "ref_model_sync_steps": ("dpo", "grpo"),
    "teacher_model": ("gkd", "grpo"),
    "teacher_model_server": ("gkd", "grpo"),
    "teacher_tag_key": ("gkd", "grpo"),
    "offload_teacher_model": ("gkd", "grpo"),
    "teacher_kl_coef": ("grpo",),
    "lmbda": ("gkd",),
    "seq_kd": ("gkd",),
    "gkd_logits_topk": ("gkd",),
    "sft_alpha": ("gkd",),
}
NEEDS_REFERENCE = ("dpo", "kto", "grpo")
DEFAULT_BETA = {"simpo": 2.0, "grpo": 0.04, "gkd": 0.5}  # others 0.1


def preferences_are_for_rlhf(run: RunConfig) -> None:
    """Settings of preference training mean nothing to other tasks."""
    if run.task == "rlhf":
        return
    blank = PreferenceConfig()
    for name in vars(blank):
        value = getattr(run.preference, name)
        if name == "loss_type" and run.model.task_type in ("embedding", *TASK_TYPES):
            continue
        if value != getattr(blank, name):
            raise ConfigError(f"{name}={value} is for `megaswift rlhf`, not `megaswift {run.task}`.")


def preference_settings_belong_to_the_loss(run: RunConfig) -> None:
    """A setting that the chosen loss does not read is a mistake."""
    chosen, blank = run.preference, PreferenceConfig()
    for name, readers in BELONGS.items():
        value = getattr(chosen, name)
        if run.task == "rlhf" and value != getattr(blank, name) and chosen.rlhf_type not in readers:
            raise ConfigError(
                f"{name}={value} is for rlhf_type {' and '.join(readers)}, not {chosen.rlhf_type}. Leave it out."
            )


def the_loss_type_is_known(run: RunConfig) -> None:
    """Each rlhf_type has forms of its own."""
    asked, kind = run.preference.loss_type, run.preference.rlhf_type
    if run.task != "rlhf":
        return
    if asked is not None and not LOSS_TYPES[kind]:
        raise ConfigError(f"loss_type={asked}: rlhf_type={kind} has one form. Leave it out.")
    forms = () if asked is None else asked.split()
    for form in forms:
        if form not in LOSS_TYPES[kind]:
            raise ConfigError(
                f"loss_type={form} is not built for rlhf_type={kind}.{nearest(form, LOSS_TYPES[kind])}"
            )
    if len(forms) > 1 and kind != "dpo":
        raise ConfigError(f"loss_type={asked}: only rlhf_type=dpo adds several forms up. Give one.")
    if len(set(forms)) < len(forms):
        raise ConfigError(f"loss_type={asked} names a form twice.")
    weighted_forms(run.preference)


def preference_numbers_are_in_range(run: RunConfig) -> None:
    """Strengths are positive, and fewer than half of the labels are wrong."""
    chosen = run.preference
    may_be_0 = chosen.rlhf_type in ("grpo", "gkd")
    if chosen.beta is not None and (chosen.beta < 0 or (chosen.beta == 0 and not may_be_0)):
        raise ConfigError(f"beta={chosen.beta:g} is too small. Give more than 0.")
    if chosen.beta is not None and chosen.beta > 1 and chosen.rlhf_type == "gkd":
        raise ConfigError(f"beta={chosen.beta:g} is not a share. Give 0 to 1 for rlhf_type=gkd.")
    if not 0 <= chosen.lmbda <= 1:
        raise ConfigError(f"lmbda={chosen.lmbda:g} is not a share of the steps. Give 0 to 1.")
    if chosen.gkd_logits_topk is not None and chosen.gkd_logits_topk < 1:
        raise ConfigError(f"gkd_logits_topk={chosen.gkd_logits_topk} is too small. Give 1 or more.")
    if chosen.sft_alpha and chosen.lmbda == 1:
        raise ConfigError(
            "sft_alpha is for answers that the trained model did not write, and lmbda=1 leaves none. Leave one of them out."
        )
    if chosen.seq_kd and chosen.lmbda == 1:
        raise ConfigError(
            "seq_kd=true has no steps, as lmbda=1 leaves none to the teacher. Leave one of them out."
        )
    if not 0 <= chosen.label_smoothing < 0.5:
        raise ConfigError(f"label_smoothing={chosen.label_smoothing:g} is not from 0 to below 0.5.")
    for name in (
        "rpo_alpha",
        "cpo_alpha",
        "sft_alpha",
        "desirable_weight",
        "undesirable_weight",
        "center_rewards_coefficient",
    ):
        value = getattr(chosen, name)
        if value is not None and value < 0:
            raise ConfigError(f"{name}={value:g} is negative. Give 0 or more.")
    if chosen.ld_alpha is not None and not 0 <= chosen.ld_alpha <= 1:
        raise ConfigError(f"ld_alpha={chosen.ld_alpha:g} is not from 0 to 1.")
    forms = (chosen.loss_type or "sigmoid").split()
    if chosen.label_smoothing and not {"sigmoid", "robust", "exo_pair"} & set(forms):
        raise ConfigError(
            f"label_smoothing is for loss_type sigmoid, robust and exo_pair, not {chosen.loss_type}. Leave it out."
        )
    alone = JUDGE_ALONE & set(forms)
    if chosen.f_divergence_type != "reverse_kl" and alone:
        raise ConfigError(
            f"f_divergence_type={chosen.f_divergence_type} is for forms that compare two answers, and loss_type "
            f"{' and '.join(sorted(alone))} judges each by itself. Leave one of them out."
        )
    if chosen.f_divergence_type != "alpha_divergence" and (
        chosen.f_alpha_divergence_coef != PreferenceConfig().f_alpha_divergence_coef
    ):
        raise ConfigError(
            f"f_alpha_divergence_coef={chosen.f_alpha_divergence_coef:g} is for f_divergence_type=alpha_divergence, not "
            f"{chosen.f_divergence_type}. Leave it out."
        )
    if chosen.discopop_tau <= 0:
        raise ConfigError(f"discopop_tau={chosen.discopop_tau:g} is too small. Give more than 0.")
    named = chosen.ref_model or chosen.mcore_ref_model or chosen.ref_adapters
    if chosen.reference_free and (named or chosen.precompute_ref_log_probs):
        raise ConfigError(
            "reference_free=true has no reference model. Leave --ref_model, --mcore_ref_model, --ref_adapters and "
            "--precompute_ref_log_probs out."
        )
    if len(chosen.ref_adapters) > 1:
        raise ConfigError(
            f"ref_adapters={' '.join(chosen.ref_adapters)}: the reference has one adapter. Give one folder."
        )


def a_reference_that_follows_is_in_memory(run: RunConfig) -> None:
    """Weights that move are those of a frozen copy."""
    chosen, blank = run.preference, PreferenceConfig()
    if not chosen.sync_ref_model:
        for name in ("ref_model_mixup_alpha", "ref_model_sync_steps"):
            if getattr(chosen, name) != getattr(blank, name):
                raise ConfigError(
                    f"{name}={getattr(chosen, name):g} needs sync_ref_model=true. Add it, or leave this out."
                )
        return
    if not 0 < chosen.ref_model_mixup_alpha <= 1:
        raise ConfigError(
            f"ref_model_mixup_alpha={chosen.ref_model_mixup_alpha:g} is not above 0 and up to 1."
        )
    if chosen.ref_model_sync_steps < 1:
        raise ConfigError(f"ref_model_sync_steps={chosen.ref_model_sync_steps} is too small. Give 1 or more.")
    if (
        chosen.precompute_ref_log_probs
        or chosen.reference_free
        or chosen.beta == 0
        or chosen.ref_adapters
        or run.tuner.tuner_type != "full"
    ):
        raise ConfigError(
            "sync_ref_model=true moves the weights of a reference in memory: not with precompute_ref_log_probs, reference_free, "
            "beta=0 or adapters. Leave one of them out."
        )


def preference_settings_have_defaults(case: Case) -> Case | None:
    """Fill what depends on the loss; the papers' values, as TRL 1.16 and ms-swift 4.6 have them."""
    chosen = case.run.preference
    if case.run.task != "rlhf":
        return None
    kind, forms = chosen.rlhf_type, LOSS_TYPES[chosen.rlhf_type]
    filled: dict[str, Any] = {"loss_type": chosen.loss_type or (forms[0] if forms else None)}
    if chosen.beta is None and kind != "rm":
        filled["beta"] = DEFAULT_BETA.get(kind, 0.1)
    if chosen.cpo_alpha is None and kind in BELONGS["cpo_alpha"]:
        filled["cpo_alpha"] = 1.0 if kind == "cpo" else 0.0
    if "exo_pair" in (filled["loss_type"] or "").split() and not chosen.label_smoothing:
        filled["label_smoothing"] = 1e-3  # its authors' epsilon: the loss has the logarithm of it
    if filled["loss_type"] == "apo_zero_unpaired":
        filled["calculate_kl"] = False  # its z is 0
    return case.change("preference", **filled)


def the_reference_is_not_the_adapted_model(case: Case) -> Case | None:
    """Say what an adapter that training starts from is compared with."""
    kind, tuner = case.run.preference.rlhf_type, case.run.tuner
    if (
        case.run.task != "rlhf"
        or kind not in NEEDS_REFERENCE
        or not tuner.adapters
        or case.run.preference.ref_model
        or case.run.preference.mcore_ref_model
        or case.run.preference.ref_adapters
    ):
        return None
    return case.change(
        "tuner",
        f"adapters={tuner.adapters[0]}: the reference is the model without it. To compare with the adapted model, give the "
        "folder as --ref_adapters, too.",
    )
