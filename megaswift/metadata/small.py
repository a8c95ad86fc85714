"""A config.json with the structure of a model and a thousandth of its size, for checks that run the model.

Kept: the kinds of layers in their order (the first layers of the model, until every kind has come), query heads a
key/value group, expert groups, shared experts, biases, tying, rotary style and stretching. Cut: layers, widths, experts,
vocabulary, and constants that act only beyond a size, so that they act here too.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from megaswift.metadata.catalogue import FAMILIES
from megaswift.metadata.meta import ModelMeta

VOCAB_SIZE = 131  # odd, and small enough that every row gets a gradient
WINDOW = 8  # tokens: documents of a check are shorter and longer
ORIGINAL_LENGTH = 16  # tokens before a stretching that depends on the length sets in
SPECIAL_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
# Not about the mathematics, or about weights that the small model does not have.
DROPPED = ("quantization_config", "_name_or_path", "dtype", "torch_dtype", "transformers_version")


@dataclass(frozen=True, kw_only=True)
class _Sizes:
    """The sizes of the small model."""

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    experts: int
    topk: int
    groups: int | None
    topk_groups: int | None


def small_config(config: Mapping[str, Any], meta: ModelMeta) -> dict[str, Any]:
    """Return a small config.json for the one that `meta` was read from."""
    family = FAMILIES[meta.family]
    has_head_dim = config.get("head_dim", family.defaults.get("head_dim")) is not None
    sizes = _sizes(meta, has_head_dim=has_head_dim)
    small = {key: value for key, value in config.items() if key not in DROPPED}
    for other, key in family.aliases.items():
        if other in small:
            small.setdefault(key, small.pop(other))
            small.pop(other, None)
    for key, shrink in _RULES.items():
        value = small.get(key, family.defaults.get(key))
        if value is not None and (key in small or key in family.defaults):
            small[key] = shrink(value, sizes, meta)
    if meta.mla is not None:
        small["num_key_value_heads"] = sizes.heads  # the module does not look at it, the class's default does not fit
    for key in ("rope_parameters", "rope_scaling"):
        if isinstance(small.get(key), dict):
            small[key] = _small_rope(small[key], sizes, meta)
    if _depends_on_length(meta):
        small |= _short_context(small, meta)
    return {**small, **SPECIAL_TOKENS}


def layer_kinds(meta: ModelMeta) -> list[tuple[Any, ...]]:
    """Return what tells one decoder layer from another, for every layer."""
    columns: list[tuple[Any, ...]] = [meta.sliding_window, meta.rope.layers, meta.attention.chunk]
    if meta.moe is not None:
        columns.append(meta.moe.layer_is_moe)
    if meta.linear_attention is not None:
        columns.append(meta.linear_attention.layers)
    if meta.layer_variation is not None:
        varied = meta.layer_variation
        columns += [varied.head_dims, varied.num_kv_heads, varied.ffn_hidden_sizes, varied.value_is_key]
        columns.append(tuple(layer is not None for layer in varied.kv_from_layer))
    return [tuple(column[layer] for column in columns if column) for layer in range(meta.num_layers)]


def _sizes(meta: ModelMeta, *, has_head_dim: bool) -> _Sizes:
    ratio = meta.num_heads // meta.num_kv_heads
    kv_heads = min(meta.num_kv_heads, 4 if ratio == 1 else 2)
    heads = kv_heads * ratio
    head_dim = 16 if heads <= 16 else 8
    own_width = 64 if heads * head_dim != 64 else 80
    is_square = meta.mla is None and (not has_head_dim or meta.hidden_size == meta.num_heads * meta.head_dim)
    experts, topk, groups, topk_groups = 1, 1, None, None
    if meta.moe is not None:
        experts = min(meta.moe.num_experts, 8)
        topk = min(meta.moe.topk, 3, experts)
        if meta.moe.num_groups and meta.moe.topk_groups:
            groups = min(meta.moe.num_groups, 4)
            topk_groups = max(1, meta.moe.topk_groups * groups // meta.moe.num_groups)
            experts = 4 * groups
            topk = min(4, topk_groups * max(1, meta.moe.topk // meta.moe.topk_groups))
    return _Sizes(
        layers=_depth(meta),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        hidden=heads * head_dim if is_square else own_width,
        experts=experts,
        topk=topk,
        groups=groups,
        topk_groups=topk_groups,
    )


def _depth(meta: ModelMeta) -> int:
    """Return how many first layers hold every kind of layer; two at least."""
    kinds = layer_kinds(meta)
    last_new = max((kinds.index(kind) for kind in set(kinds)), default=0)
    return min(max(2, last_new + 1), meta.num_layers)


def _width(usual: int) -> Callable[[Any, _Sizes, ModelMeta], Any]:
    """A width that is the hidden size where it is so in the model: square matrices stay square."""
    return lambda value, sizes, meta: sizes.hidden if value == meta.hidden_size else usual


def _fixed(size: Any) -> Callable[[Any, _Sizes, ModelMeta], Any]:
    return lambda value, sizes, meta: size


def _at_most(size: int) -> Callable[[Any, _Sizes, ModelMeta], Any]:
    return lambda value, sizes, meta: min(value, size)


def _size(name: str) -> Callable[[Any, _Sizes, ModelMeta], Any]:
    """A size of the small model; what switches a feature off (0, or 1 group) stays."""
    return lambda value, sizes, meta: value if getattr(sizes, name) is None else getattr(sizes, name)


def _first_entries(value: list[Any], sizes: _Sizes, meta: ModelMeta) -> list[Any]:
    return value[: sizes.layers]


def _first_indices(value: list[int], sizes: _Sizes, meta: ModelMeta) -> list[int]:
    return [layer for layer in value if layer < sizes.layers]


def _like_head(value: float, sizes: _Sizes, meta: ModelMeta) -> float:
    """A number in proportion to the size of a head."""
    return type(value)(value * sizes.head_dim / meta.head_dim)


def _head_dim(value: int, sizes: _Sizes, meta: ModelMeta) -> int:
    return sizes.head_dim if meta.mla is None else 8  # of latent attention: the part with rotary positions


# Key of config.json -> its small value, from (the model's value, the small sizes, the model's facts).
_RULES: dict[str, Callable[[Any, _Sizes, ModelMeta], Any]] = {
    "vocab_size": _fixed(VOCAB_SIZE),
    "vocab_size_per_layer_input": _fixed(VOCAB_SIZE),
    "num_hidden_layers": _size("layers"),
    "hidden_size": _size("hidden"),
    "intermediate_size": _width(96),
    "intermediate_size_mlp": _width(112),
    "num_attention_heads": _size("heads"),
    "num_key_value_heads": _size("kv_heads"),
    "head_dim": _head_dim,
    "rotary_dim": _like_head,
    "layer_types": _first_entries,
    "mlp_layer_types": _first_entries,
    "no_rope_layers": _first_entries,
    "mlp_only_layers": _first_indices,
    "moe_layers": _first_indices,
    "sliding_window": _at_most(WINDOW),
    "attention_chunk_size": _at_most(WINDOW),
    "floor_scale": _at_most(4),
    "query_pre_attn_scalar": _like_head,
    "attention_multiplier": lambda value, sizes, meta: value * (meta.head_dim / sizes.head_dim) ** 0.5,
    "attn_logit_softcapping": _fixed(2.0),  # of the size of the scores and logits of random weights
    "final_logit_softcapping": _fixed(3.0),
    "swiglu_limit": _fixed(0.5),
    "q_lora_rank": _fixed(24),
    "kv_lora_rank": _fixed(16),
    "qk_nope_head_dim": _fixed(16),
    "qk_rope_head_dim": _fixed(8),
    "qk_head_dim": _fixed(24),
    "v_head_dim": _fixed(12),
    "linear_num_key_heads": _fixed(2),
    "linear_num_value_heads": lambda value, sizes, meta: (
        2 * value // meta.linear_attention.num_key_heads if meta.linear_attention else value
    ),
    "linear_key_head_dim": _fixed(8),
    "linear_value_head_dim": _fixed(12),
    "num_experts": _size("experts"),
    "n_routed_experts": _size("experts"),
    "num_local_experts": _size("experts"),
    "moe_num_experts": _size("experts"),
    "num_experts_per_tok": _size("topk"),
    "moe_topk": _size("topk"),
    "moe_k": _size("topk"),
    "top_k_experts": _size("topk"),
    "n_group": _size("groups"),
    "topk_group": _size("topk_groups"),
    "moe_intermediate_size": _width(48),
    "shared_expert_intermediate_size": lambda value, sizes, meta: 80 if value else value,
    "shared_intermediate_size": lambda value, sizes, meta: 80 if value else value,
    "n_shared_experts": _at_most(2),
    "moe_num_shared_experts": _at_most(2),
    "global_head_dim": lambda value, sizes, meta: 2 * sizes.head_dim,
    "num_global_key_value_heads": _fixed(1),
    # As many first layers have keys of their own as in the model.
    "num_kv_shared_layers": lambda value, sizes, meta: max(0, sizes.layers - (meta.num_layers - value)),
    "hidden_size_per_layer_input": lambda value, sizes, meta: 6 if value else value,
}


def _small_rope(rope: dict[str, Any], sizes: _Sizes, meta: ModelMeta) -> dict[str, Any]:
    """Return rope parameters for heads of the small size; those of each kind of layer where there are several."""
    if any(isinstance(value, dict) for value in rope.values()):
        return {kind: _small_rope(dict(one), sizes, meta) for kind, one in rope.items()}
    pairs = int(sizes.head_dim * meta.rotary_fraction) // 2
    small = dict(rope)
    for key in ("short_factor", "long_factor"):
        if key in rope:
            step = max(1, len(rope[key]) // pairs)
            small[key] = rope[key][::step][:pairs]
    if "mrope_section" in rope:
        share = -(-pairs // 3)
        small["mrope_section"] = [share, min(share, pairs - share), max(0, pairs - 2 * share)]
    return small


def _depends_on_length(meta: ModelMeta) -> bool:
    """Whether positions beyond some length are treated otherwise than those before it."""
    kind = meta.rope_scaling.kind if meta.rope_scaling else None
    return kind in ("longrope", "dynamic") or meta.attention.query_scaling is not None


def _short_context(small: dict[str, Any], meta: ModelMeta) -> dict[str, Any]:
    """Return the keys that let the model's other treatment begin at ORIGINAL_LENGTH."""
    rope = meta.rope_scaling
    if rope is not None and rope.kind == "dynamic":
        return {"max_position_embeddings": ORIGINAL_LENGTH}
    original = rope.original_max_position if rope else None
    if original is None:
        return {}
    short: dict[str, Any] = {"max_position_embeddings": max(1, meta.max_length // original) * ORIGINAL_LENGTH}
    if (
        "original_max_position_embeddings" in small
        or "original_max_position_embeddings" in FAMILIES[meta.family].defaults
    ):
        short["original_max_position_embeddings"] = ORIGINAL_LENGTH
    for key in ("rope_parameters", "rope_scaling"):
        inside = small.get(key)
        if isinstance(inside, dict) and "original_max_position_embeddings" in inside:
            short[key] = {**inside, "original_max_position_embeddings": ORIGINAL_LENGTH}
    return short
