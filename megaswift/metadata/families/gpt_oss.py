"""gpt-oss: attention sinks, alternating windows, experts with biases and a clamped activation."""

from megaswift.metadata.facts import (
    ATTENTION_BIAS,
    ATTENTION_TARGETS,
    DECODER,
    every_layer,
    group,
    key,
    moe,
    windows_except_every,
)
from megaswift.metadata.family import Family
from megaswift.metadata.meta import AttentionMeta, ClampedSwiGLU
from megaswift.metadata.rope import ROPE

GPT_OSS = Family(
    name="gpt_oss",
    architecture="GptOssForCausalLM",
    defaults={
        "vocab_size": 201088,
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "num_hidden_layers": 36,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "hidden_act": "silu",
        "max_position_embeddings": 131072,
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "rope_parameters": {
            "rope_type": "yarn",
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 4096,
        },
        "rope_theta": 150000.0,
        "attention_bias": True,
        "attention_dropout": 0.0,
        "sliding_window": 128,
        "layer_types": None,
        "num_local_experts": 128,
        "num_experts_per_tok": 4,
        "router_aux_loss_coef": 0.001,
        "swiglu_alpha": 1.702,
        "swiglu_limit": 7.0,
    },
    aliases={"num_experts": "num_local_experts", "experts_per_token": "num_experts_per_tok"},
    facts={
        **DECODER,
        **ROPE,
        **ATTENTION_BIAS,
        "sliding_window": windows_except_every(2),
        "attention": AttentionMeta(sinks=True),
        "clamped_swiglu": group(ClampedSwiGLU, alpha=key("swiglu_alpha"), limit=key("swiglu_limit")),
        "moe": moe(
            num_experts=key("num_local_experts"),
            topk=key("num_experts_per_tok"),
            ffn_hidden_size=key("intermediate_size"),
            layer_is_moe=every_layer,
            router_linear_bias=True,
            expert_bias=True,
            aux_loss_coeff=key("router_aux_loss_coef"),
        ),
        "target_modules": (*ATTENTION_TARGETS, "gate_up_proj", "down_proj"),
    },
    harmless_keys=("initial_context_length",),  # repeats the rope dictionary's original length
    supported=True,
)
