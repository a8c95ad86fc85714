"""Settings: matrix products in 8-bit floats."""

from dataclasses import dataclass

from megaswift.config.field import setting

# What the tokens of a rank are padded to: 16 bytes of cuBLAS, or the blocks that lie along them (Transformer Engine 2.8,
# is_quantizable of Float8BlockQuantizer and MXFP8Quantizer).
TOKEN_MULTIPLES = {"delayed": 16, "tensorwise": 16, "blockwise": 128, "mxfp8": 32}


@dataclass(frozen=True, kw_only=True)
class PrecisionConfig:
    """Which linears multiply in FP8, and how their tensors are scaled."""

    fp8_format: str = setting(
        "none",
        "8-bit types of the decoder's linears: e4m3 everywhere, or e5m2 for gradients (hybrid); auto: hybrid where the GPU "
        "has it and the matrices are large enough to gain. On a CPU FP8 is emulated",
        choices=("none", "hybrid", "e4m3", "auto"),
    )
    fp8_recipe: str = setting(
        "delayed",
        "how tensors are scaled: by the largest values of past steps (delayed), by their own (tensorwise), in blocks of "
        "128 (blockwise, Hopper) or of 32 (mxfp8, Blackwell)",
        choices=("delayed", "tensorwise", "blockwise", "mxfp8"),
    )
    fp8_param_gather: bool = setting(
        False, "keep weights in FP8 and gather them so; master weights stay in the optimizer"
    )
    fp8_amax_history_len: int = setting(1024, "with delayed: steps whose largest values are remembered")
    fp8_amax_compute_algo: str = setting(
        "max",
        "with delayed: scale by the largest of the history, or by the last",
        choices=("max", "most_recent"),
    )
    first_last_layers_bf16: bool = setting(False, "keep the first and the last layers out of FP8")
    num_layers_at_start_in_bf16: int = setting(1, "with first_last_layers_bf16: layers at the start")
    num_layers_at_end_in_bf16: int = setting(1, "with first_last_layers_bf16: layers at the end")


def token_multiple(precision: PrecisionConfig) -> int:
    """Return what the tokens of a rank must divide by for products in FP8."""
    return 1 if precision.fp8_format == "none" else TOKEN_MULTIPLES[precision.fp8_recipe]
