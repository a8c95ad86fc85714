"""Rotary frequencies against transformers' own."""

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from megaswift.metadata.read import meta_from_config
from megaswift.models.rope import inverse_frequencies

KINDS: list[dict[str, Any]] = [
    {"rope_type": "default", "rope_theta": 1e5},
    {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
    {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 32.0,
        "low_freq_factor": 2.0,
        "high_freq_factor": 6.0,
        "original_max_position_embeddings": 4096,
    },
    {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
    {"rope_type": "yarn", "rope_theta": 1e6, "factor": 16.0, "original_max_position_embeddings": 1024},
    {
        "rope_type": "yarn",
        "rope_theta": 1.5e5,
        "factor": 32.0,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "mscale": 1.0,
        "mscale_all_dim": 0.7,
        "original_max_position_embeddings": 512,
    },
]


@pytest.mark.parametrize("rope", KINDS, ids=lambda rope: f"{rope['rope_type']}-{rope.get('factor', 1)}")
def test_inverse_frequencies_equal_transformers(rope: dict[str, Any]) -> None:
    config = LlamaConfig(hidden_size=256, num_attention_heads=2, num_hidden_layers=1, rope_parameters=rope)
    config.architectures = ["LlamaForCausalLM"]
    expected = LlamaRotaryEmbedding(config).inv_freq
    meta = meta_from_config(config.to_dict())
    torch.testing.assert_close(
        inverse_frequencies(meta), expected, rtol=1e-6, atol=0.0
    )  # other order of products


@pytest.mark.parametrize("rope", KINDS, ids=lambda rope: f"{rope['rope_type']}-{rope.get('factor', 1)}")
def test_amplitudes_equal_transformers(rope: dict[str, Any]) -> None:
    config = LlamaConfig(hidden_size=256, num_attention_heads=2, num_hidden_layers=1, rope_parameters=rope)
    config.architectures = ["LlamaForCausalLM"]
    scaling = meta_from_config(config.to_dict()).rope_scaling
    amplitude = scaling.amplitude if scaling else 1.0
    assert amplitude == pytest.approx(LlamaRotaryEmbedding(config).attention_scaling, rel=1e-12)


def test_dynamic_frequencies_stretch_beyond_the_original_length() -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    config = LlamaConfig(
        hidden_size=64,
        num_attention_heads=2,
        num_hidden_layers=1,
        max_position_embeddings=32,
        rope_parameters=rope,
    )
    config.architectures = ["LlamaForCausalLM"]
    rotary, meta = LlamaRotaryEmbedding(config), meta_from_config(config.to_dict())
    for length in (16, 40, 100):
        rotary(torch.zeros(1, length, 64), torch.arange(length)[None])
        expected = rotary.inv_freq if length > 32 else rotary.original_inv_freq
        torch.testing.assert_close(inverse_frequencies(meta, length=length), expected, rtol=1e-6, atol=0.0)
