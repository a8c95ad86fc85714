"""What a config.json may say: unknown, harmless, missing, null and wrongly typed keys, and layer patterns."""

from typing import Any

import pytest

from megaswift.errors import ModelError
from megaswift.metadata.catalogue import FAMILIES
from megaswift.metadata.config_reader import ConfigReader
from megaswift.metadata.features import BUILT, FEATURES, check_supported, missing_features
from megaswift.metadata.meta import ModelMeta
from megaswift.metadata.read import meta_from_config

REQUIRED: dict[str, dict[str, Any]] = {
    "deepseek_v2": {"num_experts_per_tok": 6},
    "dots1": {"n_routed_experts": 8, "num_experts_per_tok": 2},
}

GEMMA_4_E2B: dict[str, Any] = {
    "model_type": "gemma4_text",
    "num_hidden_layers": 12,
    "num_kv_shared_layers": 6,
    "use_double_wide_mlp": True,
}


def read(model_type: str, **keys: Any) -> ModelMeta:
    return meta_from_config({"model_type": model_type, **REQUIRED.get(model_type, {}), **keys})


@pytest.mark.parametrize("name", FAMILIES)
def test_an_unknown_key_is_refused_in_every_family(name: str) -> None:
    with pytest.raises(ModelError, match=r"use_moon_phase=True .* may change the mathematics"):
        read(name, use_moon_phase=True)


def test_a_misspelt_key_is_answered_with_the_nearest_one() -> None:
    with pytest.raises(ModelError, match="Did you mean num_key_value_heads"):
        read("llama", num_key_value_head=8)


def test_an_unknown_key_that_holds_null_asks_for_nothing() -> None:
    assert read("llama", use_moon_phase=None) == read("llama", use_moon_phase=None)


@pytest.mark.parametrize("name", FAMILIES)
def test_bookkeeping_and_generation_keys_are_harmless(name: str) -> None:
    plain = read(name)
    other = read(
        name, transformers_version="4.51.0", use_cache=False, temperature=0.6, top_p=0.9, id2label={"0": "LABEL_0"},
        _name_or_path="somewhere", architectures=["X"], torch_dtype="float16", return_dict=True, num_labels=2,
    )  # fmt: skip
    assert other.num_layers == plain.num_layers and other.moe == plain.moe and other.architecture == "X"
    assert other.dtype == "float16"


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("llama", {"pretraining_tp": 1}),
        ("llama", {"is_encoder_decoder": False}),
        ("mixtral", {"router_jitter_noise": 0.0}),
        ("deepseek_v3", {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1}),
        ("minimax_m2", {"use_qk_norm": True, "qk_norm_type": "per_layer", "shared_intermediate_size": 0}),
        ("gemma3_text", {"use_bidirectional_attention": False}),
    ],
)
def test_a_key_that_is_harmless_at_its_value_is_accepted(name: str, keys: dict[str, Any]) -> None:
    assert read(name, **keys).family == name


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("llama", {"pretraining_tp": 2}),
        ("llama", {"add_cross_attention": True}),
        ("mixtral", {"router_jitter_noise": 0.1}),
        ("deepseek_v3", {"scoring_func": "softmax"}),
        ("deepseek_v2", {"norm_topk_prob": True}),
        ("deepseek_v2", {"topk_method": "noaux_tc"}),
        ("minimax_m2", {"shared_intermediate_size": 1024}),
        ("gemma3_text", {"use_bidirectional_attention": True}),
        ("qwen3_moe", {"qkv_bias": True}),
        ("qwen2", {"use_mrope": True}),
    ],
)
def test_the_same_key_at_another_value_is_refused(name: str, keys: dict[str, Any]) -> None:
    (key,) = keys
    with pytest.raises(ModelError, match=f"{key}="):
        read(name, **keys)


@pytest.mark.parametrize(
    ("keys", "rule"),
    [
        ({"hidden_size": "4096"}, "must be of type int, not str"),
        ({"hidden_size": 4096.0}, "must be of type int, not float"),
        ({"hidden_size": None}, "must be of type int, not NoneType"),
        ({"tie_word_embeddings": 1}, "must be of type bool, not int"),
        ({"rms_norm_eps": True}, "must be of type float, not bool"),
        ({"num_key_value_heads": 4.0}, "must be of type int, not float"),
        ({"hidden_act": "swoosh"}, "Known activations"),
        ({"num_hidden_layers": 0}, "not positive"),
        ({"num_key_value_heads": 5}, "does not divide num_attention_heads=32"),
        ({"dtype": "float31"}, "Choose from bfloat16, float16, float32|Did you mean float32"),
    ],
)
def test_a_wrong_value_is_refused_by_name_and_rule(keys: dict[str, Any], rule: str) -> None:
    with pytest.raises(ModelError, match=rule):
        read("llama", **keys)


def test_an_integer_will_do_where_a_float_is_meant() -> None:
    assert read("granite", embedding_multiplier=12).multipliers.embedding == 12.0


def test_two_spellings_of_one_key_must_agree() -> None:
    assert (
        read("qwen3_moe", num_local_experts=16, num_experts=16).moe == read("qwen3_moe", num_experts=16).moe
    )
    with pytest.raises(ModelError, match="num_local_experts=8 says otherwise"):
        read("qwen3_moe", num_local_experts=8, num_experts=16)


def test_head_dim_is_derived_where_it_is_null_or_absent() -> None:
    sizes = {"hidden_size": 96, "num_attention_heads": 4}
    assert read("llama", **sizes).head_dim == 24
    assert read("llama", **sizes, head_dim=None).head_dim == 24
    assert read("llama", **sizes, head_dim=40).head_dim == 40
    assert read("qwen3_moe", **sizes).head_dim == 24
    assert read("qwen3", **sizes, num_key_value_heads=2).head_dim == 128
    with pytest.raises(ModelError, match=r"head_dim=40 .* takes hidden_size / num_attention_heads = 24"):
        read("cohere2", **sizes, head_dim=40)


def test_absent_key_value_heads_are_the_default_and_null_ones_are_the_query_heads() -> None:
    assert read("mistral", num_attention_heads=16).num_kv_heads == 8
    assert read("mistral", num_attention_heads=16, num_key_value_heads=None).num_kv_heads == 16
    assert read("llama", num_attention_heads=16).num_kv_heads == 16


def test_a_family_without_a_default_asks_for_the_key() -> None:
    with pytest.raises(ModelError, match=r"num_experts_per_tok=None .* no default"):
        meta_from_config({"model_type": "deepseek_v2"})


def test_experts_follow_decoder_sparse_step_and_mlp_only_layers() -> None:
    moe = read("qwen2_moe", num_hidden_layers=6, decoder_sparse_step=2, mlp_only_layers=[3]).moe
    assert moe is not None and moe.layer_is_moe == (False, True, False, False, False, True)


def test_experts_follow_first_k_dense_replace() -> None:
    moe = read("deepseek_v3", num_hidden_layers=5, first_k_dense_replace=3).moe
    assert moe is not None and moe.layer_is_moe == (False, False, False, True, True)


def test_one_routing_group_is_no_group_limit() -> None:
    limited, free = read("deepseek_v3").moe, read("kimi_k2", n_group=1, topk_group=1).moe
    assert limited is not None and (limited.num_groups, limited.topk_groups) == (8, 4)
    assert free is not None and (free.num_groups, free.topk_groups) == (None, None)
    greedy = read("deepseek_v2", n_group=8, topk_group=3).moe
    assert greedy is not None and greedy.num_groups is None
    grouped = read("deepseek_v2", n_group=8, topk_group=3, topk_method="group_limited_greedy").moe
    assert grouped is not None and (grouped.num_groups, grouped.topk_groups, grouped.group_score) == (
        8,
        3,
        "max",
    )


def test_more_experts_a_token_than_there_are_is_refused() -> None:
    with pytest.raises(ModelError, match="9 experts a token"):
        read("mixtral", num_experts_per_tok=9)


def test_windows_follow_layer_types_before_max_window_layers() -> None:
    keys = {"num_hidden_layers": 4, "use_sliding_window": True, "sliding_window": 64, "max_window_layers": 3}
    assert read("qwen2", **keys).sliding_window == (None, None, None, 64)
    kinds = ["sliding_attention", "full_attention", "full_attention", "full_attention"]
    assert read("qwen2", **keys, layer_types=kinds).sliding_window == (64, None, None, None)
    assert read("qwen2", **{**keys, "use_sliding_window": False}).sliding_window == ()


@pytest.mark.parametrize("kinds", [["full_attention"] * 3, ["full_attention"] * 3 + ["warped_attention"]])
def test_layer_types_must_be_known_and_as_many_as_layers(kinds: list[str]) -> None:
    with pytest.raises(ModelError, match="needs 4 entries, each one of sliding_attention, full_attention"):
        read("qwen2", num_hidden_layers=4, layer_types=kinds)


def test_a_sliding_layer_without_a_window_is_refused() -> None:
    with pytest.raises(ModelError, match="so a window is needed"):
        read("olmo3", num_hidden_layers=2, sliding_window=None)


def test_layers_without_rope_are_those_that_the_config_marks_with_0() -> None:
    assert read("smollm3", num_hidden_layers=4).rope.layers == (True, True, True, False)
    assert read("smollm3", num_hidden_layers=3, no_rope_layers=[0, 1, 1]).rope.layers == (False, True, True)
    with pytest.raises(ModelError, match="one entry for each of the 3 layers"):
        read("smollm3", num_hidden_layers=3, no_rope_layers=[0, 1])
    assert read("exaone4", num_hidden_layers=4).rope.layers == (True, True, True, False)
    assert read("exaone4", num_hidden_layers=4, sliding_window=None).rope.layers == ()


def test_later_gemma4_layers_reuse_keys_and_values_of_the_last_own_layer_of_their_kind() -> None:
    kinds = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    layers = read(
        "gemma4_text", num_hidden_layers=4, layer_types=kinds, num_kv_shared_layers=2
    ).layer_variation
    assert layers is not None and layers.kv_from_layer == (None, None, 0, 1)
    assert layers.head_dims == (256, 512, 256, 512)


def test_kimi_k2_and_mimo_are_their_relatives_under_other_names() -> None:
    kimi, deepseek = read("kimi_k2"), read("deepseek_v3")
    assert (kimi.moe, kimi.mla, kimi.rope_theta) == (deepseek.moe, deepseek.mla, deepseek.rope_theta)
    mimo, qwen = read("mimo", attention_bias=True), read("qwen2")
    assert (mimo.qkv_bias, mimo.attention_out_bias, mimo.num_mtp_layers) == (
        qwen.qkv_bias,
        qwen.attention_out_bias,
        1,
    )


def test_an_unknown_model_type_lists_the_nearest_known_one() -> None:
    with pytest.raises(ModelError, match=r"model_type=qwen33 .* Did you mean qwen3"):
        read("qwen33")
    with pytest.raises(ModelError, match="has no model_type"):
        meta_from_config({})


def test_own_code_of_a_known_model_type_is_noted_and_not_needed() -> None:
    assert read("deepseek_v3", auto_map={"AutoModel": "modeling.Model"}).trust_remote_code
    assert not read("deepseek_v3").trust_remote_code


def test_a_multimodal_config_names_its_known_text_part() -> None:
    with pytest.raises(ModelError, match=r"multimodal.*text part gemma3_text"):
        read("gemma3", text_config={"model_type": "gemma3_text"})


@pytest.mark.parametrize("name", FAMILIES)
def test_supported_families_are_those_whose_features_are_built(name: str) -> None:
    meta = read(name)
    assert FAMILIES[name].name == name
    assert FAMILIES[name].supported
    assert missing_features(meta) == ()
    check_supported(meta)


def test_a_refusal_names_the_missing_features() -> None:
    with pytest.raises(ModelError, match="clamped q, k and v"):
        check_supported(read("olmoe", clip_qkv=8.0))
    with pytest.raises(ModelError, match="weights quantised otherwise than in block FP8 or MXFP4"):
        check_supported(read("llama", quantization_config={"quant_method": "gptq", "bits": 4}))


def test_every_feature_name_is_needed_by_some_family_and_every_built_one_is_a_feature() -> None:
    assert set(FEATURES) >= BUILT
    extra = [
        read("llama", rope_scaling={"rope_type": "linear", "factor": 2.0}),
        read("llama", rope_scaling={"rope_type": "dynamic", "factor": 2.0}),
        read("llama", hidden_act="gelu", quantization_config={"quant_method": "gptq"}),
        read("hunyuan_v1_dense", rope_scaling={"rope_type": "dynamic", "alpha": 1000.0}),
        read("phi3", rope_scaling={"type": "su", "short_factor": [1.0] * 48, "long_factor": [1.0] * 48}),
        read("olmoe", clip_qkv=8.0),
        read("granite", embedding_multiplier=12.0, residual_multiplier=0.2, logits_scaling=8.0),
        read("ernie4_5_moe", use_bias=True),
        read("deepseek_v3", attention_bias=True),
        read("gemma4_text", enable_moe_block=True, num_experts=8, top_k_experts=2, moe_intermediate_size=64),
        meta_from_config(GEMMA_4_E2B),
    ]
    metas = [read(name) for name in FAMILIES] + extra
    unused = {name for name, needed in FEATURES.items() if not any(needed(meta) for meta in metas)}
    assert unused == set()


class Spy(dict[str, Any]):
    """A declaration's defaults that remember which of them were asked for."""

    def __init__(self, values: Any) -> None:
        super().__init__(values)
        self.asked: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_declared_key_is_read_by_some_fact(name: str) -> None:
    """A key that nothing reads would be accepted and then ignored."""
    family = FAMILIES[name]
    spy = Spy(family.defaults)
    switches = {
        "use_sliding_window": True, "sliding_window": 64, "attention_k_eq_v": True, "enable_moe_block": True,
        "num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 64,
    }  # fmt: skip
    switched = {key: value for key, value in switches.items() if key in family.defaults}
    if name == "phi3":
        switched["rope_scaling"] = {"type": "su", "short_factor": [1.0] * 48, "long_factor": [1.0] * 48}
    for keys in ({}, switched):
        values = {**REQUIRED.get(name, {}), **keys}
        config = ConfigReader(values, defaults=spy, aliases=family.aliases, name=name)
        for fact in family.facts.values():
            _ = fact(config) if callable(fact) else None
    ignored_by_the_class = {"max_window_layers", "layer_types"} if name == "qwen3_moe" else set()
    assert set(family.defaults) - spy.asked == ignored_by_the_class
