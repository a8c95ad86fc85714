"""Rules of rewards: what is named is there, and every reward has a weight."""

from importlib.metadata import entry_points
from math import ceil

from megaswift.config.case import Case
from megaswift.config.environment_rules import GYM_REWARD, has_environments
from megaswift.config.reference import is_taught
from megaswift.config.reward import REWARDS, RewardConfig
from megaswift.config.rollout_rules import generates
from megaswift.config.run import RunConfig
from megaswift.errors import ConfigError, nearest

REWARD_GROUP = "megaswift.rewards"  # of entry points
SOFT_PART = 5  # DAPO (arXiv 2503.14476, section 4.1): the last 4096 of 20480 tokens


def rewards_are_named(run: RunConfig) -> None:
    """There is something to learn from, and a weight for each."""
    if not generates(run):
        return
    chosen = run.reward
    if not reward_names(chosen) and not is_taught(run):
        raise ConfigError(
            f"reward_funcs is not set. Name reward functions: {', '.join(REWARDS)}, or functions of --external_plugins; or give "
            "a --reward_model, a --gym_env or a --teacher_model."
        )
    if len(set(chosen.reward_funcs)) < len(chosen.reward_funcs):
        raise ConfigError(f"reward_funcs={' '.join(chosen.reward_funcs)} names a function twice.")
    if not chosen.external_plugins:
        known = (*REWARDS, *entry_points(group=REWARD_GROUP).names)
        for name in chosen.reward_funcs:
            if name not in known:
                raise ConfigError(
                    f"reward_funcs={name} is neither built in nor an entry point of {REWARD_GROUP}.{nearest(name, known)} Functions "
                    "of your own need --external_plugins file.py."
                )
    reward_weights(chosen)


def rewards_are_compared(run: RunConfig) -> None:
    """What a completion is worth shows beside others of its group."""
    if generates(run) and run.rollout.num_generations == 1 and reward_names(run.reward):
        raise ConfigError("num_generations=1 leaves nothing to compare a reward with. Give 2 or more.")


def held_back_prompts_are_rewarded(run: RunConfig) -> None:
    """Held-back prompts are worth the rewards of their completions."""
    if not generates(run):
        return
    data, completions = run.data, run.rollout.num_generations_eval
    holds_back = bool(data.val_dataset) or data.split_dataset_ratio > 0
    if completions is not None and not holds_back:
        raise ConfigError(
            f"num_generations_eval={completions} is of held-back prompts. Give --val_dataset or --split_dataset_ratio, or leave it out."
        )
    if holds_back and not reward_names(run.reward):
        raise ConfigError(
            "Held-back prompts are for rewards, and this run has none: a teacher judges its completions. Leave --val_dataset and "
            "--split_dataset_ratio out."
        )


def reward_names(chosen: RewardConfig) -> list[str]:
    """Return what rewards are logged as: functions by their names, then reward models, then environments."""
    several = len(chosen.reward_model) > 1
    models = [
        f"reward_model_{number}" if several else "reward_model"
        for number, _ in enumerate(chosen.reward_model, 1)
    ]
    return [*chosen.reward_funcs, *models, *([GYM_REWARD] if has_environments(chosen) else [])]


def reward_weights(chosen: RewardConfig) -> list[float]:
    """Return the weight of each of reward_names(); raises ConfigError where there are more or fewer numbers."""
    names = reward_names(chosen)
    if not chosen.reward_weights:
        return [1.0] * len(names)
    if len(chosen.reward_weights) != len(names):
        raise ConfigError(
            f"reward_weights has {len(chosen.reward_weights)} numbers for {len(names)} rewards: {' '.join(names)}. Give one each."
        )
    try:
        return [float(word) for word in chosen.reward_weights]
    except ValueError:
        raise ConfigError(f"reward_weights={' '.join(chosen.reward_weights)} are not numbers.") from None


def reward_numbers_are_in_range(run: RunConfig) -> None:
    """What is counted is there, and a penalty is none."""
    chosen = run.reward
    for name, value in (
        ("repetition_n_grams", chosen.repetition_n_grams),
        ("soft_max_length", chosen.soft_max_length),
        ("soft_cache_length", chosen.soft_cache_length),
        ("cosine_max_len", chosen.cosine_max_len),
    ):
        if value is not None and value < 1:
            raise ConfigError(f"{name}={value} is too small. Give 1 or more.")
    for name, amount in (("code_timeout", chosen.code_timeout), ("code_memory_gib", chosen.code_memory_gib)):
        if amount <= 0:
            raise ConfigError(f"{name}={amount:g} is too small. Give more than 0.")
    if chosen.repetition_max_penalty > 0:
        raise ConfigError(
            f"repetition_max_penalty={chosen.repetition_max_penalty:g} is a reward. Give 0 or less."
        )


def reward_settings_have_defaults(case: Case) -> Case | None:
    """Lengths that rewards know are those of completions."""
    if not generates(case.run):
        return None
    chosen, longest = case.run.reward, case.run.rollout.max_completion_length
    soft = chosen.soft_max_length or longest
    return case.change(
        "reward",
        soft_max_length=soft,
        soft_cache_length=chosen.soft_cache_length or ceil(soft / SOFT_PART),
        cosine_max_len=chosen.cosine_max_len or longest,
    )
