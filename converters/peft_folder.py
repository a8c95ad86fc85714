"""A PEFT adapter as it lies on disk: its settings, and the pair A, B for each weight of the base model. No torch.

Names and shapes as peft 0.21 writes them: A is [r, in], B is [out, r], and a linear computes W x + scale * B A x.
Experts may be packed (ParamWrapper in tuners/lora/layer.py): A is then [E * r, in] with experts outermost, B is
[out, r * E] with experts innermost, and one pair serves gate and up together.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from megaswift.config.tuner import TunerConfig
from megaswift.converters.check import SCORE
from megaswift.converters.plan import Parameter, file_tensors, plan_chunk
from megaswift.converters.selection import output_twin, units_of
from megaswift.converters.tensor_files import Bits, TensorReader, read_header
from megaswift.errors import WeightsError, listing
from megaswift.metadata.meta import ModelMeta
from megaswift.parallel.layout import Layout, coordinates

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."  # of every tensor: the model inside a PeftModel

HEADS = (
    "score",
    "classifier",
)  # peft names both modules that a head of scores may be, whichever the model has

LINEARS = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")

# Settings whose other values change the mathematics in a way that a Megatron adapter does not have.
_REQUIRED: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "fan_in_fan_out": (False, None),
    "lora_bias": (False, None),
    "trainable_token_indices": (None, []),
    "layer_replication": (None, []),
    "alora_invocation_tokens": (None, []),
    "use_qalora": (False, None),
    "use_bdlora": (False, None),
}


@dataclass(frozen=True, kw_only=True)
class LowRank:
    """The adapter of one weight: raw elements of A [r, in] and B [out, r], their dtype, the scale of B A, and DoRA's norms [out, 1]."""

    a: Bits
    b: Bits
    dtype: str
    scale: float
    magnitude: Bits | None = None


@dataclass(frozen=True, kw_only=True)
class Whole:
    """A tensor that takes the place of the base model's: raw elements [rows, columns] and their dtype."""

    values: Bits
    dtype: str


@dataclass(frozen=True, kw_only=True)
class PeftAdapter:
    """Everything that a PEFT folder holds."""

    folder: Path
    rank: int
    alpha: int
    use_rslora: bool
    use_dora: bool
    dropout: float
    pairs: Mapping[str, LowRank]  # by tensor of the base model's file
    whole: Mapping[str, Whole]  # in place of the base model's, by tensor of its file

    def adopt(self, tuner: TunerConfig, meta: ModelMeta) -> TunerConfig:
        """Return the settings that make modules for this adapter: its rank, scale and targets."""
        targets = {
            name.rpartition(".")[2]
            for name, tensors in fused_modules(meta).items()
            if any(tensor in self.pairs for tensor in tensors)
        }
        return replace(
            tuner,
            lora_rank=self.rank,
            lora_alpha=self.alpha,
            use_rslora=self.use_rslora,
            use_dora=self.use_dora,
            target_modules=sorted(targets),
            target_regex=None,
            modules_to_save=sorted({*tuner.modules_to_save, *self._modules_to_save(meta)}),
        )

    def _modules_to_save(self, meta: ModelMeta) -> set[str]:
        """Return the modules that train whole: with a part of a Megatron parameter its other parts do."""
        whole = [unit for unit in units_of(meta) if set(unit.tensors) & set(self.whole)]
        return {tensor.rpartition(".")[0] for unit in whole for tensor in unit.tensors if tensor != SCORE}

    def ranks(self, meta: ModelMeta) -> dict[str, int]:
        """Return the rank of every Megatron module that needs another than `rank`, by global name.

        A module fuses several weights, which share one A. Where the file has different A's they are stacked, and B
        is block-diagonal: the module's rank is then as many times the rank as it fuses weights.
        """
        ranks = {}
        for name, tensors in fused_modules(meta).items():
            pairs = [self.pairs.get(tensor) for tensor in tensors]
            rank = max((len(pair.a) for pair in pairs if pair), default=self.rank)
            if not share_a(pairs):
                rank *= len(pairs)
            if rank != self.rank:
                ranks[name] = rank
        return ranks


def share_a(pairs: Sequence[LowRank | None]) -> bool:
    """Whether the adapters of one fused module have the same A, bit for bit; weights without one do not count."""
    present = [pair for pair in pairs if pair]
    return all(np.array_equal(present[0].a, other.a) for other in present[1:])


def fused_modules(meta: ModelMeta) -> dict[str, tuple[str, ...]]:
    """Return the file's tensors that each Megatron linear holds, by global name (as models/lora.py counts layers and experts)."""
    return {parameter.name.removesuffix(".weight"): parameter.tensors for parameter in _adaptable(meta)}


def _adaptable(meta: ModelMeta) -> Iterator[Parameter]:
    """Yield the weight of every linear that can have an adapter, as one rank would hold it."""
    for parameter in plan_chunk(meta, Layout(), coordinates(Layout(), 0)):
        *_, module, kind = parameter.name.split(".")
        packed = parameter.is_expert and meta.moe is not None and meta.moe.only_packed
        if kind == "weight" and module in LINEARS and not packed:
            yield parameter


def read_adapter(folder: Path | str, meta: ModelMeta) -> PeftAdapter:
    """Return the adapter in `folder`, its weights mapped, not read.

    Raises WeightsError where the folder is incomplete, or has settings or tensors that no Megatron module can hold.
    """
    folder = Path(folder)
    config = _read_config(folder)
    if not (folder / WEIGHTS_FILE).is_file():
        raise WeightsError(f"{folder} has no {WEIGHTS_FILE}. Save the adapter with safe_serialization=True.")
    reader = TensorReader(read_header(folder / WEIGHTS_FILE))
    pairs: dict[str, LowRank] = {}
    used: set[str] = set()
    for parameter in _adaptable(meta):
        for number, piece in enumerate(parameter.pieces):
            if found := _find_plain(reader, piece.tensor) or _find_packed(reader, parameter, number, meta):
                a, b, names, module = found
                dtype = reader.tensors[names[0]].dtype
                norms = magnitude_name(module)
                has_norms = norms in reader.tensors
                pairs[piece.tensor] = LowRank(
                    a=a,
                    b=b,
                    dtype=dtype,
                    scale=_scale(config, module, rank=len(a)),
                    magnitude=reader.matrix(norms) if has_norms else None,
                )
                used.update([*names, norms] if has_norms else names)
                rows = sum(one.rows.rows for one in parameter.pieces if one.tensor == piece.tensor)
                if a.shape[1] != piece.cols[1] or b.shape != (rows, len(a)):
                    raise WeightsError(
                        f"The adapter {folder} has A {list(a.shape)} and B {list(b.shape)} for {piece.tensor}, which is "
                        f"[{rows}, {piece.cols[1]}]. It belongs to another model."
                    )
    whole = _whole_tensors(reader, folder, meta)
    for module in config.get("modules_to_save") or ():
        if module not in HEADS and not any(tensor.rpartition(".")[0].endswith(module) for tensor in whole):
            raise WeightsError(
                f"modules_to_save={module} in {folder / CONFIG_FILE} has no tensor of the model's in {WEIGHTS_FILE}. Merge the adapter "
                "into the model with peft (merge_and_unload) and train from the merged model."
            )
    used.update(PREFIX + tensor for tensor in whole)
    if left := sorted(set(reader.tensors) - used):
        raise WeightsError(
            f"The adapter {folder} changes weights that no Megatron adapter can change: {listing(left)}. "
            "Merge it into the model with peft (merge_and_unload) and train from the merged model."
        )
    return PeftAdapter(
        folder=folder,
        rank=int(config["r"]),
        alpha=int(config["lora_alpha"]),
        use_rslora=bool(config.get("use_rslora")),
        use_dora=bool(config.get("use_dora")),
        dropout=float(config.get("lora_dropout") or 0.0),
        pairs=pairs,
        whole=whole,
    )


def _whole_tensors(reader: TensorReader, folder: Path, meta: ModelMeta) -> dict[str, Whole]:
    """Return the tensors that take the place of the base model's: modules_to_save, or a head of scores."""
    shapes, twin = file_tensors(meta), output_twin(meta)
    if twin is not None:
        shapes[twin[1]] = shapes[twin[0]]
    whole = {}
    for tensor, shape in shapes.items():
        if (name := PREFIX + tensor) not in reader.tensors:
            continue
        whole[tensor] = Whole(values=reader.matrix(name), dtype=reader.tensors[name].dtype)
        if reader.tensors[name].shape != shape:
            labels = "Give the num_labels that it was trained with."
            raise WeightsError(
                f"The adapter {folder} has {tensor} {list(reader.tensors[name].shape)}, and the model's is {list(shape)}. "
                f"{labels if tensor == SCORE else 'It belongs to another model.'}"
            )
    if twin is not None and set(twin) & whole.keys():
        if set(twin) - whole.keys() or not np.array_equal(whole[twin[0]].values, whole[twin[1]].values):
            raise WeightsError(
                f"The adapter {folder} trains {twin[0]} and {twin[1]} apart, and they are one matrix in the model. "
                "Merge it into the model with peft (merge_and_unload) and train from the merged model."
            )
    return whole


_Found = tuple[
    Bits, Bits, list[str], str
]  # A, B, the tensors that hold them, and the module as peft's patterns see it


def _find_plain(reader: TensorReader, tensor: str) -> _Found | None:
    module = tensor.removesuffix(".weight")
    names = factor_names(module)
    if not all(name in reader.tensors for name in names):
        return None
    a, b = (reader.matrix(name) for name in names)
    return a, b, names, module


def _find_packed(reader: TensorReader, parameter: Parameter, number: int, meta: ModelMeta) -> _Found | None:
    piece = parameter.pieces[number]
    match = re.fullmatch(r"(.*\.layers\.\d+\.).*\bexperts\.(\d+)\..*", piece.tensor)
    if match is None or meta.moe is None:
        return None
    experts, expert = f"{match[1]}mlp.experts", int(match[2])
    first_row = sum(earlier.rows.rows for earlier in parameter.pieces[:number])
    # One of the two parameters is wrapped inside the other; which one depends on the order of target_parameters.
    for module in (experts, f"{experts}.base_layer"):
        names = factor_names(module)
        if not all(name in reader.tensors for name in names):
            continue
        a, b = (reader.matrix(name) for name in names)
        if (b.shape[0], a.shape[1]) == (parameter.shape[0], piece.cols[1]):
            rank = len(a) // meta.moe.num_experts
            own_a = a[expert * rank : (expert + 1) * rank]
            own_b = b[first_row : first_row + piece.rows.rows, expert :: meta.moe.num_experts]
            packed = "gate_up_proj" if len(parameter.pieces) > 1 else "down_proj"
            return own_a, own_b, names, f"{experts}.{packed}"
    return None


def factor_names(module: str) -> list[str]:
    """Return the names of A and B of a module of the base model."""
    return [f"{PREFIX}{module}.lora_{letter}.weight" for letter in "AB"]


def magnitude_name(module: str) -> str:
    """Return the name of the norms of a module's rows, which DoRA trains."""
    return f"{PREFIX}{module}.lora_magnitude_vector"


def _scale(config: Mapping[str, Any], module: str, *, rank: int) -> float:
    alpha = config["lora_alpha"]
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):  # as peft's get_pattern_key does
            alpha = value
            break
    return float(alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_FILE
    try:
        config = dict(json.loads(path.read_text(encoding="utf-8")))
        rank, alpha = int(config["r"]), float(config["lora_alpha"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WeightsError(
            f"{path} is not the config of a LoRA adapter ({error!r}). Check the folder."
        ) from None
    if rank < 1 or alpha != int(alpha):
        raise WeightsError(f"r={rank} and lora_alpha={alpha} in {path} must be whole numbers, r at least 1.")
    for key, allowed in _REQUIRED.items():
        if key in config and config[key] not in allowed:
            raise WeightsError(
                f"{key}={config[key]!r} in {path} is not supported; only {key}={allowed[0]!r} is. "
                "Merge the adapter into the model with peft (merge_and_unload) and train from the merged model."
            )
    return config
