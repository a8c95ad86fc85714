"""The learning rate over the run: Megatron's scheduler, counted in optimizer steps."""

import math
from typing import Any

from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megaswift.config.optimizer import OptimizerConfig
from megaswift.errors import ConfigError


def build_schedule(optimizer: Any, config: OptimizerConfig, *, total_steps: int) -> OptimizerParamScheduler:
    """Return Megatron's scheduler for `optimizer` (a MegatronOptimizer); one step of it is one optimizer step.

    `config` is resolved: the learning rate is known. Raises ConfigError where the warm-up does not fit into the decay.
    """
    assert config.lr is not None, "lr is filled by config/rules.py"
    decay = config.lr_decay_iters or total_steps
    return OptimizerParamScheduler(
        optimizer,
        init_lr=config.lr_warmup_init,
        max_lr=config.lr,
        min_lr=config.min_lr,
        lr_warmup_steps=warmup_steps(config, decay_steps=decay),
        lr_decay_steps=decay,
        lr_decay_style=config.lr_decay_style,
        start_wd=config.weight_decay,
        end_wd=config.weight_decay,
        wd_incr_steps=decay,
        wd_incr_style="constant",
        wsd_decay_steps=config.lr_wsd_decay_iters,
        lr_wsd_decay_style=config.lr_wsd_decay_style,
    )


def warmup_steps(config: OptimizerConfig, *, decay_steps: int) -> int:
    """Return the steps of linear warm-up; raises ConfigError unless they are fewer than `decay_steps`."""
    steps = config.lr_warmup_iters
    if config.lr_warmup_fraction is not None:
        # Rounded up as transformers does (TrainingArguments.get_warmup_steps); a short run keeps one step without warm-up.
        steps = min(math.ceil(config.lr_warmup_fraction * decay_steps), decay_steps - 1)
    if steps >= decay_steps:
        raise ConfigError(
            f"lr_warmup_iters={steps} but the learning rate decays over {decay_steps} steps. "
            "The warm-up must be shorter: lower --lr_warmup_iters or train longer."
        )
    return steps
