"""Tiny random models of every family, saved by transformers itself."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from megaswift.parity.reference import save_random
from tests.harness.tiny_dense import DENSE_MODELS, GEMMA4

SIZES: dict[str, Any] = {
    "vocab_size": 131,  # odd: every tp > 1 needs vocabulary padding
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
DEEPSEEK_EXPERTS: dict[str, Any] = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 2,
    "moe_intermediate_size": 48,
}
LATENTS: dict[str, Any] = {
    "num_key_value_heads": 4,
    "head_dim": 8,  # that of the rotary part
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
}
LATENT_YARN: dict[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 0.7,
    "mscale_all_dim": 1.0,
}
PARTIAL: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25}
DELTA: dict[str, Any] = {
    "layer_types": ["linear_attention", "full_attention", "linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
    "linear_conv_kernel_dim": 3,
}
GRANITE_CONSTANTS: dict[str, Any] = {
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.4,
    "attention_multiplier": 0.1,
    "logits_scaling": 2.0,
}

# name -> (model_type, what differs from SIZES)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    **DENSE_MODELS,
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-odd-heads": (
        "llama",
        {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 3},
    ),  # tp=2 pads to 8 and 4
    "llama3-rope": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    "llama-linear-rope": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    ),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral-window": ("mistral", {"sliding_window": 8}),
    "qwen2": ("qwen2", {}),
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {}),
    "qwen2_moe": ("qwen2_moe", {**EXPERTS, "shared_expert_intermediate_size": 80, "norm_topk_prob": False}),
    "qwen2_moe-mixed": (
        "qwen2_moe",
        {
            **EXPERTS,
            "shared_expert_intermediate_size": 80,
            "norm_topk_prob": True,
            "mlp_only_layers": [0],
            "decoder_sparse_step": 1,
        },
    ),
    "qwen3_moe": ("qwen3_moe", {**EXPERTS, "norm_topk_prob": True}),
    "deepseek_v2": (
        "deepseek_v2",
        {**DEEPSEEK_EXPERTS, **LATENTS, "q_lora_rank": None, "first_k_dense_replace": 1},
    ),
    "deepseek_v2-groups": (
        "deepseek_v2",
        {
            **DEEPSEEK_EXPERTS,
            **LATENTS,
            "n_routed_experts": 6,
            "topk_method": "group_limited_greedy",
            "n_group": 3,
            "topk_group": 2,
            "routed_scaling_factor": 2.0,
            "rope_parameters": LATENT_YARN,
        },
    ),
    "deepseek_v3": (
        "deepseek_v3",
        {
            **DEEPSEEK_EXPERTS,
            **LATENTS,
            "n_routed_experts": 8,
            "num_experts_per_tok": 4,
            "n_group": 4,
            "topk_group": 2,
            "first_k_dense_replace": 1,
            "num_nextn_predict_layers": 1,
            "rope_parameters": LATENT_YARN,
        },
    ),
    "glm4_moe_lite": ("glm4_moe_lite", {**DEEPSEEK_EXPERTS, **LATENTS}),
    "dots1": ("dots1", {**DEEPSEEK_EXPERTS, "first_k_dense_replace": 1, "norm_topk_prob": True}),
    "dots1-groups": (
        "dots1",
        {
            **DEEPSEEK_EXPERTS,
            "n_group": 2,
            "topk_group": 1,
            "norm_topk_prob": False,
            "routed_scaling_factor": 2.5,
            "sliding_window": 8,
            "max_window_layers": 2,
        },
    ),
    "ernie4_5_moe": (
        "ernie4_5_moe",
        {
            "moe_num_experts": 4,
            "moe_k": 2,
            "moe_intermediate_size": 48,
            "moe_num_shared_experts": 1,
            "moe_layer_start_index": 1,
        },
    ),
    "gemma4_text": (
        "gemma4_text",
        {
            **GEMMA4,
            "enable_moe_block": True,
            "num_experts": 4,
            "top_k_experts": 2,
            "moe_intermediate_size": 48,
        },
    ),
    "glm4_moe": ("glm4_moe", {**DEEPSEEK_EXPERTS, "use_qk_norm": True, "attention_bias": True}),
    "llama4_text": (
        "llama4_text",
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "interleave_moe_layer_step": 2,
            "intermediate_size_mlp": 112,
            "attention_chunk_size": 8,
            "floor_scale": 4,
        },
    ),
    "minimax_m2": ("minimax_m2", {"num_local_experts": 4, "num_experts_per_tok": 2, "rotary_dim": 8}),
    "olmoe": ("olmoe", {"num_experts": 4, "num_experts_per_tok": 2}),
    "gpt_oss": ("gpt_oss", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8}),
    "granitemoe": (
        "granitemoe",
        {"num_local_experts": 4, "num_experts_per_tok": 2, **GRANITE_CONSTANTS},
    ),
    "granitemoeshared": (
        "granitemoeshared",
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "shared_intermediate_size": 80,
            **GRANITE_CONSTANTS,
        },
    ),
    "qwen3_5_text": ("qwen3_5_text", {**DELTA, "rope_parameters": {**PARTIAL, "mrope_section": [1, 1, 0]}}),
    "qwen3_5_moe_text": (
        "qwen3_5_moe_text",
        {"intermediate_size": None, **DELTA, **EXPERTS, "shared_expert_intermediate_size": 80},
    ),
    "qwen3_next": (
        "qwen3_next",
        {
            **DELTA,
            **EXPERTS,
            "shared_expert_intermediate_size": 80,
            "rope_parameters": PARTIAL,
            "mlp_only_layers": [2],
        },
    ),
    "hunyuan_v1_moe": ("hunyuan_v1_moe", {"num_experts": 4, "moe_topk": 2}),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
}


def save_tiny(
    name: str, folder: Path, *, dtype: torch.dtype = torch.float32, seed: int = 0, **overrides: Any
) -> Path:
    """Save a random model of the catalogue above into `folder` and return it."""
    model_type, differs = MODELS[name]
    config = AutoConfig.for_model(model_type, **{**SIZES, **differs, **overrides})
    return save_random(config, folder, dtype=dtype, seed=seed)
