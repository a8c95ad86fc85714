"""Rules between settings that say which parameters train."""

import re
from collections.abc import Collection
from dataclasses import fields

from megaswift.config.case import Case
from megaswift.config.freeze import FreezeConfig
from megaswift.config.reference import compares, needs_reference
from megaswift.config.run import RunConfig
from megaswift.config.tuner import TunerConfig
from megaswift.errors import ConfigError


def parts_of_the_model_train_in_full(run: RunConfig) -> None:
    """Freezing is for full training: with adapters all of the model is frozen."""
    chosen, none = run.freeze, FreezeConfig()
    if not 0 <= chosen.freeze_parameters_ratio <= 1:
        raise ConfigError(
            f"freeze_parameters_ratio={chosen.freeze_parameters_ratio} is not a share. Give 0 to 1; 1 freezes everything."
        )
    if run.tuner.tuner_type != "full":
        for one in fields(chosen):
            if getattr(chosen, one.name) != getattr(none, one.name):
                raise ConfigError(
                    f"{one.name} needs tuner_type=full, not {run.tuner.tuner_type}: adapters leave the whole model frozen."
                )
    for name in ("freeze_parameters_regex", "trainable_parameters_regex"):
        _is_expression(name, getattr(chosen, name))
    if (chosen.trainable_parameters or chosen.trainable_parameters_regex) and not (
        chosen.freeze_parameters or chosen.freeze_parameters_regex or chosen.freeze_parameters_ratio
    ):
        raise ConfigError(
            "trainable_parameters opens what is frozen, and nothing is. Add --freeze_parameters_ratio 1 to train these alone."
        )


def adapters_are_asked_for(run: RunConfig, given: Collection[str]) -> None:
    """Who describes adapters and names no tuner may expect ms-swift's default of `swift sft`; raises ConfigError."""
    if run.tuner.tuner_type != "full" or "tuner_type" in given:
        return
    for flag in ("lora_rank", "lora_alpha", "lora_dropout", "target_modules"):
        if flag in given:
            raise ConfigError(
                f"{flag} describes adapters, and this run would train in full. Add --tuner_type lora, or leave it out."
            )


def layers_are_drawn_in_full_training(run: RunConfig) -> None:
    """LISA chooses what trains, and rebuilds the optimizer: nothing else does."""
    layers, interval = run.lisa.lisa_activated_layers, run.lisa.lisa_step_interval
    if layers < 0 or interval < 1:
        raise ConfigError(
            f"lisa_activated_layers={layers} and lisa_step_interval={interval}: layers are 0 or more, steps 1 or more."
        )
    if not layers:
        return
    if run.tuner.tuner_type != "full":
        raise ConfigError(
            f"lisa_activated_layers={layers} needs tuner_type=full, not {run.tuner.tuner_type}: adapters leave the whole model frozen."
        )
    for name, asked in (
        ("freeze_parameters and trainable_parameters", run.freeze.chooses),
        ("use_galore", run.optimizer.use_galore),
        (f"optimizer={run.optimizer.optimizer}", run.optimizer.is_muon),
        ("optimizer_cpu_offload", run.optimizer.optimizer_cpu_offload),
        ("fp8_param_gather", run.precision.fp8_param_gather),
        ("offload_model and offload_optimizer", run.sampler.offload_model or run.sampler.offload_optimizer),
    ):
        if asked:
            raise ConfigError(
                f"lisa_activated_layers={layers} does not go with {name}. Leave one of them out."
            )


def as_many_layers_are_drawn_as_there_are(case: Case) -> Case | None:
    """Some of the model's layers train; float32 masters of the others do not exist."""
    layers, there = case.run.lisa.lisa_activated_layers, case.meta.num_layers
    if layers > there:
        raise ConfigError(
            f"lisa_activated_layers={layers} is above the {there} layers of {case.model_name}. Choose fewer; 2 is the paper's."
        )
    if not layers or case.run.model.torch_dtype == "float32":
        return None
    note = (
        f"lisa_activated_layers: {case.run.model.torch_dtype} weights of a layer have float32 masters while it trains; what an "
        "interval moved them by is rounded at its end (a longer --lisa_step_interval rounds less often)."
    )
    return case.change("lisa", note)


def adapters_need_lora(case: Case) -> None:
    """Adapter settings belong to LoRA training."""
    tuner = case.run.tuner
    if tuner.tuner_type == "lora" and not tuner.target_modules:
        raise ConfigError("target_modules is empty. Name modules, or all-linear.")
    _is_expression("target_regex", tuner.target_regex)
    if tuner.target_regex and tuner.target_modules != ["all-linear"]:
        raise ConfigError(
            f"target_regex={tuner.target_regex} and target_modules={' '.join(tuner.target_modules)} both name modules. Give one of them."
        )
    if tuner.target_regex and tuner.adapters:
        raise ConfigError(
            "target_regex does not go with --adapters, whose folder says which modules it adapts. Leave one of them out."
        )
    for name in (
        "adapters",
        "merge_lora",
        "lorap_lr_ratio",
        "use_dora",
        "quant_bits",
        "starts_from_weights",
        "starts_from_gradients",
        "target_regex",
        "modules_to_save",
    ):
        if tuner.tuner_type != "lora" and getattr(tuner, name):
            flag = "init_weights" if name.startswith("starts_from") else name
            raise ConfigError(f"{flag} needs tuner_type=lora, not {tuner.tuner_type}.")
    hint = " Did you mean lora-ga?" if tuner.init_weights == "lora_ga" else ""
    if tuner.init_weights not in ("true", "gaussian", "lora-ga") and not tuner.starts_from_weights:
        raise ConfigError(
            f"init_weights={tuner.init_weights} is not built. Choose true, gaussian, loftq, lora-ga, olora, pissa or "
            f"pissa_niter_N with N iterations, such as pissa_niter_16.{hint}"
        )
    if tuner.init_weights == "loftq" and not tuner.quant_bits:
        raise ConfigError(
            "init_weights=loftq starts from what quantising loses, and nothing is quantised. Add --quant_method bnb --quant_bits 4."
        )
    has_reference = needs_reference(case.run) or case.run.preference.precompute_ref_log_probs
    if tuner.init_weights == "loftq" and compares(case.run) and not has_reference:
        raise ConfigError(
            "init_weights=loftq lets training start near the whole weights, and without adapters the model is the quantised one: no "
            "reference for what is trained. Give --ref_model or --precompute_ref_log_probs true, or choose another start."
        )
    if (tuner.starts_from_weights or tuner.starts_from_gradients) and tuner.adapters:
        raise ConfigError(
            f"init_weights={tuner.init_weights} starts from the model alone, and --adapters from a folder. Leave one of them out."
        )
    if (
        tuner.starts_from_gradients
        and case.run.task == "rlhf"
        and case.run.preference.rlhf_type in ("gkd", "grpo")
    ):
        raise ConfigError(
            f"init_weights=lora-ga starts from the loss of the first rows, and rlhf_type={case.run.preference.rlhf_type} learns from "
            "what models say of them later. Choose another start."
        )
    if tuner.lora_ga_stable_gamma <= 0:
        raise ConfigError(
            f"lora_ga_stable_gamma={tuner.lora_ga_stable_gamma} must be above 0; the paper takes 16 and more."
        )
    for one in ("lora_ga_direction", "lora_ga_scale", "lora_ga_stable_gamma"):
        if not tuner.starts_from_gradients and getattr(tuner, one) != getattr(TunerConfig(), one):
            raise ConfigError(f"{one} is for init_weights=lora-ga, not {tuner.init_weights}.")
    if tuner.lorap_lr_ratio is not None and tuner.lorap_lr_ratio <= 0:
        raise ConfigError(
            f"lorap_lr_ratio={tuner.lorap_lr_ratio} must be above 0; LoRA+ proposes 16 for most models."
        )
    if (tuner.quant_bits is None) != (tuner.quant_method is None):
        raise ConfigError(
            "quant_method and quant_bits belong together. Give --quant_method bnb --quant_bits 4."
        )
    if tuner.quant_bits not in (None, 4):
        raise ConfigError(f"quant_bits={tuner.quant_bits} is not built. Give 4.")
    if tuner.quant_bits and case.run.precision.fp8_format != "none":
        raise ConfigError(
            "quant_bits=4 leaves no weights for FP8 products. Leave one of quant_bits and fp8_format out."
        )
    if len(tuner.adapters) > 1:
        raise ConfigError(
            f"adapters={' '.join(tuner.adapters)}: training starts from one adapter. Give one folder."
        )


def _is_expression(name: str, value: str | None) -> None:
    """Raise ConfigError where the value of a flag is not a regular expression."""
    try:
        re.compile(value or "")
    except re.error as error:
        raise ConfigError(f"{name}={value} is not a regular expression: {error}.") from None
