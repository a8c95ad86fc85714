"""The text part of Llama 4: chunked attention, layers without rotary positions, experts scaled at their input."""

from megaswift.metadata.config_reader import ConfigReader
from megaswift.metadata.facts import (
    ATTENTION_BIAS,
    DECODER,
    GATED_TARGETS,
    group,
    key,
    layer_kinds,
    moe,
    rope_layers,
)
from megaswift.metadata.family import Family
from megaswift.metadata.meta import AttentionMeta, QueryScaling, RopeMeta
from megaswift.metadata.rope import ROPE


def _chunks(config: ConfigReader) -> tuple[int | None, ...]:
    """Layers with rotary positions attend within chunks, unless layer_types says otherwise."""
    size = config.nullable("attention_chunk_size", int)
    default = ["chunked_attention" if turns else "full_attention" for turns in rope_layers(config)]
    kinds = layer_kinds(config, default, "chunked_attention", "full_attention")
    return tuple(size if kind == "chunked_attention" else None for kind in kinds)


def _expert_layers(config: ConfigReader) -> tuple[bool, ...]:
    """moe_layers lists them; else every interleave_moe_layer_step-th layer has experts."""
    given, step = config.get("moe_layers", list), config.get("interleave_moe_layer_step")
    layers = range(config.get("num_hidden_layers"))
    return tuple((layer + 1) % step == 0 if given is None else layer in given for layer in layers)


def _query_scaling(config: ConfigReader) -> QueryScaling | None:
    """Queries of layers without rotary positions grow with their position."""
    beta, length = config.get("attn_scale"), config.get("floor_scale")
    if not config.get("attn_temperature_tuning"):
        return None
    return QueryScaling(beta=beta, length=length, offset=1, only_without_rope=True)


def _qk_norm(config: ConfigReader) -> str | None:
    """Layers with rotary positions norm q and k to length sqrt(head_dim), where use_qk_norm says so."""
    return "l2" if config.get("use_qk_norm") else None


LLAMA4_TEXT = Family(
    name="llama4_text",
    architecture="Llama4ForCausalLM",
    defaults={
        "vocab_size": 202048,
        "hidden_size": 5120,
        "intermediate_size": 8192,
        "intermediate_size_mlp": 16384,
        "num_hidden_layers": 48,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "hidden_act": "silu",
        "max_position_embeddings": 131072,
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "rope_parameters": None,
        "rope_theta": 500000.0,
        "no_rope_layers": None,
        "no_rope_layer_interval": 4,
        "layer_types": None,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attention_chunk_size": 8192,
        "attn_temperature_tuning": True,
        "attn_scale": 0.1,
        "floor_scale": 8192,
        "use_qk_norm": True,
        "num_local_experts": 16,
        "num_experts_per_tok": 1,
        "moe_layers": None,
        "interleave_moe_layer_step": 1,
        "router_aux_loss_coef": 0.001,
    },
    facts={
        **DECODER,
        **ROPE,
        **ATTENTION_BIAS,
        "ffn_hidden_size": key("intermediate_size_mlp"),
        "rope": group(RopeMeta, interleaved=True, layers=rope_layers),
        "qk_norm": _qk_norm,
        "qk_norm_after_rope": True,
        "attention": group(AttentionMeta, chunk=_chunks, query_scaling=_query_scaling),
        "moe": moe(
            num_experts=key("num_local_experts"),
            topk=key("num_experts_per_tok"),
            ffn_hidden_size=key("intermediate_size"),
            layer_is_moe=_expert_layers,
            shared_ffn_hidden_size=key("intermediate_size"),
            norm_topk_prob=False,
            score_function="sigmoid",
            scale_input=True,
            aux_loss_coeff=key("router_aux_loss_coef"),
        ),
        "target_modules": (*GATED_TARGETS, "gate_up_proj"),
    },
    harmless_keys=("for_llm_compressor",),
    supported=True,
)
