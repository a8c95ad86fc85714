"""Rotary positions of a config in both of its formats, and what is refused."""

from typing import Any

import pytest

from megaswift.errors import ModelError
from megaswift.metadata.meta import ModelMeta, RopeScaling
from megaswift.metadata.read import meta_from_config

LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def read(model_type: str = "llama", **keys: Any) -> ModelMeta:
    return meta_from_config({"model_type": model_type, **keys})


@pytest.mark.parametrize("kind_key", ["rope_type", "type"])
def test_old_and_new_format_say_the_same(kind_key: str) -> None:
    old = read(rope_theta=500000.0, rope_scaling={kind_key: "llama3", **LLAMA3})
    new = read(rope_parameters={"rope_theta": 500000.0, "rope_type": "llama3", **LLAMA3})
    assert old.rope_theta == new.rope_theta == 500000.0
    assert old.rope_scaling == new.rope_scaling
    assert new.rope_scaling == RopeScaling(
        kind="llama3", factor=8.0, original_max_position=8192, low_freq_factor=1.0, high_freq_factor=4.0
    )


def test_theta_may_be_an_integer_and_defaults_to_the_family_s() -> None:
    assert read(rope_theta=500000).rope_theta == 500000.0
    assert read().rope_theta == 10000.0
    assert read("mixtral").rope_theta == 1000000.0
    assert read("mixtral", rope_parameters={"rope_type": "default"}).rope_theta == 1000000.0


def test_theta_inside_the_dictionary_wins() -> None:
    assert read(rope_theta=3.0, rope_parameters={"rope_theta": 7.0}).rope_theta == 7.0


def test_no_scaling_is_null_empty_or_default() -> None:
    for scaling in (None, {}, {"rope_type": "default"}):
        assert read(rope_scaling=scaling).rope_scaling is None


def test_linear_scaling_has_a_factor() -> None:
    assert read(rope_scaling={"type": "linear", "factor": 4}).rope_scaling == RopeScaling(
        kind="linear", factor=4
    )


def test_the_original_length_defaults_to_the_context_length() -> None:
    scaling = read(
        max_position_embeddings=4096, rope_scaling={"rope_type": "yarn", "factor": 4.0}
    ).rope_scaling
    assert scaling is not None and scaling.original_max_position == 4096


def test_yarn_keeps_every_field_of_the_file() -> None:
    fields = {
        "beta_fast": 16.0, "beta_slow": 2.0, "mscale": 0.7, "mscale_all_dim": 0.9, "attention_factor": 1.3,
        "truncate": False,
    }  # fmt: skip
    scaling = read(rope_scaling={"rope_type": "yarn", "factor": 4.0, **fields}).rope_scaling
    assert scaling is not None and {key: vars(scaling)[key] for key in fields} == fields


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        ({"rope_type": "llama33", **LLAMA3}, "rope_type='llama33' .* Did you mean llama3"),
        ({"rope_type": "llama3", "factor": 8.0}, "lack high_freq_factor|lack low_freq_factor"),
        ({"rope_type": "linear"}, "lack factor"),
        (
            {"rope_type": "linear", "factor": 2.0, "beta_fast": 32},
            "beta_fast=32 .* means nothing for rope_type=linear",
        ),
        ({"factor": 2.0}, "factor=2.0 .* means nothing for rope_type=default"),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ("linear", "must be null or a dictionary"),
    ],
)
def test_a_wrong_rope_dictionary_is_refused(scaling: Any, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        read(rope_scaling=scaling)


def test_partial_rotary_positions_are_read_beside_and_inside() -> None:
    assert read("glm4").rotary_fraction == 0.5
    assert read("glm4", partial_rotary_factor=0.25).rotary_fraction == 0.25
    assert read("glm4", rope_parameters={"partial_rotary_factor": 0.75}).rotary_fraction == 0.75
    assert read("minimax_m2", head_dim=128, rotary_dim=32).rotary_fraction == 0.25
    with pytest.raises(ModelError, match="partial_rotary_factor"):
        read("llama", partial_rotary_factor=0.5)


def test_gemma3_has_two_bases_in_both_formats() -> None:
    linear = {"rope_type": "linear", "factor": 8.0}
    old = read("gemma3_text", rope_theta=1e6, rope_local_base_freq=5000.0, rope_scaling=linear)
    new = read(
        "gemma3_text",
        rope_parameters={
            "full_attention": {**linear, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 5000.0},
        },
    )
    for meta in (old, new):
        assert (meta.rope_theta, meta.rope.local_theta) == (1e6, 5000.0)
        assert meta.rope_scaling == RopeScaling(kind="linear", factor=8.0)


def test_stretched_sliding_layers_are_refused() -> None:
    with pytest.raises(ModelError, match="Stretched positions of sliding layers"):
        read("olmo3", rope_parameters={"sliding_attention": {"rope_type": "linear", "factor": 2.0}})
    with pytest.raises(ModelError, match="one dictionary for each kind of layer, not rope_type"):
        read("olmo3", rope_parameters={"rope_type": "default"})


def test_phi3_longrope_takes_the_length_beside_the_dictionary() -> None:
    factors = {"short_factor": [1.0] * 48, "long_factor": [2.0] * 48}
    scaling = read(
        "phi3",
        max_position_embeddings=131072,
        original_max_position_embeddings=4096,
        rope_scaling={"type": "su", **factors, "original_max_position_embeddings": 17},
    ).rope_scaling
    assert scaling is not None and (scaling.kind, scaling.original_max_position) == ("longrope", 4096)
    assert scaling.factor == 32.0 and scaling.long_factor == (2.0,) * 48


def test_hunyuan_alpha_is_a_fixed_base_and_dynamic_without_it() -> None:
    released = {
        "alpha": 1000.0,
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 1.0,
        "mscale": 1.0,
        "type": "dynamic",
    }
    assert read("hunyuan_v1_dense", rope_scaling=released).rope_scaling == RopeScaling(
        kind="ntk_alpha", alpha=1000.0
    )
    plain = {"type": "dynamic", "factor": 2.0}
    assert read("hunyuan_v1_dense", rope_scaling=plain).rope_scaling == RopeScaling(
        kind="dynamic", factor=2.0
    )


def test_deepseek_yarn_sharpens_the_scores() -> None:
    yarn = {
        "type": "yarn",
        "factor": 40,
        "original_max_position_embeddings": 4096,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    }
    meta = read("deepseek_v3", rope_scaling=yarn)
    assert meta.attention.scale == pytest.approx(192**-0.5 * 1.3688879454113936**2, rel=1e-12)
    assert read("deepseek_v3").attention.scale is None


def test_ministral3_scales_its_queries() -> None:
    scaling = read("ministral3").attention.query_scaling
    assert scaling is not None and (scaling.beta, scaling.length, scaling.offset) == (0.1, 16384, 0)
    with pytest.raises(ModelError, match="llama_4_scaling_beta"):
        read("ministral3", rope_parameters={"rope_type": "yarn", "factor": 2.0})


def test_multimodal_sections_do_not_disturb_text() -> None:
    meta = read(
        "qwen3_5_text",
        rope_parameters={
            "rope_type": "default", "mrope_section": [11, 11, 10], "mrope_interleaved": True, "rope_theta": 1e7,
            "partial_rotary_factor": 0.25,
        },
    )  # fmt: skip
    assert (meta.rope_scaling, meta.rope_theta, meta.rope.mrope_section) == (None, 1e7, (11, 11, 10))
