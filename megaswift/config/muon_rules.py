"""Rules of Muon."""

from dataclasses import fields

from megaswift.config.case import Case
from megaswift.config.muon import MuonConfig
from megaswift.config.run import RunConfig
from megaswift.errors import ConfigError
from megaswift.parallel.layout import padded_kv_heads

QUINTIC_STEPS = 5  # each has coefficients of its own: training/muon.py


def muon_settings_belong_to_muon(run: RunConfig) -> None:
    """They say nothing to other optimizers, and numbers are in range."""
    chosen, none = run.muon, MuonConfig()
    if not run.optimizer.is_muon:
        for one in fields(chosen):
            if getattr(chosen, one.name) != getattr(none, one.name):
                raise ConfigError(
                    f"{one.name} needs --optimizer muon or dist_muon, not {run.optimizer.optimizer}. Leave it out, or choose one."
                )
    if not 0 <= chosen.muon_momentum < 1:
        raise ConfigError(
            f"muon_momentum={chosen.muon_momentum} is not a share. Give 0 or more and less than 1."
        )
    if chosen.muon_extra_scale_factor <= 0:
        raise ConfigError(
            f"muon_extra_scale_factor={chosen.muon_extra_scale_factor} must be above 0; 0.2 is AdamW's size of a step."
        )
    steps = chosen.muon_num_ns_steps
    if steps < 1 or (chosen.muon_coefficient_type == "quintic" and steps % QUINTIC_STEPS):
        raise ConfigError(
            f"muon_num_ns_steps={steps} does not go with muon_coefficient_type={chosen.muon_coefficient_type}. Give a multiple "
            f"of {QUINTIC_STEPS} to quintic, or 1 or more to simple."
        )


def muon_steps_whole_matrices(case: Case) -> Case | None:
    """The distributed optimizer holds flat pieces of matrices, and heads of zeros would change the size of an update."""
    run, meta, parallel = case.run, case.meta, case.run.parallel
    if not run.optimizer.is_muon:
        return None
    name, heads = run.optimizer.optimizer, meta.kv_head_counts
    if run.precision.fp8_param_gather:
        raise ConfigError(
            f"optimizer={name} does not go with fp8_param_gather=true, which gathers pieces. Leave one of them out."
        )
    if any(padded_kv_heads(meta.num_heads, one, tp=parallel.tp) != one for one in heads):
        raise ConfigError(
            f"optimizer={name} needs a tp that divides num_heads={meta.num_heads} and num_kv_heads={min(heads)} "
            f"({case.model_name}), or is a multiple of the latter; tp={parallel.tp} is not. Choose another tp."
        )
    if run.muon.muon_tp_mode == "blockwise" and run.muon.muon_split_qkv and parallel.tp > min(heads):
        raise ConfigError(
            f"muon_tp_mode=blockwise leaves a rank with a part of a key/value head, as tp={parallel.tp} is above num_kv_heads="
            f"{min(heads)} ({case.model_name}). Choose duplicated, or --muon_split_qkv false."
        )
    if parallel.use_distributed_optimizer:
        note = (
            "dist_muon: data-parallel ranks share out momenta of whole matrices (use_distributed_optimizer, which cuts them, is off)."
            if name == "dist_muon"
            else "muon: every data-parallel rank holds all state (use_distributed_optimizer is off); dist_muon shares out momenta."
        )
        return case.change("parallel", note, use_distributed_optimizer=False, overlap_param_gather=False)
    return None
