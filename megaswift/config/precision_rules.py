"""Rules of 8-bit floats: settings that belong together, and sizes that the products take."""

from megaswift.config.case import Case
from megaswift.config.field import declared
from megaswift.config.run import RunConfig
from megaswift.errors import ConfigError

# What the sizes of a product divide by: 16 bytes of cuBLAS, and the blocks of MXFP8 (Transformer Engine 2.8, check_dim_for_fp8_exec
# in pytorch/utils.py; MXFP8Quantizer.make_empty).
SIZE_MULTIPLES = {"delayed": 16, "tensorwise": 16, "blockwise": 16, "mxfp8": 32}


def fp8_settings_belong_together(case: Case) -> None:
    """Settings of FP8 mean nothing without a format, and delayed scaling knows no layers without it."""
    precision = case.run.precision
    if precision.fp8_format == "none":
        for one in declared(RunConfig).values():
            changed = one.section == "precision" and getattr(precision, one.name) != one.default
            # ms-swift's own defaults of these two are no wish.
            if changed and one.name not in ("fp8_recipe", "fp8_amax_history_len"):
                raise ConfigError(
                    f"{one.flag} needs --fp8_format hybrid or e4m3. Leave it out, or set the format."
                )
        return
    if precision.first_last_layers_bf16 and precision.fp8_recipe == "delayed":
        raise ConfigError(
            "first_last_layers_bf16=true does not go with fp8_recipe=delayed: its scales are updated once for all layers "
            "(megatron-core 0.16.1, fp8_utils.py). Choose --fp8_recipe tensorwise or blockwise."
        )
    if case.run.model.torch_dtype == "float16":
        raise ConfigError(
            f"fp8_format={precision.fp8_format} does not go with torch_dtype=float16. Use --torch_dtype bfloat16."
        )
    for name, count, least in (
        ("fp8_amax_history_len", precision.fp8_amax_history_len, 1),
        ("num_layers_at_start_in_bf16", precision.num_layers_at_start_in_bf16, 0),
        ("num_layers_at_end_in_bf16", precision.num_layers_at_end_in_bf16, 0),
    ):
        if count < least:
            raise ConfigError(f"{name}={count} is too small. Give {least} or more.")


def fp8_weights_are_gathered_from_shards(case: Case) -> Case | None:
    """Weights in FP8 have their master copies in the distributed optimizer; a CPU keeps its weights as they are."""
    if not case.run.precision.fp8_param_gather:
        return None
    if case.platform == "cpu":
        note = "fp8_param_gather is off on the CPU: FP8 is emulated, and weights are kept in torch_dtype."
        return case.change("precision", note, fp8_param_gather=False)
    frozen = case.run.tuner.tuner_type == "lora" or case.run.freeze.chooses
    if not case.run.parallel.use_distributed_optimizer or frozen:
        raise ConfigError(
            "fp8_param_gather=true needs --use_distributed_optimizer true and --tuner_type full without frozen parameters: only "
            "sharded master weights are gathered."
        )
    return None


def fp8_products_have_whole_blocks(case: Case) -> Case | None:
    """Every dimension of a product in FP8 is a multiple of what the hardware takes; an emulation only tells."""
    precision = case.run.precision
    if precision.fp8_format in ("none", "auto"):
        return None
    unit = SIZE_MULTIPLES[precision.fp8_recipe]
    odd = {name: size for name, size in _product_sizes(case).items() if size % unit}
    if not odd:
        return None
    named = ", ".join(f"{name}={size}" for name, size in odd.items())
    problem = f"fp8_recipe={precision.fp8_recipe} takes sizes in multiples of {unit}, and {case.model_name} has {named}"
    if case.platform == "cpu":
        return case.change("precision", f"{problem}: it is emulated here, but no GPU would run it.")
    raise ConfigError(f"{problem} on a rank of tp={case.run.parallel.tp}. Choose another tp or recipe.")


def _product_sizes(case: Case) -> dict[str, int]:
    """Return what the linears of one tp rank have as inputs and outputs."""
    meta, tp = case.meta, case.run.parallel.tp
    sizes = {
        "hidden_size": meta.hidden_size,
        "num_heads x head_dim / tp": meta.num_heads * meta.head_dim // tp,
    }
    if meta.mla is not None:
        sizes["num_heads x head_dim / tp"] = meta.num_heads * meta.mla.v_head_dim // tp
        sizes |= {"kv_lora_rank": meta.mla.kv_rank, "q_lora_rank": meta.mla.q_rank or 0}
    if meta.moe is None or meta.moe.beside_dense or not all(meta.moe.layer_is_moe):
        sizes["ffn_hidden_size / tp"] = meta.ffn_hidden_size // tp
    if meta.moe is not None:
        sizes["the expert's ffn_hidden_size / etp"] = meta.moe.ffn_hidden_size // (case.run.parallel.etp or 1)
    return sizes
