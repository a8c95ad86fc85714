"""MiniMax-M2: norms over all heads together, sigmoid routing with a bias, partial rotary positions."""

from megaswift.metadata.config_reader import ConfigReader
from megaswift.metadata.facts import ATTENTION_TARGETS, DECODER, every_layer, head_dim, key, moe
from megaswift.metadata.family import Family
from megaswift.metadata.rope import PARTIAL_ROPE, rope_parameters


def _rotary_fraction(config: ConfigReader) -> float:
    """The released files say how many dimensions turn in `rotary_dim`; the rope dictionary wins."""
    dims = config.get("rotary_dim", int)
    beside = config.nullable("partial_rotary_factor", float) or (dims / head_dim(config) if dims else 1.0)
    return float(rope_parameters(config).get("partial_rotary_factor") or beside)


MINIMAX_M2 = Family(
    name="minimax_m2",
    architecture="MiniMaxM2ForCausalLM",
    defaults={
        "vocab_size": 200064,
        "hidden_size": 3072,
        "intermediate_size": 1536,
        "num_hidden_layers": 62,
        "num_attention_heads": 48,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "hidden_act": "silu",
        "max_position_embeddings": 196608,
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "rope_parameters": None,
        "rope_theta": 5000000.0,
        "partial_rotary_factor": None,
        "rotary_dim": None,
        "attention_dropout": 0.0,
        "num_local_experts": 256,
        "num_experts_per_tok": 8,
        "router_aux_loss_coef": 0.001,
        "num_mtp_modules": 0,
    },
    aliases={"num_experts": "num_local_experts"},
    facts={
        **DECODER,
        **PARTIAL_ROPE,
        "rotary_fraction": _rotary_fraction,
        "qk_norm": "full",
        "num_mtp_layers": key("num_mtp_modules"),
        "moe": moe(
            num_experts=key("num_local_experts"),
            topk=key("num_experts_per_tok"),
            ffn_hidden_size=key("intermediate_size"),
            layer_is_moe=every_layer,
            score_function="sigmoid",
            router_bias=True,
            aux_loss_coeff=key("router_aux_loss_coef"),
        ),
        "target_modules": (*ATTENTION_TARGETS, "w1", "w2", "w3"),
    },
    harmless_values={
        "attention_bias": (False,),
        "mtp_transformer_layers": (1,),
        "qk_norm_type": ("per_layer",),
        "scoring_func": ("sigmoid",),
        "shared_intermediate_size": (0,),
        "use_qk_norm": (True,),
        "use_routing_bias": (True,),
    },
    harmless_keys=("attn_type_list", "max_model_len", "use_mtp"),
    supported=True,
)
