"""Settings: what completions are worth."""

from dataclasses import dataclass

from megaswift.config.field import setting

REWARDS = (
    "accuracy",
    "format",
    "cosine",
    "repetition",
    "soft_overlong",
    "code",
    "rules",
)  # rollout/rewards.py has them


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """How completions are rewarded (`megaswift rlhf --rlhf_type grpo`)."""

    reward_funcs: list[str] = setting(
        [],
        f"reward functions: {', '.join(REWARDS)}, functions of --external_plugins, or entry points of the group megaswift.rewards",
    )
    reward_model: list[str] = setting(
        [],
        "sequence-classification models with one label that score conversations, as rlhf_type rm exports them",
    )
    reward_weights: list[str] = setting(
        [],
        "a number for each of reward_funcs, then for each reward_model, then for environments; default: 1 each",
    )
    external_plugins: list[str] = setting([], "Python files with reward functions and environments")
    use_gym_env: bool | None = setting(
        None,
        "environments answer the model between its turns, and the sum of their rewards counts; default: where --gym_env is given",
    )
    gym_env: str | None = setting(
        None,
        "FILE.py:CLASS, a class of --external_plugins, or an entry point of the group megaswift.environments; the column env_config "
        "of a row may name another",
    )
    cosine_min_len_value_correct: float = setting(1.0, "cosine: reward of a right answer of no length")
    cosine_max_len_value_correct: float = setting(0.5, "cosine: of a right answer of --cosine_max_len tokens")
    cosine_min_len_value_wrong: float = setting(-0.5, "cosine: of a wrong answer of no length")
    cosine_max_len_value_wrong: float = setting(0.0, "cosine: of a wrong answer of --cosine_max_len tokens")
    cosine_max_len: int | None = setting(
        None, "cosine: tokens of the longest; default: --max_completion_length"
    )
    repetition_n_grams: int = setting(3, "words in the sequences that the repetition reward counts")
    repetition_max_penalty: float = setting(
        -1.0, "repetition reward of a completion of one repeated sequence"
    )
    soft_max_length: int | None = setting(
        None, "soft_overlong: tokens from which the reward is -1; default: --max_completion_length"
    )
    soft_cache_length: int | None = setting(
        None, "soft_overlong: tokens before that over which the reward falls; default: a fifth of them"
    )
    code_timeout: float = setting(
        5.0, "code: seconds of CPU that a test case may take, and twice as many by the clock"
    )
    code_memory_gib: float = setting(1.0, "code: address space that a test case may take")
    reward_rules: str | None = setting(
        None, "rules: a JSON file with the rules for rows that have no column `rules`"
    )
