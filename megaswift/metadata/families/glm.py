"""GLM-4 dense, GLM-4.5 mixtures of experts, and GLM-4.7-Flash, which has the attention of DeepSeek-V3."""

from dataclasses import replace

from megaswift.metadata.config_reader import ConfigReader
from megaswift.metadata.facts import (
    ATTENTION_TARGETS,
    DECODER,
    if_grouped,
    key,
    layers_from,
    moe,
    product,
    without,
)
from megaswift.metadata.families.deepseek import DEEPSEEK_V3
from megaswift.metadata.family import Family
from megaswift.metadata.meta import NormMeta, RopeMeta
from megaswift.metadata.rope import PARTIAL_ROPE

GLM4 = Family(
    name="glm4",
    architecture="Glm4ForCausalLM",
    defaults={
        "vocab_size": 151552,
        "hidden_size": 4096,
        "intermediate_size": 13696,
        "num_hidden_layers": 40,
        "num_attention_heads": 32,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "hidden_act": "silu",
        "max_position_embeddings": 131072,
        "initializer_range": 0.02,
        "rms_norm_eps": 0.00000015625,
        "tie_word_embeddings": False,
        "rope_parameters": None,
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.5,
        "attention_bias": True,
        "attention_dropout": 0.0,
    },
    facts={
        **DECODER,
        **PARTIAL_ROPE,
        "rope": RopeMeta(interleaved=True),
        "norm": NormMeta(placement="sandwich"),
        "qkv_bias": key("attention_bias"),
        "target_modules": (*ATTENTION_TARGETS, "gate_up_proj", "down_proj"),
    },
    supported=True,
)


def _qk_norm(config: ConfigReader) -> str | None:
    """Queries and keys are normed where use_qk_norm says so."""
    return "head" if config.get("use_qk_norm") else None


GLM4_MOE = Family(
    name="glm4_moe",
    architecture="Glm4MoeForCausalLM",
    defaults={
        "vocab_size": 151552,
        "hidden_size": 4096,
        "intermediate_size": 10944,
        "num_hidden_layers": 46,
        "num_attention_heads": 96,
        "num_key_value_heads": 8,
        "head_dim": None,
        "hidden_act": "silu",
        "max_position_embeddings": 131072,
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "rope_parameters": None,
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.5,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "use_qk_norm": False,
        "first_k_dense_replace": 1,
        "n_routed_experts": 128,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 1408,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.0,
        "n_group": 1,
        "topk_group": 1,
        "num_nextn_predict_layers": 1,
    },
    aliases={"num_local_experts": "n_routed_experts", "num_mtp_layers": "num_nextn_predict_layers"},
    facts={
        **DECODER,
        **PARTIAL_ROPE,
        "qkv_bias": key("attention_bias"),
        "qk_norm": _qk_norm,
        "num_mtp_layers": key("num_nextn_predict_layers"),
        "moe": moe(
            num_experts=key("n_routed_experts"),
            topk=key("num_experts_per_tok"),
            ffn_hidden_size=key("moe_intermediate_size"),
            layer_is_moe=layers_from("first_k_dense_replace"),
            shared_ffn_hidden_size=product("n_shared_experts", "moe_intermediate_size"),
            norm_topk_prob=key("norm_topk_prob"),
            score_function="sigmoid",
            router_bias=True,
            num_groups=if_grouped("n_group"),
            topk_groups=if_grouped("topk_group"),
            routed_scaling_factor=key("routed_scaling_factor"),
        ),
    },
    harmless_values={"scoring_func": ("sigmoid",), "topk_method": ("noaux_tc",)},
    supported=True,
)


def _sparse_layers(config: ConfigReader) -> tuple[bool, ...]:
    """`mlp_layer_types` says dense or sparse for every layer; without it only the first layer is dense."""
    count = config.get("num_hidden_layers")
    kinds = config.get("mlp_layer_types", list) or ["dense", *["sparse"] * (count - 1)]
    if len(kinds) != count or not set(kinds) <= {"dense", "sparse"}:
        raise config.fail("mlp_layer_types", f"It needs {count} entries, each dense or sparse.")
    return tuple(kind == "sparse" for kind in kinds)


GLM4_MOE_LITE = replace(
    DEEPSEEK_V3,
    name="glm4_moe_lite",
    architecture="Glm4MoeLiteForCausalLM",
    defaults={
        **without(DEEPSEEK_V3.defaults, "first_k_dense_replace"),
        "vocab_size": 154880,
        "hidden_size": 2048,
        "intermediate_size": 10240,
        "num_hidden_layers": 47,
        "num_attention_heads": 20,
        "max_position_embeddings": 202752,
        "rms_norm_eps": 1e-5,
        "mlp_layer_types": None,
        "q_lora_rank": 768,
        "qk_nope_head_dim": 192,
        "v_head_dim": 256,
        "n_routed_experts": 64,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 1536,
        "routed_scaling_factor": 1.8,
        "n_group": 1,
        "topk_group": 1,
        "num_nextn_predict_layers": 0,
    },
    facts={
        **DEEPSEEK_V3.facts,
        "moe": moe(
            num_experts=key("n_routed_experts"),
            topk=key("num_experts_per_tok"),
            ffn_hidden_size=key("moe_intermediate_size"),
            layer_is_moe=_sparse_layers,
            shared_ffn_hidden_size=product("n_shared_experts", "moe_intermediate_size"),
            norm_topk_prob=key("norm_topk_prob"),
            score_function="sigmoid",
            router_bias=True,
            num_groups=if_grouped("n_group"),
            topk_groups=if_grouped("topk_group"),
            routed_scaling_factor=key("routed_scaling_factor"),
        ),
    },
    harmless_values={
        **DEEPSEEK_V3.harmless_values,
        "first_k_dense_replace": (1,),
        "partial_rotary_factor": (1.0,),
    },
)
