"""Rules of the forms of GRPO's loss and of its advantages: which settings each of them reads, and what they are when not given."""

from typing import Any

from megaswift.config.case import Case
from megaswift.config.loss_forms import CLIPPED, LOSS_TYPES
from megaswift.config.policy import PolicyConfig
from megaswift.config.rollout import RolloutConfig
from megaswift.config.rollout_rules import generates
from megaswift.config.run import RunConfig
from megaswift.errors import ConfigError

FORMS = LOSS_TYPES["grpo"]
OF_TOKENS = tuple(form for form in FORMS if form != "real")
# setting -> the forms of the loss that read it
READERS: dict[str, tuple[str, ...]] = {
    "epsilon": CLIPPED,
    "epsilon_high": (*CLIPPED, "cispo"),
    "delta": CLIPPED,
    "importance_sampling_level": OF_TOKENS,
    "advantage_estimator": OF_TOKENS,
    "scale_rewards": OF_TOKENS,
    "kl_in_reward": OF_TOKENS,
    "top_entropy_quantile": OF_TOKENS,
    "off_policy_sequence_mask_delta": OF_TOKENS,
    "rollout_importance_sampling_mode": OF_TOKENS,
    "rollout_importance_sampling_threshold": OF_TOKENS,
    **{name: (name.partition("_")[0],) for name in vars(PolicyConfig()) if not name.startswith("tau_")},
    "tau_pos": ("sapo",),
    "tau_neg": ("sapo",),
}
GREATEST_WEIGHT = (
    5.0  # of cispo: what TRL 1.16 and ms-swift 4.6 recommend; Khatri et al. 2025, ScaleRL (arXiv 2510.13786)
)


def policy_settings_belong_to_the_loss(run: RunConfig) -> None:
    """A setting that the chosen form of the loss does not read is a mistake."""
    if not generates(run):
        return
    form, same = run.preference.loss_type or FORMS[0], _without_effect(run.rollout)
    for section in (run.rollout, run.policy, run.sampler):
        blank = vars(type(section)())
        for name, value in vars(section).items():
            readers = READERS.get(name, FORMS)
            if form in readers or value in (blank[name], same.get(name, blank[name])):
                continue
            others = (
                f"forms other than {form}" if readers == OF_TOKENS else f"loss_type {' or '.join(readers)}"
            )
            raise ConfigError(f"{name}={_text(value)} is for {others}, not loss_type={form}. Leave it out.")


def _without_effect(chosen: RolloutConfig) -> dict[str, Any]:
    """Return values that ask for what happens anyway."""
    return {
        "epsilon_high": chosen.epsilon,
        "scale_rewards": "none",
        "kl_in_reward": False,
        "rollout_importance_sampling_mode": "none",
    }


def _text(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value).lower()


def policy_numbers_are_in_range(run: RunConfig) -> None:
    """Temperatures are positive, and weights may be above 1."""
    chosen, greatest = run.policy, run.rollout.epsilon_high
    for name in ("tau_pos", "tau_neg", "real_tau", "fipo_decay_rate", "fipo_safety_threshold"):
        value = getattr(chosen, name)
        if value is not None and value <= 0:
            raise ConfigError(f"{name}={value:g} is too small. Give more than 0.")
    spread = chosen.fipo_clip_range or 0.0
    if spread < 0 or (spread >= 1 and not chosen.fipo_clip_high_only):
        raise ConfigError(
            f"fipo_clip_range={spread:g} is not from 0 to below 1, which it may pass with fipo_clip_high_only=true alone."
        )
    if generates(run) and run.preference.loss_type == "cispo" and greatest is not None and greatest <= 1:
        raise ConfigError(
            f"epsilon_high={greatest:g} is the greatest weight of a token for loss_type=cispo, and tokens of the model itself have "
            f"1. Give more than 1, such as {GREATEST_WEIGHT:g}."
        )


def advantages_have_one_scale(run: RunConfig) -> None:
    """Reward functions that are scaled one by one leave nothing to other estimators, and have no share of the divergence."""
    chosen = run.rollout
    if not generates(run) or chosen.scale_rewards != "gdpo":
        return
    if chosen.advantage_estimator != "grpo":
        raise ConfigError(
            f"scale_rewards=gdpo is an estimator of its own and advantage_estimator={chosen.advantage_estimator} another. Leave one "
            "of them out."
        )
    if chosen.kl_in_reward:
        raise ConfigError(
            "scale_rewards=gdpo scales reward functions, and kl_in_reward=true is none of them. Leave one of them out."
        )


def policy_settings_have_defaults(case: Case) -> Case | None:
    """Fill what depends on other settings; Dr. GRPO, RLOO and REAL do not scale rewards, REINFORCE++ does over the batch."""
    run, chosen = case.run, case.run.rollout
    if not generates(run):
        return None
    form, beta = run.preference.loss_type, run.preference.beta
    if chosen.kl_in_reward and not beta:
        raise ConfigError("kl_in_reward=true needs beta above 0. Leave one of them out.")
    is_plus_plus = chosen.advantage_estimator == "reinforce_plus_plus"
    is_unscaled = chosen.advantage_estimator == "rloo" or form in ("dr_grpo", "real")
    scale = "batch" if is_plus_plus else "none" if is_unscaled else "group"
    high = GREATEST_WEIGHT if form == "cispo" else chosen.epsilon
    filled: dict[str, Any] = {
        "epsilon_high": high if chosen.epsilon_high is None else chosen.epsilon_high,
        "scale_rewards": chosen.scale_rewards or scale,
        "kl_in_reward": is_plus_plus and bool(beta) if chosen.kl_in_reward is None else chosen.kl_in_reward,
    }
    case = case.change("rollout", **filled)
    if not run.sampler.use_vllm or run.sampler.rollout_importance_sampling_mode is not None:
        return case
    mode = "none" if form == "real" else "token_truncate"
    return case.change("sampler", rollout_importance_sampling_mode=mode)
