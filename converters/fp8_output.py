"""Which weights a Hugging Face folder in block FP8 holds as FP8, and what its config.json says of it.

The linears of the layers whose sizes are multiples of the block are quantised, as transformers' own quantiser does (5.23,
finegrained_fp8.py, Fp8Quantize): it reads other sizes wrongly or not at all on a CPU. What one Megatron parameter fuses, and
what servers fuse, is quantised together or not at all.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from megaswift.converters.block_floats import BLOCK
from megaswift.converters.plan import file_tensors, linear_tensors
from megaswift.converters.tensor_files import TensorInfo
from megaswift.errors import ConfigError
from megaswift.metadata.meta import ModelMeta

QUANT_METHODS = ("fp8",)

# vLLM reads these two as one linear (deepseek_v2.py, fused_qkv_a_proj) and wants both quantised or none.
_FUSED_BY_SERVERS = ("self_attention.linear_q_down_proj.weight", "self_attention.linear_kv_down_proj.weight")


def fp8_tensors(meta: ModelMeta) -> frozenset[str]:
    """Return the names of the weights that are written in FP8; raises ConfigError for a model that has none worth it."""
    shapes = file_tensors(meta)
    linears = linear_tensors(meta)
    if any(len(shapes[name]) > 2 for names in linears.values() for name in names):
        raise ConfigError(
            f"quant_method=fp8 is not for {meta.model_type}, whose files pack all experts into one tensor. Leave it out."
        )
    groups: dict[str, list[str]] = {}
    for parameter, names in linears.items():
        kind, _, place = parameter.partition(" ")
        groups.setdefault(f"latents {place}" if kind in _FUSED_BY_SERVERS else parameter, []).extend(names)
    chosen = frozenset(
        name
        for names in groups.values()
        if all(size % BLOCK == 0 for one in names for size in shapes[one])
        for name in names
    )
    if not chosen:
        raise ConfigError(
            f"quant_method=fp8 is not for {meta.model_type} of this size: no linear is a multiple of {BLOCK} both ways. Leave it out."
        )
    return chosen


def with_scales(tensors: Iterable[TensorInfo], fp8: frozenset[str]) -> list[TensorInfo]:
    """Return the tensors of the output with those of `fp8` as FP8 values and their scales."""
    wanted = []
    for info in tensors:
        if info.name not in fp8:
            wanted.append(info)
            continue
        grid = tuple(-(-size // BLOCK) for size in info.shape)
        wanted += [
            TensorInfo(name=info.name, dtype="F8_E4M3", shape=info.shape, file=info.file, begin=0),
            TensorInfo(name=scale_name(info.name), dtype="F32", shape=grid, file=info.file, begin=0),
        ]
    return wanted


def scale_name(weight: str) -> str:
    """Return the name of a weight's scales."""
    return f"{weight}_scale_inv"


def quantisation_config(shapes: Mapping[str, tuple[int, ...]], fp8: frozenset[str]) -> dict[str, Any]:
    """Return config.json's quantization_config; matrices that stay as they are must be named there."""
    plain = {
        name.removesuffix(".weight")
        for name, shape in shapes.items()
        if len(shape) == 2 and name.endswith(".weight") and name not in fp8
    }
    plain |= {
        f"{name.partition('.experts.')[0]}.experts" for name in plain if ".experts." in name
    }  # transformers replaces all experts of a layer at once
    return {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [BLOCK, BLOCK],
        "modules_to_not_convert": sorted(plain),
    }
