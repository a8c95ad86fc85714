"""Small configs keep the structure of the models that they stand for."""

import json
from dataclasses import replace
from typing import Any

import pytest

from megaswift.metadata.catalogue import FAMILIES
from megaswift.metadata.count import count_parameters
from megaswift.metadata.meta import ModelMeta
from megaswift.metadata.read import meta_from_config
from megaswift.metadata.small import layer_kinds, small_config
from tests.harness.planning import CONFIGS

LARGEST = 3_000_000  # parameters: a second of work for transformers on one core
COUNTS = {"num_experts": 8, "n_routed_experts": 8, "num_experts_per_tok": 2}  # where a family has no default


def config_of(name: str) -> dict[str, Any]:
    path = CONFIGS / f"{name}.json"
    if path.is_file():
        content = json.loads(path.read_text())
        return dict(content.get("config", content))
    defaults = FAMILIES[name].defaults
    return {
        "model_type": name,
        **{key: value for key, value in COUNTS.items() if key in defaults and defaults[key] is None},
    }


def structure(meta: ModelMeta) -> dict[str, Any]:
    """Return the facts that a small model shares with the one it stands for."""
    kept = (
        "activation", "gated_mlp", "qkv_bias", "attention_out_bias", "mlp_bias", "lm_head_bias", "qk_norm", "tied_embeddings",
        "parallel_residual", "rotary_fraction", "rope_theta", "norm", "norm_eps", "layer_scalar", "qk_norm_after_rope",
    )  # fmt: skip
    facts = {name: vars(meta)[name] for name in kept}
    facts["kinds of layers"] = sorted(set(map(str, _without_sizes(meta))))
    facts["first layers"] = [str(kind) for kind in _without_sizes(meta)[:2]]
    facts["queries a group"] = meta.num_heads // meta.num_kv_heads
    facts["interleaved"] = meta.rope.interleaved
    facts["stretching"] = meta.rope_scaling and meta.rope_scaling.kind
    if meta.moe is not None:
        sizes = {"num_experts": 0, "topk": 0, "ffn_hidden_size": 0, "layer_is_moe": (), "aux_loss_coeff": 0.0}
        sizes |= {"num_groups": meta.moe.num_groups and 1, "topk_groups": meta.moe.topk_groups and 1}
        sizes["shared_ffn_hidden_size"] = min(meta.moe.shared_ffn_hidden_size, 1)
        facts["experts"] = replace(meta.moe, **sizes)
    if meta.mla is not None:
        facts["latent queries"] = meta.mla.q_rank is not None
    return facts


def _without_sizes(meta: ModelMeta) -> list[tuple[Any, ...]]:
    """Return the kinds of all layers, a window or chunk of some size as 'some'."""
    return [tuple("some" if type(one) is int else one for one in kind) for kind in layer_kinds(meta)]


@pytest.mark.parametrize("name", sorted({*FAMILIES, *(path.stem for path in CONFIGS.glob("*.json"))}))
def test_a_small_config_keeps_the_structure(name: str) -> None:
    config = config_of(name)
    meta = meta_from_config(config)
    small = meta_from_config(small_config(config, meta))
    assert structure(small) == structure(meta)
    assert count_parameters(small).total < LARGEST
    assert small.num_layers < meta.num_layers


def test_a_matrix_that_is_square_stays_square_and_another_does_not_become_it() -> None:
    for name in ("gpt-oss-120b", "llama-3.1-8b", "qwen3-235b-a22b"):
        config = config_of(name)
        meta = meta_from_config(config)
        small = meta_from_config(small_config(config, meta))
        for one in (meta, small):
            assert (one.hidden_size == one.num_heads * one.head_dim) == (name == "llama-3.1-8b")
            assert (one.moe is not None and one.moe.ffn_hidden_size == one.hidden_size) == (
                name == "gpt-oss-120b"
            )


def test_a_key_in_another_spelling_is_cut_too() -> None:
    config = config_of("gpt-oss-120b")
    small = small_config(config, meta_from_config(config))
    assert "experts_per_token" not in small and small["num_experts_per_tok"] == 3


def test_latent_attention_has_as_many_key_heads_as_query_heads_for_transformers() -> None:
    config = {"model_type": "deepseek_v3"}  # whose class would take 128 by default
    small = small_config(config, meta_from_config(config))
    assert small["num_key_value_heads"] == small["num_attention_heads"]
