"""OLMo 2, OLMo 3 and OLMoE."""

from dataclasses import replace

from megaswift.metadata.facts import (
    ATTENTION_BIAS,
    DECODER,
    derived_head_dim,
    every_layer,
    group,
    key,
    key_or_none,
    moe,
    windows_except_every,
)
from megaswift.metadata.family import Family
from megaswift.metadata.meta import AttentionMeta, NormMeta, RopeMeta
from megaswift.metadata.rope import ROPE, global_scaling, global_theta, local_theta

OLMO2 = Family(
    name="olmo2",
    architecture="Olmo2ForCausalLM",
    defaults={
        "vocab_size": 50304,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": None,
        "head_dim": None,
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "rope_parameters": None,
        "rope_theta": 10000.0,
        "attention_bias": False,
        "attention_dropout": 0.0,
    },
    facts={**DECODER, **ROPE, **ATTENTION_BIAS, "qk_norm": "full", "norm": NormMeta(placement="post")},
    supported=True,
)

OLMO3 = replace(
    OLMO2,
    name="olmo3",
    architecture="Olmo3ForCausalLM",
    defaults={**OLMO2.defaults, "rope_theta": 500000.0, "sliding_window": 4096, "layer_types": None},
    facts={
        **OLMO2.facts,
        "rope_theta": global_theta,
        "rope_scaling": global_scaling,
        "rope": group(RopeMeta, local_theta=local_theta),
        "sliding_window": windows_except_every(4),
    },
    supported=True,
)


OLMOE = Family(
    name="olmoe",
    architecture="OlmoeForCausalLM",
    defaults={
        **OLMO2.defaults,
        "hidden_size": 2048,
        "intermediate_size": 2048,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "max_position_embeddings": 4096,
        "clip_qkv": None,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "norm_topk_prob": False,
        "router_aux_loss_coef": 0.01,
    },
    aliases={"num_local_experts": "num_experts"},
    facts={
        **DECODER,
        **ROPE,
        **ATTENTION_BIAS,
        "head_dim": derived_head_dim,
        "qk_norm": "full",
        "attention": group(AttentionMeta, clip_qkv=key_or_none("clip_qkv", float)),
        "moe": moe(
            num_experts=key("num_experts"),
            topk=key("num_experts_per_tok"),
            ffn_hidden_size=key("intermediate_size"),
            layer_is_moe=every_layer,
            norm_topk_prob=key("norm_topk_prob"),
            aux_loss_coeff=key("router_aux_loss_coef"),
        ),
    },
    supported=True,
)
