"""ERNIE 4.5, dense and mixtures of experts."""

from dataclasses import replace

from megaswift.metadata.config_reader import ConfigReader
from megaswift.metadata.facts import DECODER, key, moe, product, without
from megaswift.metadata.family import Family
from megaswift.metadata.meta import RopeMeta
from megaswift.metadata.rope import ROPE

ERNIE4_5 = Family(
    name="ernie4_5",
    architecture="Ernie4_5ForCausalLM",
    defaults={
        "vocab_size": 103424,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 18,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "hidden_act": "silu",
        "max_position_embeddings": 131072,
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "rope_parameters": None,
        "rope_theta": 500000.0,
        "use_bias": False,
    },
    facts={
        **without(DECODER, "attention_dropout"),
        **ROPE,
        "rope": RopeMeta(interleaved=True),
        "qkv_bias": key("use_bias"),
        "attention_out_bias": key("use_bias"),
        "mlp_bias": key("use_bias"),
    },
    harmless_values={
        "attention_probs_dropout_prob": (0.0,),
        "compression_ratio": (1.0,),
        "hidden_dropout_prob": (0.0,),
    },
    supported=True,
)


def _expert_layers(config: ConfigReader) -> tuple[bool, ...]:
    """Every moe_layer_interval-th layer from moe_layer_start_index to moe_layer_end_index; -1 or null: the last."""
    first, interval = config.get("moe_layer_start_index"), config.get("moe_layer_interval")
    last = config.nullable("moe_layer_end_index", int)
    count = config.get("num_hidden_layers")
    last = count - 1 if last in (None, -1) else last
    return tuple(first <= layer <= last and (layer + 1) % interval == 0 for layer in range(count))


ERNIE4_5_MOE = replace(
    ERNIE4_5,
    name="ernie4_5_moe",
    architecture="Ernie4_5_MoeForCausalLM",
    defaults={
        **ERNIE4_5.defaults,
        "hidden_size": 2560,
        "intermediate_size": 12288,
        "num_hidden_layers": 28,
        "num_attention_heads": 20,
        "num_key_value_heads": 4,
        "head_dim": None,
        "moe_num_experts": 64,
        "moe_k": 6,
        "moe_intermediate_size": 1536,
        "moe_num_shared_experts": 2,
        "moe_layer_start_index": 1,
        "moe_layer_end_index": -1,
        "moe_layer_interval": 1,
        "router_aux_loss_coef": 0.001,
    },
    aliases={"num_experts": "moe_num_experts", "num_experts_per_tok": "moe_k"},
    facts={
        **ERNIE4_5.facts,
        "lm_head_bias": key("use_bias"),
        "moe": moe(
            num_experts=key("moe_num_experts"),
            topk=key("moe_k"),
            ffn_hidden_size=key("moe_intermediate_size"),
            layer_is_moe=_expert_layers,
            shared_ffn_hidden_size=product("moe_num_shared_experts", "moe_intermediate_size"),
            router_bias=True,
            aux_loss_coeff=key("router_aux_loss_coef"),
        ),
    },
    harmless_values={
        **ERNIE4_5.harmless_values,
        "moe_gate": ("topk", "top2_fused"),
        "moe_gate_act": (None, "softmax"),
        "moe_use_aux_free": (True,),
    },
    harmless_keys=("moe_norm_min", "moe_capacity"),  # the class divides by at least 1e-12 and drops no token
    supported=True,
)
