"""Phi-3, and Phi-4, which has the same model type: fused projections, optional longrope."""

from megaswift.metadata.config_reader import ConfigReader
from megaswift.metadata.facts import DECODER, key, window_everywhere
from megaswift.metadata.family import Family
from megaswift.metadata.meta import RopeScaling
from megaswift.metadata.rope import PARTIAL_ROPE, rope_parameters, scaling_of


def _scaling(config: ConfigReader) -> RopeScaling | None:
    """Longrope under any of its names; original_max_position_embeddings beside the dictionary wins over inside."""
    parameters = dict(rope_parameters(config))
    kind = parameters.pop("type", None)
    kind = parameters.get("rope_type", kind or "default")
    parameters["rope_type"] = "longrope" if kind in ("su", "yarn") else kind
    if parameters["rope_type"] == "longrope":
        parameters["original_max_position_embeddings"] = config.get("original_max_position_embeddings")
        ratio = config.get("max_position_embeddings") / config.get("original_max_position_embeddings")
        parameters["factor"] = parameters.get("factor") or ratio
    return scaling_of(parameters, config)


PHI3 = Family(
    name="phi3",
    architecture="Phi3ForCausalLM",
    defaults={
        "vocab_size": 32064,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": None,
        "head_dim": None,
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "rope_parameters": None,
        "rope_theta": 10000.0,
        "partial_rotary_factor": 1.0,
        "sliding_window": None,
        "attention_dropout": 0.0,
        "resid_pdrop": 0.0,
    },
    facts={
        **DECODER,
        **PARTIAL_ROPE,
        "rope_scaling": _scaling,
        "sliding_window": window_everywhere,
        "residual_dropout": key("resid_pdrop"),
        "target_modules": ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"),
    },
    harmless_values={"attention_bias": (False,), "lm_head_bias": (False,), "mlp_bias": (False,)},
    harmless_keys=("full_attn_mod", "interpolate_factor"),  # Phi-4-mini's; the class does not look at them
    supported=True,
)
