"""Llama, the many models with its config vocabulary (SmolLM2, Yi, ...), and its near relatives."""

from dataclasses import replace

from megaswift.metadata.config_reader import ConfigReader
from megaswift.metadata.facts import (
    ATTENTION_BIAS,
    DECODER,
    UNGATED_TARGETS,
    group,
    key,
    layer_kinds,
    rope_layers,
    windows_where_sliding,
    without,
)
from megaswift.metadata.family import Family
from megaswift.metadata.meta import RopeMeta
from megaswift.metadata.rope import ROPE

LLAMA = Family(
    name="llama",
    architecture="LlamaForCausalLM",
    defaults={
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": None,
        "head_dim": None,
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "rope_parameters": None,
        "rope_theta": 10000.0,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
    },
    facts={**DECODER, **ROPE, **ATTENTION_BIAS, "mlp_bias": key("mlp_bias")},
    supported=True,
)

ARCEE = replace(
    LLAMA,
    name="arcee",
    architecture="ArceeForCausalLM",
    defaults={
        **LLAMA.defaults,
        "hidden_size": 2560,
        "intermediate_size": 18432,
        "hidden_act": "relu2",
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
    },
    facts={**LLAMA.facts, "gated_mlp": False, "target_modules": UNGATED_TARGETS},
    supported=True,
)

APERTUS = replace(
    ARCEE,
    name="apertus",
    architecture="ApertusForCausalLM",
    defaults={
        **without(LLAMA.defaults, "mlp_bias"),
        "vocab_size": 131072,
        "intermediate_size": 14336,
        "hidden_act": "xielu",
        "max_position_embeddings": 65536,
        "rms_norm_eps": 1e-5,
        "rope_theta": 12000000.0,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 12000000.0,
            "factor": 8.0,
            "original_max_position_embeddings": 8192,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
        },
    },
    facts={**without(ARCEE.facts, "mlp_bias"), "qk_norm": "head"},
    harmless_values={"mlp_bias": (False,), "post_norm": (False,), "qk_norm": (True,), "qk_bias": (False,)},
    supported=True,
)

INTERNLM3 = replace(
    LLAMA,
    name="internlm3",
    architecture="InternLM3ForCausalLM",
    defaults={
        **LLAMA.defaults,
        "vocab_size": 128512,
        "intermediate_size": 10240,
        "num_hidden_layers": 48,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-5,
    },
    aliases={"qkv_bias": "attention_bias", "bias": "mlp_bias"},
    supported=True,
)

SEED_OSS = replace(
    LLAMA,
    name="seed_oss",
    architecture="SeedOssForCausalLM",
    defaults={
        **LLAMA.defaults,
        "vocab_size": 155136,
        "intermediate_size": 27648,
        "num_hidden_layers": 64,
        "num_attention_heads": 80,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 524288,
        "attention_bias": True,
        "attention_out_bias": False,
        "attention_dropout": 0.1,
        "residual_dropout": 0.1,
    },
    facts={
        **LLAMA.facts,
        "attention_out_bias": key("attention_out_bias"),
        "residual_dropout": key("residual_dropout"),
    },
    supported=True,
)


def _smollm3_windows(config: ConfigReader) -> tuple[int | None, ...]:
    """With use_sliding_window, layers without rotary positions slide, unless layer_types says otherwise."""
    window = config.get("sliding_window", int) if config.get("use_sliding_window") else None
    default = [
        "sliding_attention" if window and not turns else "full_attention" for turns in rope_layers(config)
    ]
    kinds = layer_kinds(config, default, "sliding_attention", "full_attention")
    return windows_where_sliding(config, kinds, window)


SMOLLM3 = replace(
    LLAMA,
    name="smollm3",
    architecture="SmolLM3ForCausalLM",
    defaults={
        **LLAMA.defaults,
        "vocab_size": 128256,
        "hidden_size": 2048,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": True,
        "rope_theta": 2000000.0,
        "use_sliding_window": False,
        "sliding_window": None,
        "no_rope_layers": None,
        "no_rope_layer_interval": 4,
        "layer_types": None,
    },
    facts={
        **LLAMA.facts,
        "rope": group(RopeMeta, layers=rope_layers),
        "sliding_window": _smollm3_windows,
    },
    harmless_keys=("max_window_layers",),
    supported=True,
)
