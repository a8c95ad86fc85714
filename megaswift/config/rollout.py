"""Settings: learning from rewards of the model's own completions."""

from dataclasses import dataclass

from megaswift.config.field import setting


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """How completions are sampled, and for `megaswift rlhf --rlhf_type grpo` learnt from."""

    num_generations: int = setting(
        8, "completions of each prompt: a group; they share out --global_batch_size"
    )
    num_generations_eval: int | None = setting(
        None,
        "completions of each held-back prompt, whose rewards validations report; num_generations by default",
    )
    max_completion_length: int = setting(
        512, "tokens of a completion, of each turn", aliases=("max_new_tokens",)
    )
    temperature: float = setting(0.9, "the logits are divided by it when sampling, and in grpo's loss")
    top_p: float = setting(1.0, "sample from the likeliest tokens that have this probability together")
    top_k: int = setting(-1, "sample from so many of the likeliest tokens; -1: from all")
    repetition_penalty: float = setting(
        1.0,
        "logits of tokens that the prompt or the completion holds are divided by it, or multiplied where negative; 1: as they are",
    )
    multi_turn_scheduler: str | None = setting(
        None,
        "FILE.py:NAME, or an entry point of the group megaswift.multi_turn: a function that gets a conversation and a completion, "
        "and returns the next message or None; gym_scheduler: what --gym_env means by itself",
    )
    max_turns: int | None = setting(
        None, "completions of one conversation at most; default: as many as --max_length has room for"
    )
    advantage_estimator: str = setting(
        "grpo",
        "what a completion is compared with: the mean of its group (grpo, reinforce_plus_plus), or of the others in it (rloo); "
        "reinforce_plus_plus scales by the standard deviation of the differences, and takes the reference into the reward",
        choices=("grpo", "rloo", "reinforce_plus_plus"),
    )
    scale_rewards: str | None = setting(
        None,
        "divide advantages by the standard deviation of the rewards of a group, of the batch, or not; gdpo: of each reward function "
        "over a group before they are added up, then of their sum over the batch; default: group, batch for reinforce_plus_plus, "
        "none for rloo and for loss_type dr_grpo and real",
        choices=("group", "batch", "none", "gdpo"),
    )
    kl_in_reward: bool | None = setting(
        None,
        "subtract beta times the log-ratio to the reference from the rewards instead of adding a term to the loss; default: for "
        "reinforce_plus_plus",
    )
    importance_sampling_level: str = setting(
        "token",
        "ratio of each token, of the whole completion (GSPO), or of the completion with the gradient of the token (GSPO-token)",
        choices=("token", "sequence", "sequence_token"),
    )
    epsilon: float = setting(0.2, "ratios are clipped below 1 - epsilon")
    epsilon_high: float | None = setting(
        None,
        "and above 1 + epsilon_high; default: --epsilon. For loss_type cispo the greatest weight of a token; default: 5",
    )
    delta: float | None = setting(
        None,
        "and, for completions that are worse than others, above this: a second clip, above 1 + epsilon_high; default: none",
    )
    off_policy_sequence_mask_delta: float | None = setting(
        None,
        "completions that are worse than others carry no policy loss where the model has left them: where the mean over tokens of "
        "log pi_drawn/pi is above this; default: all do",
    )
    top_entropy_quantile: float = setting(
        1.0,
        "share of the tokens of a step whose policy loss counts: those that the model is least sure of; costs another forward pass",
    )
    log_entropy: bool = setting(
        False, "log the entropy of the model's predictions in completions; costs another forward pass"
    )
    router_replay_mode: str = setting(
        "disabled",
        "a token keeps its experts as long as its completion is learnt from, weighed by the router as it is now: those that the trainer "
        "chose when it computed the old log-probabilities (R2), or the engine that wrote the completion (R3)",
        choices=("disabled", "R2", "R3"),
    )
    overlong_filter: bool = setting(False, "completions that were cut off at their longest carry no loss")
    dynamic_sample: bool = setting(
        False, "replace groups whose completions are all worth the same by groups of other prompts (DAPO)"
    )
    max_resample_times: int = setting(3, "how often; groups that are left then stay")
    num_iterations: int = setting(1, "optimizer steps on each batch of completions")
    steps_per_generation: int | None = setting(
        None, "optimizer steps that share out the completions of one generation; default: 1"
    )
    generation_batch_size: int | None = setting(
        None,
        "completions of one generation; default, and otherwise the same: --global_batch_size x --steps_per_generation",
    )
    log_completions: bool = setting(
        False, "write every completion, with its rewards or scores, to completions.jsonl"
    )
