"""Qwen2 and Qwen3, dense and mixtures of experts, and MiMo, which is a Qwen2 with multi-token prediction."""

from dataclasses import replace

from megaswift.metadata.config_reader import ConfigReader
from megaswift.metadata.facts import (
    ATTENTION_BIAS,
    DECODER,
    head_dim,
    key,
    layer_kinds,
    moe,
    sparse_step_layers,
    window_everywhere,
    windows_from,
    windows_where_sliding,
)
from megaswift.metadata.family import Family
from megaswift.metadata.rope import ROPE


def _window(config: ConfigReader) -> int | None:
    """The window of sliding layers, if use_sliding_window switches it on."""
    window = config.nullable("sliding_window", int)
    return window if config.get("use_sliding_window") else None


def _windows_every_other_below(config: ConfigReader) -> tuple[int | None, ...]:
    """Even layers below max_window_layers slide, unless layer_types says otherwise."""
    window, end = _window(config), config.get("max_window_layers")
    default = [
        "sliding_attention"
        if config.get("use_sliding_window") and layer % 2 == 0 and layer < end
        else "full_attention"
        for layer in range(config.get("num_hidden_layers"))
    ]
    kinds = layer_kinds(config, default, "sliding_attention", "full_attention")
    return windows_where_sliding(config, kinds, window)


def _windows_when_on(config: ConfigReader) -> tuple[int | None, ...]:
    """Every layer slides once use_sliding_window is on."""
    windows = window_everywhere(config)  # read either way: the key is known
    return windows if config.get("use_sliding_window") else ()


QWEN2 = Family(
    name="qwen2",
    architecture="Qwen2ForCausalLM",
    defaults={
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 22016,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "head_dim": None,
        "hidden_act": "silu",
        "max_position_embeddings": 32768,
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "rope_parameters": None,
        "rope_theta": 10000.0,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "max_window_layers": 28,
        "layer_types": None,
        "attention_dropout": 0.0,
    },
    facts={**DECODER, **ROPE, "qkv_bias": True, "sliding_window": windows_from("max_window_layers", _window)},
    harmless_values={"use_mrope": (False,)},
    supported=True,
)

QWEN3 = replace(
    QWEN2,
    name="qwen3",
    architecture="Qwen3ForCausalLM",
    defaults={**QWEN2.defaults, "head_dim": 128, "attention_bias": False},
    facts={**QWEN2.facts, **ATTENTION_BIAS, "head_dim": key("head_dim"), "qk_norm": "head"},
)

QWEN2_MOE = replace(
    QWEN2,
    name="qwen2_moe",
    architecture="Qwen2MoeForCausalLM",
    defaults={
        **QWEN2.defaults,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "qkv_bias": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": None,
        "num_experts": 60,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
        "norm_topk_prob": False,
        "router_aux_loss_coef": 0.001,
    },
    facts={
        **QWEN2.facts,
        "qkv_bias": key("qkv_bias"),
        "sliding_window": _windows_every_other_below,
        "moe": moe(
            num_experts=key("num_experts"),
            topk=key("num_experts_per_tok"),
            ffn_hidden_size=key("moe_intermediate_size"),
            layer_is_moe=sparse_step_layers,
            shared_ffn_hidden_size=key("shared_expert_intermediate_size"),
            shared_gate=True,
            norm_topk_prob=key("norm_topk_prob"),
            aux_loss_coeff=key("router_aux_loss_coef"),
        ),
    },
)

QWEN3_MOE = replace(
    QWEN3,
    name="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    defaults={
        **QWEN2.defaults,  # of which the class does not look at max_window_layers and layer_types
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 24,
        "num_key_value_heads": 4,
        "attention_bias": False,
        "decoder_sparse_step": 1,
        "mlp_only_layers": None,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "norm_topk_prob": False,
        "router_aux_loss_coef": 0.001,
    },
    aliases={"num_local_experts": "num_experts"},
    facts={
        **QWEN3.facts,
        "head_dim": head_dim,
        "sliding_window": _windows_when_on,
        "moe": moe(
            num_experts=key("num_experts"),
            topk=key("num_experts_per_tok"),
            ffn_hidden_size=key("moe_intermediate_size"),
            layer_is_moe=sparse_step_layers,
            norm_topk_prob=key("norm_topk_prob"),
            aux_loss_coeff=key("router_aux_loss_coef"),
        ),
    },
    harmless_values={
        **QWEN2.harmless_values,
        "qkv_bias": (False,),
        "shared_expert_intermediate_size": (0,),
        "use_qk_norm": (True,),
    },
)

MIMO = replace(  # not in transformers; its remote code is Qwen2 with layers for multi-token prediction
    QWEN2,
    name="mimo",
    architecture="MiMoForCausalLM",
    defaults={**QWEN2.defaults, "attention_bias": True, "num_nextn_predict_layers": 1},
    facts={
        **QWEN2.facts,
        "qkv_bias": key("attention_bias"),
        "num_mtp_layers": key("num_nextn_predict_layers"),
    },
    repeats="qwen2",
    supported=True,
)
