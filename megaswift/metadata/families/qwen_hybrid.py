"""Qwen3-Next and the text part of Qwen3.5: Gated DeltaNet layers between layers of gated attention."""

from dataclasses import replace

from megaswift.metadata.config_reader import ConfigReader
from megaswift.metadata.facts import (
    ATTENTION_BIAS,
    ATTENTION_TARGETS,
    DECODER,
    Fact,
    every_layer,
    group,
    key,
    layer_kinds,
    moe,
    sparse_step_layers,
    without,
)
from megaswift.metadata.family import Family
from megaswift.metadata.meta import AttentionMeta, LinearAttentionMeta, NormMeta, RopeMeta, RopeScaling
from megaswift.metadata.rope import PARTIAL_ROPE, rope_parameters, scaling_of

_MLP_TARGETS = ("gate_proj", "up_proj", "down_proj")


def _linear_layers(config: ConfigReader) -> tuple[bool, ...]:
    """All layers but every full_attention_interval-th, unless layer_types says otherwise."""
    interval = config.get("full_attention_interval")
    layers = range(config.get("num_hidden_layers"))
    default = ["linear_attention" if (layer + 1) % interval else "full_attention" for layer in layers]
    kinds = layer_kinds(config, default, "linear_attention", "full_attention")
    return tuple(kind == "linear_attention" for kind in kinds)


_LINEAR_ATTENTION: Fact = group(
    LinearAttentionMeta,
    layers=_linear_layers,
    conv_kernel=key("linear_conv_kernel_dim"),
    num_key_heads=key("linear_num_key_heads"),
    num_value_heads=key("linear_num_value_heads"),
    key_head_dim=key("linear_key_head_dim"),
    value_head_dim=key("linear_value_head_dim"),
)

QWEN3_NEXT = Family(
    name="qwen3_next",
    architecture="Qwen3NextForCausalLM",
    defaults={
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 48,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "head_dim": 256,
        "hidden_act": "silu",
        "max_position_embeddings": 32768,
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "rope_parameters": None,
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.25,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "full_attention_interval": 4,
        "layer_types": None,
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 32,
        "decoder_sparse_step": 1,
        "mlp_only_layers": None,
        "num_experts": 512,
        "num_experts_per_tok": 10,
        "moe_intermediate_size": 512,
        "shared_expert_intermediate_size": 512,
        "norm_topk_prob": True,
        "router_aux_loss_coef": 0.001,
    },
    facts={
        **DECODER,
        **PARTIAL_ROPE,
        **ATTENTION_BIAS,
        "head_dim": key("head_dim"),
        "norm": NormMeta(zero_centered=True),
        "qk_norm": "head",
        "attention": AttentionMeta(output_gate=True),
        "linear_attention": _LINEAR_ATTENTION,
        "num_mtp_layers": 1,  # of the released files; config.json does not tell
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
        "target_modules": (*ATTENTION_TARGETS, "in_proj_qkvz", "in_proj_ba", "out_proj", *_MLP_TARGETS),
    },
    supported=True,
)


def _scaling_beside_mrope(config: ConfigReader) -> RopeScaling | None:
    """As everywhere; the axes of multimodal positions fall together in text."""
    return scaling_of(rope_parameters(config), config, understood=("mrope_section", "mrope_interleaved"))


def _mrope_section(config: ConfigReader) -> tuple[int, ...]:
    """How many frequencies each multimodal axis has."""
    return tuple(rope_parameters(config).get("mrope_section", (11, 11, 10)))


QWEN3_5_TEXT = replace(
    QWEN3_NEXT,
    name="qwen3_5_text",
    architecture="Qwen3_5ForCausalLM",
    defaults={
        **without(
            QWEN3_NEXT.defaults,
            "decoder_sparse_step",
            "mlp_only_layers",
            "num_experts",
            "num_experts_per_tok",
            "moe_intermediate_size",
            "shared_expert_intermediate_size",
            "norm_topk_prob",
            "router_aux_loss_coef",
        ),
        "vocab_size": 248320,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 32,
        "num_key_value_heads": 4,
        "mtp_num_hidden_layers": 0,
    },
    facts={
        **without(QWEN3_NEXT.facts, "moe"),
        "rope_scaling": _scaling_beside_mrope,
        "rope": group(RopeMeta, mrope_section=_mrope_section),
        "num_mtp_layers": key("mtp_num_hidden_layers"),
        "target_modules": (
            *ATTENTION_TARGETS,
            *("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj"),
            *_MLP_TARGETS,
        ),
    },
    harmless_values={
        "attn_output_gate": (True,),
        "mamba_ssm_dtype": ("float32",),
        "mlp_only_layers": ([],),
        "mtp_use_dedicated_embeddings": (False,),
        "output_gate_type": ("swish",),  # of the DeltaNet layers
    },
)

QWEN3_5_MOE_TEXT = replace(
    QWEN3_5_TEXT,
    name="qwen3_5_moe_text",
    architecture="Qwen3_5MoeForCausalLM",
    defaults={
        **without(QWEN3_5_TEXT.defaults, "intermediate_size"),
        "hidden_size": 2048,
        "num_hidden_layers": 40,
        "num_key_value_heads": 2,
        "num_experts": 256,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 512,
        "shared_expert_intermediate_size": 512,
        "router_aux_loss_coef": 0.001,
    },
    facts={
        **QWEN3_5_TEXT.facts,
        "ffn_hidden_size": key("shared_expert_intermediate_size"),  # no layer is dense
        "moe": moe(
            num_experts=key("num_experts"),
            topk=key("num_experts_per_tok"),
            ffn_hidden_size=key("moe_intermediate_size"),
            layer_is_moe=every_layer,
            shared_ffn_hidden_size=key("shared_expert_intermediate_size"),
            shared_gate=True,
            aux_loss_coeff=key("router_aux_loss_coef"),
        ),
    },
    harmless_values={**QWEN3_5_TEXT.harmless_values, "norm_topk_prob": (True,)},
)
