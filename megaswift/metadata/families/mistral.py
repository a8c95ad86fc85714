"""Mistral, Mixtral and Ministral 3."""

from dataclasses import replace

from megaswift.metadata.config_reader import ConfigReader
from megaswift.metadata.facts import (
    ATTENTION_TARGETS,
    DECODER,
    every_layer,
    group,
    key,
    moe,
    window_everywhere,
)
from megaswift.metadata.family import Family
from megaswift.metadata.meta import AttentionMeta, QueryScaling, RopeScaling
from megaswift.metadata.rope import ROPE, rope_parameters, scaling_of

MISTRAL = Family(
    name="mistral",
    architecture="MistralForCausalLM",
    defaults={
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": None,
        "hidden_act": "silu",
        "max_position_embeddings": 131072,
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "rope_parameters": None,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "attention_dropout": 0.0,
    },
    facts={**DECODER, **ROPE, "sliding_window": window_everywhere},
    supported=True,
)

MIXTRAL = replace(
    MISTRAL,
    name="mixtral",
    architecture="MixtralForCausalLM",
    defaults={
        **MISTRAL.defaults,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "num_experts_per_tok": 2,
        "num_local_experts": 8,
        "router_aux_loss_coef": 0.001,
    },
    aliases={"num_experts": "num_local_experts"},
    facts={
        **MISTRAL.facts,
        "moe": moe(
            num_experts=key("num_local_experts"),
            topk=key("num_experts_per_tok"),
            ffn_hidden_size=key("intermediate_size"),
            layer_is_moe=every_layer,
            aux_loss_coeff=key("router_aux_loss_coef"),
        ),
        "target_modules": (*ATTENTION_TARGETS, "w1", "w2", "w3"),
    },
)


def _ministral3_scaling(config: ConfigReader) -> RopeScaling | None:
    """Yarn, with two keys in its dictionary that are not about the frequencies."""
    parameters = rope_parameters(config)
    return scaling_of(parameters, config, understood=("llama_4_scaling_beta", "max_position_embeddings"))


def _ministral3_beta(config: ConfigReader) -> float:
    """How fast queries grow; transformers fails without the key, so it is asked for."""
    beta = rope_parameters(config).get("llama_4_scaling_beta")
    if beta is None:
        raise config.fail("rope_parameters", "Ministral 3 needs llama_4_scaling_beta in it.")
    return float(beta)


def _ministral3_length(config: ConfigReader) -> int:
    """Queries grow at multiples of the length before stretching."""
    length: int = rope_parameters(config).get("original_max_position_embeddings") or config.get(
        "max_position_embeddings"
    )
    return length


MINISTRAL3 = Family(
    name="ministral3",
    architecture="Ministral3ForCausalLM",
    defaults={
        **MISTRAL.defaults,
        "vocab_size": 131072,
        "num_hidden_layers": 34,
        "head_dim": 128,
        "max_position_embeddings": 262144,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1000000.0,
            "factor": 16.0,
            "original_max_position_embeddings": 16384,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.1,
        },
        "sliding_window": None,
    },
    facts={
        **MISTRAL.facts,
        "rope_scaling": _ministral3_scaling,
        "attention": group(
            AttentionMeta,
            query_scaling=group(
                QueryScaling,
                beta=_ministral3_beta,
                length=_ministral3_length,
                offset=0,
                only_without_rope=False,
            ),
        ),
    },
    supported=True,
)
