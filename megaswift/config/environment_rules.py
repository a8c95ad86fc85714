"""Rules of environments, which answer the model between its turns and say what they are worth."""

from importlib.metadata import entry_points

from megaswift.config.reward import RewardConfig
from megaswift.config.run import RunConfig
from megaswift.errors import ConfigError, nearest

ENVIRONMENT_GROUP = "megaswift.environments"  # of entry points
GYM_SCHEDULER = "gym_scheduler"  # ms-swift's name for the way environments are asked; there is no other here
GYM_REWARD = "gym_reward"  # what their rewards are logged as, ms-swift's name


def has_environments(chosen: RewardConfig) -> bool:
    """Whether environments answer the model."""
    return bool(chosen.use_gym_env) or chosen.gym_env is not None


def environments_are_named(run: RunConfig) -> None:
    """One side answers the model, and it can be found."""
    chosen, scheduler = run.reward, run.rollout.multi_turn_scheduler
    if not has_environments(chosen):
        if scheduler == GYM_SCHEDULER:
            raise ConfigError(f"multi_turn_scheduler={scheduler} asks environments. Give --gym_env as well.")
        return
    if chosen.use_gym_env is False:
        raise ConfigError(
            f"use_gym_env=false contradicts gym_env={chosen.gym_env}. Leave one of them out; an environment's reward counts nothing "
            "with the weight 0, the last of --reward_weights."
        )
    if scheduler not in (None, GYM_SCHEDULER):
        raise ConfigError(
            f"multi_turn_scheduler={scheduler} would answer the model beside an environment. Leave it or use_gym_env out."
        )
    if run.sampler.vllm_mode == "colocate" and run.vllm.vllm_tensor_parallel_size > 1:
        raise ConfigError(
            f"vllm_tensor_parallel_size={run.vllm.vllm_tensor_parallel_size}: every rank of such an engine would have environments of "
            "its own. Use --vllm_mode server, or engines of one rank."
        )
    known = entry_points(group=ENVIRONMENT_GROUP).names
    if chosen.external_plugins or (chosen.gym_env is None and known) or ".py:" in (chosen.gym_env or ""):
        return
    if chosen.gym_env is None:
        raise ConfigError(
            "use_gym_env=true names no environment. Give --gym_env, or --external_plugins for those that rows name."
        )
    if chosen.gym_env not in known:
        raise ConfigError(
            f"gym_env={chosen.gym_env} is neither FILE.py:CLASS nor an entry point of {ENVIRONMENT_GROUP}."
            f"{nearest(chosen.gym_env, known)} Environments of your own may be in --external_plugins, too."
        )
