"""IBM Granite 3, dense and mixtures of experts: constant multipliers at four places."""

from dataclasses import replace
from typing import Any

from megaswift.metadata.config_reader import ConfigReader
from megaswift.metadata.facts import (
    ATTENTION_BIAS,
    ATTENTION_TARGETS,
    DECODER,
    every_layer,
    group,
    key,
    moe,
    without,
)
from megaswift.metadata.family import Family
from megaswift.metadata.meta import AttentionMeta, Multipliers
from megaswift.metadata.rope import ROPE


def _logits(config: ConfigReader) -> float:
    """Logits are divided by logits_scaling."""
    return float(1.0 / config.get("logits_scaling"))


_MULTIPLIERS: dict[str, Any] = {
    "attention": group(AttentionMeta, scale=key("attention_multiplier")),
    "multipliers": group(
        Multipliers,
        embedding=key("embedding_multiplier"),
        residual=key("residual_multiplier"),
        logits=_logits,
    ),
}

GRANITE = Family(
    name="granite",
    architecture="GraniteForCausalLM",
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
        "embedding_multiplier": 1.0,
        "residual_multiplier": 1.0,
        "attention_multiplier": 1.0,
        "logits_scaling": 1.0,
    },
    facts={**DECODER, **ROPE, **ATTENTION_BIAS, **_MULTIPLIERS, "mlp_bias": key("mlp_bias")},
    supported=True,
)

GRANITEMOE = replace(
    GRANITE,
    name="granitemoe",
    architecture="GraniteMoeForCausalLM",
    defaults={
        **without(GRANITE.defaults, "mlp_bias"),
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "router_aux_loss_coef": 0.001,
    },
    facts={
        **without(GRANITE.facts, "mlp_bias"),
        "moe": moe(
            num_experts=key("num_local_experts"),
            topk=key("num_experts_per_tok"),
            ffn_hidden_size=key("intermediate_size"),
            layer_is_moe=every_layer,
            aux_loss_coeff=key("router_aux_loss_coef"),
        ),
        "target_modules": (*ATTENTION_TARGETS, "input_linear", "output_linear"),
    },
    harmless_values={"mlp_bias": (False,)},
    supported=True,
)

GRANITEMOESHARED = replace(
    GRANITEMOE,
    name="granitemoeshared",
    architecture="GraniteMoeSharedForCausalLM",
    defaults={**GRANITEMOE.defaults, "shared_intermediate_size": 0},
    facts={
        **GRANITEMOE.facts,
        "moe": moe(
            num_experts=key("num_local_experts"),
            topk=key("num_experts_per_tok"),
            ffn_hidden_size=key("intermediate_size"),
            layer_is_moe=every_layer,
            shared_ffn_hidden_size=key("shared_intermediate_size"),
            aux_loss_coeff=key("router_aux_loss_coef"),
        ),
    },
)
