"""DeepSeek-V2, DeepSeek-V3 and Kimi-K2: multi-head latent attention, shared experts, group-limited routing."""

import math
from dataclasses import replace
from typing import Any

from megaswift.metadata.config_reader import ConfigReader
from megaswift.metadata.facts import (
    ATTENTION_BIAS,
    DECODER,
    Fact,
    group,
    if_grouped,
    key,
    key_or_none,
    layers_from,
    moe,
    product,
    required,
)
from megaswift.metadata.family import Family
from megaswift.metadata.meta import AttentionMeta, MLAMeta, RopeMeta
from megaswift.metadata.rope import ROPE, rope_parameters


def _head_dim(config: ConfigReader) -> int:
    """Size of a query and key head: its parts without and with rotary positions."""
    size: int = config.get("qk_nope_head_dim") + config.get("qk_rope_head_dim")
    return size


def _attention_scale(config: ConfigReader) -> float | None:
    """Yarn with mscale_all_dim sharpens the scores by the square of its magnitude."""
    parameters = rope_parameters(config)
    mscale, factor = parameters.get("mscale_all_dim"), parameters.get("factor") or 1.0
    if not mscale or factor <= 1.0:
        return None
    return float(_head_dim(config) ** -0.5 * (0.1 * mscale * math.log(factor) + 1.0) ** 2)


def _targets(config: ConfigReader) -> tuple[str, ...]:
    """Queries come through a latent of their own, or not."""
    queries = ("q_a_proj", "q_b_proj") if config.nullable("q_lora_rank", int) else ("q_proj",)
    rest = ("kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    return (*queries, *rest)


_LATENT_ATTENTION: dict[str, Any] = {
    "num_kv_heads": key("num_attention_heads"),
    "head_dim": _head_dim,
    "attention": group(AttentionMeta, scale=_attention_scale),
    "mla": group(
        MLAMeta,
        q_rank=key_or_none("q_lora_rank", int),
        kv_rank=key("kv_lora_rank"),
        nope_head_dim=key("qk_nope_head_dim"),
        rope_head_dim=key("qk_rope_head_dim"),
        v_head_dim=key("v_head_dim"),
    ),
    "target_modules": _targets,
}

# The class recomputes these from the sizes above, or never looks at them.
_HARMLESS = ("head_dim", "qk_head_dim", "num_key_value_heads", "ep_size", "seq_aux", "aux_loss_alpha")


def _groups_if_limited(name: str) -> Fact:
    """A routing group key, which counts only under topk_method=group_limited_greedy."""

    def read(config: ConfigReader) -> int | None:
        method = config.get("topk_method")
        if method not in ("greedy", "group_limited_greedy"):
            raise config.fail("topk_method", "Known methods: greedy, group_limited_greedy.")
        value: int | None = config.get(name, int)
        return value if method == "group_limited_greedy" else None

    return read


DEEPSEEK_V2 = Family(
    name="deepseek_v2",
    architecture="DeepseekV2ForCausalLM",
    defaults={
        "vocab_size": 102400,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
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
        "first_k_dense_replace": 0,
        "kv_lora_rank": 512,
        "q_lora_rank": 1536,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "num_experts_per_tok": None,
        "moe_intermediate_size": 1407,
        "routed_scaling_factor": 1.0,
        "topk_method": "greedy",
        "n_group": None,
        "topk_group": None,
    },
    aliases={"num_experts": "n_routed_experts"},
    facts={
        **DECODER,
        **ROPE,
        **ATTENTION_BIAS,
        **_LATENT_ATTENTION,
        "mlp_bias": key("mlp_bias"),
        "rope": RopeMeta(interleaved=True),
        "moe": moe(
            num_experts=key("n_routed_experts"),
            topk=required("num_experts_per_tok", int),
            ffn_hidden_size=key("moe_intermediate_size"),
            layer_is_moe=layers_from("first_k_dense_replace"),
            shared_ffn_hidden_size=product("n_shared_experts", "moe_intermediate_size"),
            norm_topk_prob=False,
            num_groups=_groups_if_limited("n_group"),
            topk_groups=_groups_if_limited("topk_group"),
            group_score="max",
            routed_scaling_factor=key("routed_scaling_factor"),
        ),
    },
    harmless_values={"scoring_func": ("softmax",), "moe_layer_freq": (1,), "norm_topk_prob": (False, None)},
    harmless_keys=_HARMLESS,
    supported=True,
)

DEEPSEEK_V3 = Family(
    name="deepseek_v3",
    architecture="DeepseekV3ForCausalLM",
    defaults={
        "vocab_size": 129280,
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "num_hidden_layers": 61,
        "num_attention_heads": 128,
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "rope_parameters": None,
        "rope_theta": 10000.0,
        "rope_interleave": True,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "first_k_dense_replace": 3,
        "kv_lora_rank": 512,
        "q_lora_rank": 1536,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 2048,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "n_group": 8,
        "topk_group": 4,
        "num_nextn_predict_layers": 1,
    },
    aliases={"num_local_experts": "n_routed_experts", "num_mtp_layers": "num_nextn_predict_layers"},
    facts={
        **DECODER,
        **ROPE,
        **ATTENTION_BIAS,
        **_LATENT_ATTENTION,
        "rope": group(RopeMeta, interleaved=key("rope_interleave")),
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
    harmless_values={"scoring_func": ("sigmoid",), "topk_method": ("noaux_tc",), "moe_layer_freq": (1,)},
    harmless_keys=_HARMLESS,
    supported=True,
)

# Moonshot names its own model type so that engines can tell it apart; the mathematics is DeepSeek-V3's.
KIMI_K2 = replace(DEEPSEEK_V3, name="kimi_k2", repeats="deepseek_v3")
