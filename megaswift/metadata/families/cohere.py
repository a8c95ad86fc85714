"""Cohere Command R and Command R7B: layer norms, parallel branches, scaled logits."""

from dataclasses import replace

from megaswift.metadata.config_reader import ConfigReader
from megaswift.metadata.facts import (
    ATTENTION_BIAS,
    DECODER,
    derived_head_dim,
    group,
    key,
    windows_except_every,
    without,
)
from megaswift.metadata.family import Family
from megaswift.metadata.meta import Multipliers, NormMeta, RopeMeta
from megaswift.metadata.rope import ROPE

_windows = windows_except_every("sliding_window_pattern")


def _rope_layers(config: ConfigReader) -> tuple[bool, ...]:
    """Only sliding layers have rotary positions."""
    windows = _windows(config) or (None,) * config.get("num_hidden_layers")
    return tuple(window is not None for window in windows)


COHERE2 = Family(
    name="cohere2",
    architecture="Cohere2ForCausalLM",
    defaults={
        "vocab_size": 256000,
        "hidden_size": 8192,
        "intermediate_size": 22528,
        "num_hidden_layers": 40,
        "num_attention_heads": 64,
        "num_key_value_heads": None,
        "head_dim": None,
        "hidden_act": "silu",
        "max_position_embeddings": 8192,
        "initializer_range": 0.02,
        "layer_norm_eps": 1e-5,
        "logit_scale": 0.0625,
        "tie_word_embeddings": True,
        "rope_parameters": None,
        "rope_theta": 10000.0,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "sliding_window": 4096,
        "sliding_window_pattern": 4,
        "layer_types": None,
    },
    facts={
        **DECODER,
        **ROPE,
        **ATTENTION_BIAS,
        "head_dim": derived_head_dim,
        "norm_eps": key("layer_norm_eps"),
        "norm": NormMeta(kind="layernorm"),
        "parallel_residual": True,
        "rope": group(RopeMeta, interleaved=True, layers=_rope_layers),
        "multipliers": group(Multipliers, logits=key("logit_scale")),
        "sliding_window": _windows,
    },
    harmless_values={
        "position_embedding_type": ("rope_gptj",),
        "rotary_pct": (1.0,),
        "use_embedding_sharing": (True,),
        "use_gated_activation": (True,),
        "use_parallel_block": (True,),
        "use_parallel_embedding": (False,),
        "use_qk_norm": (False,),
    },
    harmless_keys=("order_of_interleaved_layers", "cache_implementation"),
    supported=True,
)

COHERE = replace(
    COHERE2,
    name="cohere",
    architecture="CohereForCausalLM",
    defaults={
        **without(COHERE2.defaults, "sliding_window", "sliding_window_pattern", "layer_types"),
        "rope_theta": 500000.0,
    },
    facts={
        **without(COHERE2.facts, "sliding_window"),
        "rope": RopeMeta(interleaved=True),
    },
    harmless_values={"use_qk_norm": (False,)},
    supported=True,
)
