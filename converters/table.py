"""What a family's weights are called and how Megatron fuses and shards them: one row, one Megatron parameter.

A row reads in both directions. Its tensors are stacked along dim 0 in the order given; with `per` the order starts
again for each unit of that size, as Megatron's linear_qkv does for each kv group (attention.py, 0.16.1,
get_query_key_value_tensors). Without `per` it starts again on each rank, as linear_fc1 does (mlp.py: [gate; up]).
A file may hold the whole stack as one tensor: then one name stands beside several shapes. Or a tensor holds some parts of
it: then its name is repeated, once a part.

Sizes are spelled in letters, "HK" being the product of H and K. Where tp does not divide V, G or H, Megatron's
parameters are padded with zeros (parallel/layout.py); the file never is.
V vocabulary, D model, O scores, H heads, G kv groups, K head size, F ffn, M ffn of one expert, S ffn of the shared experts, E experts.
Of latent attention: A latent of q, C latent of k and v, L the same with the shared key part, U value head, W a head's k (without
rotary positions) and v.
Of Gated DeltaNet: N key heads, P key head size, X value heads, Y value head size, T length of the convolution; J rows of q,
k, v and z of one key head, I of its b and a.
Of inputs of layers: R rows of their embedding, B size of one, Q of those of all layers together.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from functools import cached_property

from megaswift.metadata.meta import ModelMeta
from megaswift.parallel.layout import padded_kv_heads, padded_vocab_size


class Place(Enum):
    """Which model chunks hold a parameter."""

    FIRST = "the first chunk of the first stage"
    LAST = "the last chunk of the last stage"
    LAYER = "every decoder layer"
    SOFTMAX = "decoder layers with softmax attention"
    KEYS = "decoder layers with a projection of keys"
    VALUES = "decoder layers with a projection of values"
    NO_VALUES = "decoder layers whose values are their keys before the norm"
    NO_KEYS = "decoder layers with the keys and values of an earlier layer"
    DELTA = "decoder layers with Gated DeltaNet"
    DENSE = "decoder layers with a dense feed-forward part"
    MOE = "decoder layers with experts"
    EXPERT = "each expert of those layers"


class Shard(Enum):
    """How a parameter is cut over tensor-parallel ranks (over etp inside an expert)."""

    NONE = "every rank has all of it"
    DIM0 = "rows, as a column-parallel linear"
    DIM1 = "columns, as a row-parallel linear"


@dataclass(
    frozen=True, eq=False
)  # positional: a table is read by its columns; a row is itself, not its values
class Row:
    """One Megatron parameter and the tensors of the file that it holds."""

    place: Place
    megatron: str  # below decoder.layers.{i}. for a layer; # is the local index of an expert
    file: str  # below the table's layer prefix for a layer; {a,b} stands for several tensors, # for an expert (no #: all of them)
    shapes: str  # of every tensor, in letters
    shard: Shard
    per: str = ""  # the stacking starts again for each unit of this size
    when: str = ""  # the fact of FACTS that must hold
    float32: bool = False  # in the file, whatever the dtype of the weights
    transposed: bool = False  # the file packs the experts' matrices transposed
    interleaved: bool = (
        False  # the parts of one tensor take turns row by row, instead of lying below each other
    )
    by_head: bool = False  # or head by head

    @cached_property
    def tensors(self) -> tuple[str, ...]:
        """The patterns of the file's tensors, in the order of stacking."""
        return tuple(dict.fromkeys(self._names))

    @property
    def _names(self) -> tuple[str, ...]:
        found = re.fullmatch(r"([^{]*)\{([^}]*)\}(.*)", self.file)
        if not found:
            return (self.file,)
        before, names, after = found.groups()
        return tuple(before + name + after for name in names.split(","))

    def holders(self, parts: int) -> tuple[int, ...]:
        """Return which of `tensors` holds each part of the stack."""
        names = self._names * parts if len(self._names) == 1 else self._names
        return tuple(self.tensors.index(name) for name in names)

    @cached_property
    def is_packed(self) -> bool:
        """Whether one tensor of the file holds this parameter of all experts, along a dim 0 of its own."""
        return self.place is Place.EXPERT and "#" not in self.file

    @cached_property
    def is_paddable(self) -> bool:
        """Whether some tp pads a size of it."""
        return bool(set(self.shapes) & PADDED_LETTERS)

    def part_shapes(self, sizes: Mapping[str, int]) -> tuple[tuple[int, ...], ...]:
        """Return the shape of each part of the stack."""
        shapes = [
            tuple(math.prod(sizes[letter] for letter in dim) for dim in one.split())
            for one in self.shapes.split(",")
        ]
        assert len(self._names) in (1, len(shapes)), (
            f"{self.file}: {len(shapes)} shapes for {len(self._names)} names"
        )
        return tuple(shapes)

    def tensor_shapes(self, sizes: Mapping[str, int]) -> tuple[tuple[int, ...], ...]:
        """Return the shape of each tensor in the file."""
        parts = self.part_shapes(sizes)
        holders = self.holders(len(parts))
        shapes = tuple(
            _stacked([shape for shape, holder in zip(parts, holders, strict=True) if holder == tensor])
            for tensor in range(len(self.tensors))
        )
        if self.transposed:
            shapes = tuple(shape[::-1] for shape in shapes)
        return tuple((sizes["E"], *shape) for shape in shapes) if self.is_packed else shapes


def _stacked(shapes: list[tuple[int, ...]]) -> tuple[int, ...]:
    return shapes[0] if len(shapes) == 1 else (sum(shape[0] for shape in shapes), *shapes[0][1:])


@dataclass(frozen=True, kw_only=True)
class Table:
    """The weights of one family."""

    rows: tuple[Row, ...]
    layer_prefix: str = "model.layers.#."
    mtp_prefix: str | None = (
        None  # of multi-token-prediction layers, where they are not the layers after the decoder's
    )
    # Buffers that old files carry and config.json determines.
    ignored: tuple[str, ...] = (r".*\.rotary_emb\.inv_freq",)


FACTS: dict[str, Callable[[ModelMeta], bool]] = {
    "": lambda meta: True,
    "qkv_bias": lambda meta: meta.qkv_bias,
    "attention_out_bias": lambda meta: meta.attention_out_bias,
    "mlp_bias": lambda meta: meta.mlp_bias,
    "qk_norm": lambda meta: meta.qk_norm == "head" and not meta.qk_norm_after_rope,
    "late_qk_norm": lambda meta: meta.qk_norm == "head" and meta.qk_norm_after_rope,
    "untied": lambda meta: not meta.tied_embeddings and meta.scores is None,
    "scores": lambda meta: bool(meta.scores),
    "latent_queries": lambda meta: meta.mla is not None and meta.mla.q_rank is not None,
    "direct_queries": lambda meta: meta.mla is not None and meta.mla.q_rank is None,
    "shared_experts": lambda meta: meta.moe is not None and meta.moe.shared_ffn_hidden_size > 0,
    "router_linear_bias": lambda meta: meta.moe is not None and meta.moe.router_linear_bias,
    "expert_bias": lambda meta: meta.moe is not None and meta.moe.expert_bias,
    "router_bias": lambda meta: meta.moe is not None and meta.moe.router_bias,
    "layer_inputs": lambda meta: meta.layer_inputs is not None,
    "shared_gate": lambda meta: meta.moe is not None and meta.moe.shared_gate,
}


PADDED_LETTERS = frozenset("VRHG")


@dataclass(frozen=True, kw_only=True, eq=False)
class Sizes:
    """What the letters stand for: in the file, and in a model whose vocabulary and heads are padded so that tp divides them.

    One is itself, not its values: layers of the same sizes share one.
    """

    real: Mapping[str, int]
    padded: Mapping[str, int]

    @classmethod
    def of(cls, meta: ModelMeta, *, tp: int) -> "Sizes":
        """Return the sizes of one model."""
        real = {
            "1": 1,
            "V": meta.vocab_size,
            "D": meta.hidden_size,
            "O": meta.scores or 0,
            "H": meta.num_heads,
            "G": meta.num_kv_heads,
            "K": meta.head_dim,
            "F": meta.ffn_hidden_size,
        }
        padded = {}
        if meta.layer_inputs:
            rows, size = meta.layer_inputs.vocab_size, meta.layer_inputs.hidden_size
            real |= {"R": rows, "B": size, "Q": meta.num_layers * size}
            padded["R"] = padded_vocab_size(rows, tp=tp)
        if meta.moe:
            real |= {
                "M": meta.moe.ffn_hidden_size,
                "S": meta.moe.shared_ffn_hidden_size,
                "E": meta.moe.num_experts,
            }
        if meta.mla:
            real |= {
                "A": meta.mla.q_rank or 0,
                "C": meta.mla.kv_rank,
                "L": meta.mla.kv_rank + meta.mla.rope_head_dim,
                "U": meta.mla.v_head_dim,
                "W": meta.mla.nope_head_dim + meta.mla.v_head_dim,
            }
        if meta.linear_attention:
            linear = meta.linear_attention
            share = linear.num_value_heads // linear.num_key_heads
            real |= {
                "N": linear.num_key_heads,
                "P": linear.key_head_dim,
                "X": linear.num_value_heads,
                "Y": linear.value_head_dim,
                "T": linear.conv_kernel,
                "J": 2 * linear.key_head_dim + 2 * share * linear.value_head_dim,
                "I": 2 * share,
            }
        groups = padded_kv_heads(meta.num_heads, meta.num_kv_heads, tp=tp)
        padded |= {
            "V": padded_vocab_size(meta.vocab_size, tp=tp),
            "G": groups,
            "H": groups * (meta.num_heads // meta.num_kv_heads),
        }
        return cls(real=real, padded={**real, **padded})

    @classmethod
    def of_layers(cls, meta: ModelMeta, *, tp: int) -> list["Sizes"]:
        """Return the sizes of every layer, and the same object for layers that are alike."""
        varied = meta.layer_variation
        if varied is None:
            return [cls.of(meta, tp=tp)] * meta.num_layers
        kinds = list(zip(varied.head_dims, varied.num_kv_heads, varied.ffn_hidden_sizes, strict=True))
        sizes = {kind: cls.of(meta.of_layer(kinds.index(kind)), tp=tp) for kind in set(kinds)}
        return [sizes[kind] for kind in kinds]
