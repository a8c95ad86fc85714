"""Rules of completions, of `megaswift rlhf --rlhf_type grpo` and gkd: which settings belong together, and their defaults."""

from importlib.metadata import entry_points

from megaswift.config.case import Case
from megaswift.config.environment_rules import has_environments
from megaswift.config.policy import PolicyConfig
from megaswift.config.reward import RewardConfig
from megaswift.config.rollout import RolloutConfig
from megaswift.config.run import RunConfig
from megaswift.errors import ConfigError, nearest

# What gkd reads too.
SAMPLING = ("max_completion_length", "temperature", "top_p", "top_k", "repetition_penalty", "log_completions")
# What answers to held-back rows read: nothing about them is drawn.
PREDICTING = ("max_completion_length", "repetition_penalty", "log_completions")
SCHEDULER_GROUP = "megaswift.multi_turn"  # of entry points


def generates(run: RunConfig) -> bool:
    """Whether the rows are prompts, and the task learns from rewards of the model's completions alone."""
    return run.task == "rlhf" and run.preference.rlhf_type == "grpo"


def distils_completions(run: RunConfig) -> bool:
    """Whether the task learns a teacher's distributions on completions, in some of the steps at least."""
    settings = run.preference
    return run.task == "rlhf" and settings.rlhf_type == "gkd" and (settings.lmbda > 0 or settings.seq_kd)


def distils_nothing_else(run: RunConfig) -> bool:
    """Whether the answers of the training rows are never read, as every step is on completions."""
    return distils_completions(run) and (run.preference.lmbda == 1 or run.preference.seq_kd)


def completions_are_for_grpo_and_gkd(run: RunConfig) -> None:
    """Settings of completions and rewards mean nothing to other tasks."""
    if generates(run):
        return
    sections, samples = (run.rollout, run.policy, run.reward), distils_completions(run)
    predicts = run.logging.predict_with_generate
    read = SAMPLING if samples else PREDICTING if predicts else ()
    blank = {**vars(RolloutConfig()), **vars(PolicyConfig()), **vars(RewardConfig())}
    for name, value in ((name, value) for section in sections for name, value in vars(section).items()):
        if value == blank[name] or name in read:
            continue
        text = " ".join(value) if isinstance(value, list) else value
        if predicts and name in SAMPLING:
            raise ConfigError(
                f"{name}={text} is for completions that are drawn, and predict_with_generate takes the likeliest tokens. Leave it out."
            )
        readers = "grpo, or gkd with --lmbda above 0" if name in SAMPLING else "grpo"
        besides = ", or --predict_with_generate true" if name in PREDICTING else ""
        raise ConfigError(
            f"{name}={text} is for `megaswift rlhf --rlhf_type {readers}`{besides}. Leave it out."
        )


def turns_have_a_scheduler(run: RunConfig) -> None:
    """Somebody answers the model between its turns."""
    asked, turns = run.rollout.multi_turn_scheduler, run.rollout.max_turns
    environments = has_environments(run.reward)
    if asked is None and not environments:
        if turns is not None:
            raise ConfigError(
                f"max_turns={turns} needs --multi_turn_scheduler or --gym_env, which answers the model. Leave it out."
            )
        return
    if not run.data.use_chat_template:
        raise ConfigError(
            f"{'gym_env' if environments else 'multi_turn_scheduler'} needs a chat template to write turns with. Leave "
            "--use_chat_template out."
        )
    if turns is not None and turns < 1:
        raise ConfigError(f"max_turns={turns} is too small. Give 1 or more.")
    known = entry_points(group=SCHEDULER_GROUP).names
    if not environments and asked is not None and ".py:" not in asked and asked not in known:
        raise ConfigError(
            f"multi_turn_scheduler={asked} is neither FILE.py:NAME nor an entry point of {SCHEDULER_GROUP}.{nearest(asked, known)}"
        )


def rollout_numbers_are_in_range(run: RunConfig) -> None:
    """Counts count something, and probabilities are probabilities."""
    chosen = run.rollout
    for name, value, least in (
        ("num_generations", chosen.num_generations, 1),
        ("num_generations_eval", chosen.num_generations_eval, 1),
        ("max_completion_length", chosen.max_completion_length, 1),
        ("num_iterations", chosen.num_iterations, 1),
        ("max_resample_times", chosen.max_resample_times, 1),
        ("steps_per_generation", chosen.steps_per_generation, 1),
    ):
        if value is not None and value < least:
            raise ConfigError(f"{name}={value} is too small. Give {least} or more.")
    if chosen.temperature <= 0:
        raise ConfigError(f"temperature={chosen.temperature:g} is too small. Give more than 0.")
    if not 0 < chosen.top_p <= 1:
        raise ConfigError(f"top_p={chosen.top_p:g} is not above 0 and up to 1.")
    if chosen.top_k < 1 and chosen.top_k not in (-1, 0):
        raise ConfigError(f"top_k={chosen.top_k} is not 1 or more, or -1 for all tokens.")
    masks = chosen.off_policy_sequence_mask_delta
    if masks is not None and masks <= 0:
        raise ConfigError(f"off_policy_sequence_mask_delta={masks:g} is too small. Give more than 0.")
    if not 0 < chosen.top_entropy_quantile <= 1:
        raise ConfigError(f"top_entropy_quantile={chosen.top_entropy_quantile:g} is not above 0 and up to 1.")
    if chosen.repetition_penalty <= 0:
        raise ConfigError(f"repetition_penalty={chosen.repetition_penalty:g} is too small. Give more than 0.")
    if not 0 < chosen.epsilon < 1:
        raise ConfigError(f"epsilon={chosen.epsilon:g} is not between 0 and 1.")
    if chosen.epsilon_high is not None and chosen.epsilon_high <= 0:
        raise ConfigError(f"epsilon_high={chosen.epsilon_high:g} is too small. Give more than 0.")
    high = chosen.epsilon if chosen.epsilon_high is None else chosen.epsilon_high
    if chosen.delta is not None and chosen.delta <= 1 + high:
        raise ConfigError(
            f"delta={chosen.delta:g} is not above 1 + epsilon_high, which is {1 + high:g}. Give more."
        )


def what_rollouts_do_not_reach(run: RunConfig) -> None:
    """Completions are rows of the step's own, not padded."""
    if not generates(run):
        return
    data = run.data
    for asked, what, instead in (
        (not data.padding_free, "padding_free=false", "Leave it out."),
        (
            data.truncation_strategy != "delete",
            f"truncation_strategy={data.truncation_strategy}",
            "Prompts that leave no room for a completion are reported and left out.",
        ),
    ):
        if asked:
            raise ConfigError(f"{what} is not built for rlhf_type=grpo. {instead}")


def what_distilled_completions_do_not_reach(run: RunConfig) -> None:
    """Prompts are whole, and end where the answer begins."""
    predicts = run.logging.predict_with_generate
    if (distils_completions(run) or predicts) and run.data.truncation_strategy == "right":
        otherwise = "leave predict_with_generate out" if predicts else "give --lmbda 0"
        raise ConfigError(
            f"truncation_strategy=right cuts prompts off where their completions begin. Choose delete or left, or {otherwise}."
        )


def replayed_experts_are_known(case: Case) -> None:
    """Routers choose among experts, and whoever chose them says which."""
    mode, balancing = case.run.rollout.router_replay_mode, case.run.moe.moe_router_load_balancing_type
    if mode == "disabled":
        return
    if case.meta.moe is None:
        raise ConfigError(
            f"router_replay_mode={mode} is set but {case.model_name} has no experts. Leave it out."
        )
    if balancing == "sinkhorn":
        raise ConfigError(
            f"router_replay_mode={mode} does not go with moe_router_load_balancing_type=sinkhorn, which chooses for all tokens "
            "together. Choose aux_loss, seq_aux_loss, global_aux_loss or none."
        )
    if mode == "R3" and case.meta.moe.scale_input and not case.run.sampler.use_vllm:
        raise ConfigError(
            f"router_replay_mode=R3 is not built for {case.model_name}, whose experts transformers does not tell. Choose R2."
        )


def groups_are_whole(case: Case) -> None:
    """A step learns from all completions of its prompts."""
    size, group = case.run.training.global_batch_size, case.run.rollout.num_generations
    if not generates(case.run) or size is None or size % group == 0:
        return
    raise ConfigError(
        f"global_batch_size={size} counts completions and is not a multiple of num_generations={group}. "
        f"Choose {max(1, size // group) * group}, or another number of generations."
    )


def completions_have_room(case: Case) -> None:
    """A sample is a prompt and its completion."""
    length, longest = case.run.rollout.max_completion_length, case.run.data.max_length
    predicts = case.run.logging.predict_with_generate
    completes = generates(case.run) or distils_completions(case.run) or predicts
    if completes and longest is not None and length >= longest:
        raise ConfigError(
            f"max_completion_length={length} leaves no room for a prompt in max_length={longest}, which counts both. Lower it."
        )


def generations_are_whole_steps(case: Case) -> Case | None:
    """A generation is shared out by a number of steps; the rule of ms-swift 4.6 (megatron_args.py, resolve_generation_batch_size)."""
    chosen, size = case.run.rollout, case.run.training.global_batch_size
    if not generates(case.run) or size is None:
        return None
    whole = chosen.generation_batch_size
    steps = chosen.steps_per_generation or (1 if whole is None else max(1, whole // size))
    if whole is not None and whole != steps * size:
        raise ConfigError(
            f"generation_batch_size={whole} is not global_batch_size={size} x steps_per_generation={steps}. Give {steps * size}, or "
            "only one of generation_batch_size and steps_per_generation."
        )
    return case.change("rollout", steps_per_generation=steps, generation_batch_size=steps * size)


def completions_may_be_of_another_policy(case: Case) -> None:
    """Who masks completions that the model has left uses them later, or has them from another engine."""
    delta, chosen = case.run.rollout.off_policy_sequence_mask_delta, case.run.rollout
    if delta is None or case.run.sampler.use_vllm or uses_of_a_generation(chosen) > 1:
        return
    raise ConfigError(
        f"off_policy_sequence_mask_delta={delta:g} masks nothing where every completion is used at once, by the model that wrote it. "
        "Leave it out, or use completions longer (--num_iterations, --steps_per_generation)."
    )


def uses_of_a_generation(chosen: RolloutConfig) -> int:
    """Return the optimizer steps between two generations."""
    return chosen.num_iterations * (chosen.steps_per_generation or 1)
