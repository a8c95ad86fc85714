"""Gemma, Gemma 2, and the text parts of Gemma 3 and Gemma 4."""

from dataclasses import replace
from typing import Any

from megaswift.metadata.config_reader import ConfigReader
from megaswift.metadata.facts import (
    ATTENTION_BIAS,
    DECODER,
    activation,
    alternating,
    every_layer,
    group,
    key_or_none,
    layer_kinds,
    required,
    windows_except_every,
    windows_where_sliding,
    without,
)
from megaswift.metadata.family import Family
from megaswift.metadata.meta import (
    AttentionMeta,
    LayerInputs,
    LayerVariation,
    MoEMeta,
    Multipliers,
    NormMeta,
    RopeMeta,
)
from megaswift.metadata.rope import ROPE, global_scaling, global_theta, local_theta


def _embedding_multiplier(config: ConfigReader) -> float:
    """Embeddings are multiplied by the root of their width."""
    return float(config.get("hidden_size") ** 0.5)


def _query_scale(config: ConfigReader) -> float:
    """Scores are scaled as if heads had query_pre_attn_scalar entries."""
    return float(config.get("query_pre_attn_scalar") ** -0.5)


_CAUSAL: dict[str, tuple[Any, ...]] = {"use_bidirectional_attention": (None, False)}

GEMMA = Family(
    name="gemma",
    architecture="GemmaForCausalLM",
    defaults={
        "vocab_size": 256000,
        "hidden_size": 3072,
        "intermediate_size": 24576,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "head_dim": 256,
        "max_position_embeddings": 8192,
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "rope_parameters": None,
        "rope_theta": 10000.0,
        "attention_bias": False,
        "attention_dropout": 0.0,
    },
    facts={
        **DECODER,
        **ROPE,
        **ATTENTION_BIAS,
        "activation": "gelu_pytorch_tanh",  # the released files say gelu and mean this (transformers, GemmaConfig)
        "norm": NormMeta(zero_centered=True),
        "multipliers": group(Multipliers, embedding=_embedding_multiplier),
    },
    harmless_values={**_CAUSAL, "hidden_act": ("gelu", "gelu_pytorch_tanh")},
    harmless_keys=("hidden_activation",),
    supported=True,
)

GEMMA2 = replace(
    GEMMA,
    name="gemma2",
    architecture="Gemma2ForCausalLM",
    defaults={
        **GEMMA.defaults,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "layer_types": None,
        "final_logit_softcapping": 30.0,
        "attn_logit_softcapping": 50.0,
    },
    facts={
        **GEMMA.facts,
        "activation": activation("hidden_activation"),
        "norm": NormMeta(zero_centered=True, placement="sandwich"),
        "multipliers": group(
            Multipliers,
            embedding=_embedding_multiplier,
            logits_softcap=key_or_none("final_logit_softcapping", float),
        ),
        "attention": group(
            AttentionMeta, scale=_query_scale, softcap=key_or_none("attn_logit_softcapping", float)
        ),
        "sliding_window": windows_except_every(2),
    },
    harmless_values=_CAUSAL,
    harmless_keys=("hidden_act",),
    supported=True,
)

GEMMA3_TEXT = replace(
    GEMMA2,
    name="gemma3_text",
    architecture="Gemma3ForCausalLM",
    defaults={
        **without(GEMMA2.defaults, "attn_logit_softcapping"),
        "vocab_size": 262208,
        "max_position_embeddings": 131072,
        "rope_theta": 1000000.0,
        "rope_local_base_freq": 10000.0,
        "sliding_window_pattern": 6,
        "final_logit_softcapping": None,
    },
    aliases={"_sliding_window_pattern": "sliding_window_pattern"},
    facts={
        **GEMMA2.facts,
        "qk_norm": "head",
        "attention": group(AttentionMeta, scale=_query_scale),
        "rope_theta": global_theta,
        "rope_scaling": global_scaling,
        "rope": group(RopeMeta, local_theta=local_theta),
        "sliding_window": windows_except_every("sliding_window_pattern"),
    },
    harmless_values={**_CAUSAL, "attn_logit_softcapping": (None,)},
    supported=True,
)


def _gemma4_kinds(config: ConfigReader) -> list[str]:
    """Five sliding layers, then one with full attention; the last layer is always one."""
    default = alternating(config, 6, "sliding_attention", "full_attention")
    kinds = layer_kinds(config, default, "sliding_attention", "full_attention")
    return [*kinds[:-1], "full_attention"]


def _gemma4_windows(config: ConfigReader) -> tuple[int | None, ...]:
    """The window of the sliding layers."""
    return windows_where_sliding(config, _gemma4_kinds(config), config.get("sliding_window"))


def _gemma4_layers(config: ConfigReader) -> LayerVariation:
    """Layers with full attention have wider heads; the last layers reuse keys and values of earlier ones."""
    kinds = _gemma4_kinds(config)
    overrides = _gemma4_overrides(config, kinds)
    own = len(kinds) - config.get("num_kv_shared_layers")
    producer = {kind: layer for layer, kind in enumerate(kinds[:own])}
    wide = 2 if config.get("use_double_wide_mlp") else 1
    width: int = config.get("intermediate_size")
    missing = set(kinds[own:]) - set(producer)
    if missing:
        raise config.fail(
            "num_kv_shared_layers", f"No layer of kind {missing.pop()} has keys and values of its own."
        )
    return LayerVariation(
        head_dims=tuple(one.get("head_dim", config.get("head_dim")) for one in overrides),
        num_kv_heads=tuple(
            one.get("num_key_value_heads", config.get("num_key_value_heads")) for one in overrides
        ),
        ffn_hidden_sizes=tuple(width if layer < own else width * wide for layer in range(len(kinds))),
        value_is_key=tuple(config.get("attention_k_eq_v") and kind == "full_attention" for kind in kinds),
        kv_from_layer=tuple(None if layer < own else producer[kind] for layer, kind in enumerate(kinds)),
    )


def _gemma4_overrides(config: ConfigReader, kinds: list[str]) -> list[dict[str, int]]:
    """What differs in each layer: per_layer_config of newer files, the global_ keys of older ones."""
    given = config.get("per_layer_config", dict)
    if given is None:
        full = {"head_dim": config.get("global_head_dim")}
        heads = config.get("num_global_key_value_heads", int)
        if heads and config.get("attention_k_eq_v"):
            full["num_key_value_heads"] = heads
        return [full if kind == "full_attention" else {} for kind in kinds]
    by_layer = {int(layer): one for layer, one in given.items()}
    for name in {name for one in by_layer.values() for name in one} - {"head_dim", "num_key_value_heads"}:
        raise config.fail("per_layer_config", f"{name} cannot differ between layers here.")
    return [by_layer.get(layer, {}) for layer in range(len(kinds))]


def _gemma4_moe(config: ConfigReader) -> MoEMeta | None:
    """Experts beside every dense feed-forward part, where enable_moe_block says so."""
    if not config.get("enable_moe_block"):
        return None
    return MoEMeta(
        num_experts=required("num_experts", int)(config),
        topk=required("top_k_experts", int)(config),
        ffn_hidden_size=required("moe_intermediate_size", int)(config),
        layer_is_moe=every_layer(config),
        beside_dense=True,
        router_norm=True,
        expert_scale=True,
        only_packed=True,
    )


def _gemma4_inputs(config: ConfigReader) -> LayerInputs | None:
    """The second embedding; width 0 means none."""
    size, vocab_size = config.get("hidden_size_per_layer_input"), config.get("vocab_size_per_layer_input")
    return LayerInputs(vocab_size=vocab_size, hidden_size=size) if size else None


GEMMA4_TEXT = replace(
    GEMMA3_TEXT,
    name="gemma4_text",
    architecture="Gemma4ForCausalLM",
    defaults={
        **without(
            GEMMA3_TEXT.defaults, "query_pre_attn_scalar", "sliding_window_pattern", "rope_local_base_freq"
        ),
        "vocab_size": 262144,
        "num_hidden_layers": 30,
        "rope_theta": 10000.0,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            "full_attention": {
                "rope_type": "proportional",
                "partial_rotary_factor": 0.25,
                "rope_theta": 1000000.0,
            },
        },
        "sliding_window": 512,
        "hidden_size_per_layer_input": 256,
        "vocab_size_per_layer_input": 262144,
        "attention_k_eq_v": False,
        "num_kv_shared_layers": 0,
        "use_double_wide_mlp": False,
        "global_head_dim": 512,
        "num_global_key_value_heads": None,
        "per_layer_config": None,
        "enable_moe_block": False,
        "num_experts": None,
        "top_k_experts": None,
        "moe_intermediate_size": None,
    },
    aliases={},
    facts={
        **GEMMA3_TEXT.facts,
        "norm": NormMeta(placement="sandwich"),
        "attention": AttentionMeta(scale=1.0, value_norm=True),
        "sliding_window": _gemma4_windows,
        "layer_variation": _gemma4_layers,
        "layer_inputs": _gemma4_inputs,
        "layer_scalar": True,
        "moe": _gemma4_moe,
    },
    harmless_values={
        "use_bidirectional_attention": (None, "vision")
    },  # vision tokens only; text stays causal
    supported=True,
)
