"""Tiny models of the families without experts: name -> (model_type, what differs from tiny.SIZES)."""

from typing import Any

ORIGINAL = 16  # context before stretching: some documents of the parity test are longer, some shorter
YARN: dict[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": ORIGINAL,
}
SLIDING = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]

GEMMA4: dict[
    str, Any
] = {  # as the 31B model: full attention has larger heads, fewer groups, and keys for values
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "sliding_window": 8,
    "head_dim": 8,
    "global_head_dim": 16,
    "num_global_key_value_heads": 1,
    "attention_k_eq_v": True,
    "hidden_size_per_layer_input": 0,
    "final_logit_softcapping": 3.0,
    "tie_word_embeddings": True,
}


def _longrope(**others: Any) -> dict[str, Any]:
    """Return a config of phi3 whose four rotary frequencies have factors of their own."""
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.5,
        "short_factor": [1.0, 1.1, 1.3, 1.6],
        "long_factor": [1.0, 1.5, 2.5, 4.0],
    }
    return {"rope_parameters": rope, **others}


DENSE_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "apertus": ("apertus", {}),
    "arcee": ("arcee", {}),
    "arcee-bias": ("arcee", {"mlp_bias": True, "attention_bias": True}),
    "cohere": ("cohere", {"logit_scale": 0.25}),
    "cohere2": ("cohere2", {"logit_scale": 0.25, "sliding_window": 8, "layer_types": SLIDING}),
    "ernie4_5": ("ernie4_5", {"use_bias": True}),
    "exaone4": ("exaone4", {"sliding_window": 8, "layer_types": SLIDING}),
    "exaone4-full": ("exaone4", {"sliding_window": None, "layer_types": ["full_attention"] * 4}),
    "gemma": ("gemma", {"tie_word_embeddings": True}),
    "gemma2": (
        "gemma2",
        {
            "sliding_window": 8,
            "query_pre_attn_scalar": 24,
            "tie_word_embeddings": True,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
        },
    ),
    "gemma3_text": (
        "gemma3_text",
        {"sliding_window": 8, "layer_types": SLIDING, "query_pre_attn_scalar": 24},
    ),
    "gemma4_text-dense": ("gemma4_text", GEMMA4),
    "gemma4_text-small": (  # as E2B and E4B: late layers take keys of earlier ones, and all have inputs of their own
        "gemma4_text",
        {
            **GEMMA4,
            "num_kv_shared_layers": 2,
            "use_double_wide_mlp": True,
            "hidden_size_per_layer_input": 6,
            "vocab_size_per_layer_input": 131,
        },
    ),
    "glm4": ("glm4", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}),
    "granite": (
        "granite",
        {
            "embedding_multiplier": 12.0,
            "logits_scaling": 8.0,
            "residual_multiplier": 0.22,
            "attention_multiplier": 0.1,
        },
    ),
    "hunyuan_v1_dense": ("hunyuan_v1_dense", {}),
    "internlm3": ("internlm3", {"attention_bias": True, "mlp_bias": True}),
    "llama-attention-bias": ("llama", {"attention_bias": True}),
    "llama-mlp-bias": ("llama", {"mlp_bias": True}),
    "llama-yarn-rope": ("llama", {"rope_parameters": YARN}),
    "llama-dynamic-rope": (
        "llama",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}},
    ),
    "ministral3": (
        "ministral3",
        {"rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.7, "llama_4_scaling_beta": 0.4}},
    ),
    "olmo2": ("olmo2", {}),
    "olmo2-odd-heads": (
        "olmo2",
        {"num_attention_heads": 6, "num_key_value_heads": 3, "attention_bias": True},
    ),  # tp=2 pads to 8 and 4
    "olmo3": ("olmo3", {"sliding_window": 8, "layer_types": SLIDING}),
    "olmo3-yarn": (
        "olmo3",
        {"sliding_window": 8, "layer_types": SLIDING, "rope_scaling": YARN},
    ),
    "phi3": ("phi3", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}),
    "phi3-short": ("phi3", _longrope(original_max_position_embeddings=64)),
    "phi3-long": ("phi3", _longrope(original_max_position_embeddings=4)),
    "seed_oss": ("seed_oss", {"attention_bias": True, "attention_out_bias": False}),
    "seed_oss-out": (
        "seed_oss",
        {
            "attention_bias": False,
            "attention_out_bias": True,
            "attention_dropout": 0.0,
            "residual_dropout": 0.0,
        },
    ),
    "smollm3": ("smollm3", {"no_rope_layer_interval": 2}),
    "smollm3-window": (
        "smollm3",
        {"no_rope_layer_interval": 2, "use_sliding_window": True, "sliding_window": 8},
    ),
    "starcoder2": ("starcoder2", {"use_bias": True}),
    "starcoder2-unbiased": ("starcoder2", {"use_bias": False, "sliding_window": 8}),
}
