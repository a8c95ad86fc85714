"""Every declared family against transformers: defaults of absent keys, saved configs read back, parameters counted."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from megaswift.metadata.catalogue import FAMILIES
from megaswift.metadata.count import count_parameters
from megaswift.metadata.harmless import HARMLESS_KEYS, HARMLESS_VALUES
from megaswift.metadata.meta import ModelMeta
from megaswift.metadata.read import get_model_meta, meta_from_config

NOT_IN_TRANSFORMERS = {"kimi_k2", "mimo"}
KNOWN = sorted(set(FAMILIES) - NOT_IN_TRANSFORMERS)

# Keys that files hold and config classes take as arguments without declaring them.
UNDECLARED = {
    "full_attention_interval", "global_head_dim", "head_dim", "mtp_num_hidden_layers", "num_global_key_value_heads",
    "num_mtp_modules", "num_nextn_predict_layers", "partial_rotary_factor", "per_layer_config", "rope_local_base_freq", "rope_theta", "rotary_dim",
    "sliding_window_pattern", "max_window_layers", "layer_types",
}  # fmt: skip

SIZES: dict[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
}
MLA = {
    "num_key_value_heads": 4, "kv_lora_rank": 24, "q_lora_rank": 40, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8,
    "v_head_dim": 20,
}  # fmt: skip
GROUPED = {
    "n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 36, "n_shared_experts": 2, "n_group": 4,
    "topk_group": 2, "first_k_dense_replace": 3,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 36}
SHARED = {**EXPERTS, "shared_expert_intermediate_size": 52}
LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
DELTA = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 12, "linear_value_head_dim": 20,
    "linear_conv_kernel_dim": 3, "head_dim": 16,
}  # fmt: skip
GEMMA4 = {"num_hidden_layers": 12, "head_dim": 16, "global_head_dim": 24, "vocab_size_per_layer_input": 67}
GEMMA4 |= {"hidden_size_per_layer_input": 6}
YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 128,
    "mscale": 1.0,
    "mscale_all_dim": 0.7,
}

# name -> what differs from SIZES; the part before a space is the model type.
CASES: dict[str, dict[str, Any]] = {
    "apertus": {},
    "arcee": {},
    "arcee bias": {"mlp_bias": True, "attention_bias": True},
    "cohere": {},
    "cohere2": {},
    "deepseek_v2": {**MLA, **GROUPED, "topk_method": "group_limited_greedy"},
    "deepseek_v2 lite": {**MLA, **GROUPED, "q_lora_rank": None, "attention_bias": True, "mlp_bias": True},
    "deepseek_v3": {**MLA, **GROUPED, "rope_parameters": {**YARN, "rope_theta": 10000.0}},
    "deepseek_v3 bias": {**MLA, **GROUPED, "attention_bias": True, "num_mtp_layers": 0},
    "dots1": {**GROUPED, "n_group": 1, "topk_group": 1},
    "ernie4_5": {"head_dim": 20},
    "ernie4_5 bias": {"use_bias": True, "tie_word_embeddings": False},
    "ernie4_5_moe": {
        "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 36, "moe_layer_start_index": 2, "moe_layer_interval": 2
    },
    "ernie4_5_moe bias": {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 36, "use_bias": True, "moe_layer_end_index": 5},
    "exaone4": {},
    "gemma": {"head_dim": 24},
    "gemma2": {"head_dim": 24},
    "gemma3_text": {"head_dim": 24},
    "gemma4_text": GEMMA4,
    "gemma4_text moe": {
        **GEMMA4, "hidden_size_per_layer_input": 0, "attention_k_eq_v": True, "num_global_key_value_heads": 1,
        "enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 36,
    },
    "gemma4_text shared": {**GEMMA4, "num_kv_shared_layers": 5, "use_double_wide_mlp": True},
    "glm4": {"head_dim": 24},
    "glm4_moe": {**GROUPED, "use_qk_norm": True, "attention_bias": True},
    "glm4_moe_lite": {**MLA, **{key: value for key, value in GROUPED.items() if key != "first_k_dense_replace"}},
    "gpt_oss": {**LOCAL_EXPERTS, "head_dim": 20},
    "granite": {"embedding_multiplier": 12.0, "logits_scaling": 8.0, "residual_multiplier": 0.22, "mlp_bias": True},
    "granitemoe": {**LOCAL_EXPERTS, "attention_multiplier": 0.015},
    "granitemoeshared": {**LOCAL_EXPERTS, "shared_intermediate_size": 52},
    "hunyuan_v1_dense": {"head_dim": 20},
    "hunyuan_v1_moe": {"head_dim": 20, "num_experts": 4, "moe_topk": 2},
    "internlm3": {"attention_bias": True, "mlp_bias": True, "head_dim": 20},
    "llama": {},
    "llama bias": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "head_dim": 20},
    "llama4_text": {**LOCAL_EXPERTS, "intermediate_size_mlp": 88, "head_dim": 16, "interleave_moe_layer_step": 2},
    "minimax_m2": {**LOCAL_EXPERTS, "head_dim": 20, "rotary_dim": 10},
    "ministral3": {"head_dim": 20},
    "mistral": {"head_dim": 20},
    "mistral full": {"sliding_window": None},
    "mixtral": LOCAL_EXPERTS,
    "olmo2": {},
    "olmo3": {},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2, "clip_qkv": 8.0},
    "phi3": {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
    "qwen2": {},
    "qwen2 window": {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 5},
    "qwen2_moe": {**SHARED, "decoder_sparse_step": 2, "mlp_only_layers": [3]},
    "qwen2_moe window": {**SHARED, "use_sliding_window": True, "sliding_window": 32, "max_window_layers": 5},
    "qwen3": {"head_dim": 20},
    "qwen3 bias": {"attention_bias": True},
    "qwen3_5_moe_text": {**DELTA, **SHARED},
    "qwen3_5_text": DELTA,
    "qwen3_moe": {**EXPERTS, "head_dim": 20, "norm_topk_prob": True},
    "qwen3_moe window": {**EXPERTS, "use_sliding_window": True, "sliding_window": 32},
    "qwen3_next": {**DELTA, **SHARED, "mlp_only_layers": [0]},
    "seed_oss": {"head_dim": 20, "attention_out_bias": True},
    "smollm3": {},
    "smollm3 window": {"use_sliding_window": True, "sliding_window": 32},
    "starcoder2": {},
}  # fmt: skip


def build_config(case: str) -> PreTrainedConfig:
    """Return transformers' config of a case; a class gets only the sizes that it declares."""
    kind = CONFIG_MAPPING[case.split()[0]]
    declared = {field.name for field in dataclasses.fields(kind)}
    return kind(**({key: value for key, value in SIZES.items() if key in declared} | CASES[case]))


def saved(case: str, folder: Path) -> tuple[PreTrainedConfig, ModelMeta]:
    config = build_config(case)
    config.save_pretrained(folder)
    return config, get_model_meta(folder)


def test_every_family_that_transformers_has_is_compared() -> None:
    assert {case.split()[0] for case in CASES} == set(KNOWN)
    assert not NOT_IN_TRANSFORMERS & set(CONFIG_MAPPING.keys())


@pytest.mark.parametrize("name", KNOWN)
def test_declared_defaults_are_those_of_the_config_class(name: str) -> None:
    kind, family = CONFIG_MAPPING[name], FAMILIES[name]
    bookkeeping = {field.name for field in dataclasses.fields(PreTrainedConfig)}
    theirs = {
        family.aliases.get(field.name, field.name): field.default
        for field in dataclasses.fields(kind)
        if field.name not in bookkeeping
    }
    ours = dict(family.defaults)
    ignored = {*HARMLESS_KEYS, *HARMLESS_VALUES, *family.harmless_keys, *family.harmless_values}
    assert set(theirs) - set(ours) - ignored == set(), "the class has keys that the declaration does not know"
    assert set(ours) - set(theirs) - UNDECLARED == set(), (
        "the declaration has keys that the class does not know"
    )
    for key in sorted(set(ours) & set(theirs) - {"rope_parameters"}):
        assert ours[key] == theirs[key], key


@pytest.mark.parametrize("name", KNOWN)
def test_a_config_without_rope_keys_gets_the_rope_of_the_config_class(name: str) -> None:
    required = {"n_routed_experts": 8, "num_experts_per_tok": 2} if name in ("deepseek_v2", "dots1") else {}
    rope = CONFIG_MAPPING[name](**required).rope_parameters
    meta = meta_from_config({"model_type": name, **required})
    check_rope(meta, rope)


def check_rope(meta: ModelMeta, rope: dict[str, Any]) -> None:
    """Compare a meta's rotary facts with rope parameters as transformers standardises them."""
    if "full_attention" in rope:
        assert meta.rope.local_theta == rope["sliding_attention"]["rope_theta"]
        rope = rope["full_attention"]
    assert meta.rope_theta == rope["rope_theta"]
    kind = rope["rope_type"]
    assert (meta.rope_scaling.kind if meta.rope_scaling else "default") == kind
    if kind != "proportional":
        assert meta.rotary_fraction == rope.get("partial_rotary_factor", 1.0)
    for key, field in {
        "factor": "factor",
        "original_max_position_embeddings": "original_max_position",
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
        "beta_fast": "beta_fast",
        "beta_slow": "beta_slow",
        "mscale": "mscale",
        "mscale_all_dim": "mscale_all_dim",
        "truncate": "truncate",
    }.items():
        if meta.rope_scaling is not None and key in rope:
            assert vars(meta.rope_scaling)[field] == rope[key], key
    if kind == "proportional":
        assert meta.rope_scaling is not None and meta.rope_scaling.proportion == rope["partial_rotary_factor"]


@pytest.mark.parametrize("case", CASES)
def test_a_saved_config_is_read_as_transformers_understands_it(case: str, tmp_path: Path) -> None:
    config, meta = saved(case, tmp_path)
    names = {
        "num_layers": "num_hidden_layers",
        "hidden_size": "hidden_size",
        "num_heads": "num_attention_heads",
        "vocab_size": "vocab_size",
        "max_length": "max_position_embeddings",
        "tied_embeddings": "tie_word_embeddings",
        "initializer_range": "initializer_range",
    }
    for ours, theirs in names.items():
        assert vars(meta)[ours] == vars(config).get(theirs), ours
    assert meta.attention_dropout == vars(config).get("attention_dropout", 0.0)
    check_rope(meta, config.rope_parameters)
    kinds = vars(config).get("layer_types")
    if kinds is not None and meta.family != "qwen3_moe":
        window = vars(config).get("sliding_window")
        slides = tuple(window if kind == "sliding_attention" else None for kind in kinds)
        assert meta.sliding_window == (slides if any(slides) else ())
        linear = tuple(kind == "linear_attention" for kind in kinds)
        assert (meta.linear_attention.layers if meta.linear_attention else (False,) * len(kinds)) == linear


def parameters_of(model: torch.nn.Module) -> int:
    """Count as count_parameters does: tied matrices once, biases for the router's choice not at all."""
    named = model.named_parameters(remove_duplicate=True)
    return sum(one.numel() for name, one in named if "e_score_correction_bias" not in name)


@pytest.mark.parametrize("case", CASES)
def test_counted_parameters_are_those_of_the_model(case: str, tmp_path: Path) -> None:
    config, meta = saved(case, tmp_path)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.tie_weights()
    count = count_parameters(meta)
    assert count.total == parameters_of(model)
    inside = {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)}
    tables = sum(one.numel() for one in model.parameters() if id(one) in inside)
    if meta.layer_inputs is None and not meta.lm_head_bias:
        assert count.embedding == tables


@pytest.mark.parametrize("case", CASES)
def test_experts_are_in_the_layers_that_the_model_has_them_in(case: str, tmp_path: Path) -> None:
    config, meta = saved(case, tmp_path)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    has_experts = tuple(
        any("experts" in name and "shared" not in name for name, _ in layer.named_modules())
        for layer in model.model.layers
    )
    assert (meta.moe.layer_is_moe if meta.moe else (False,) * meta.num_layers) == has_experts


@pytest.mark.parametrize("case", CASES)
def test_all_linear_names_the_linear_modules_of_the_layers(case: str, tmp_path: Path) -> None:
    """Routers, gates of shared experts and packed experts are not linear modules in transformers 5 or are left out."""
    config, meta = saved(case, tmp_path)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    linear = {
        name.rsplit(".", 1)[-1]
        for name, one in model.model.layers.named_modules()
        if isinstance(one, torch.nn.Linear)
    }
    left_out = {
        "router",
        "proj",
        "wg",
        "gate",
        "shared_expert_gate",
        "per_layer_input_gate",
        "per_layer_projection",
    }
    packed = {
        "w1",
        "w2",
        "w3",
        "gate_up_proj",
        "down_proj",
        "gate_proj",
        "up_proj",
        "input_linear",
        "output_linear",
    }
    assert linear - left_out <= set(meta.target_modules)
    assert set(meta.target_modules) - linear <= (packed if meta.moe else set())


@pytest.mark.parametrize("case", CASES)
def test_facts_that_shapes_do_not_show_are_those_of_the_modules(case: str, tmp_path: Path) -> None:
    """Scale of the scores, epsilon and centre of the norms, windows, layers without rope, multipliers, soft caps."""
    config, meta = saved(case, tmp_path)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for number, layer in enumerate(model.model.layers):
        attention = vars(layer)["_modules"].get("self_attn")
        if attention is None:
            assert meta.linear_attention is not None and meta.linear_attention.layers[number]
            continue
        facts = vars(attention)
        head_dim = meta.layer_variation.head_dims[number] if meta.layer_variation else meta.head_dim
        assert facts["scaling"] == pytest.approx(meta.attention.scale or head_dim**-0.5, rel=1e-12)
        if "sliding_window" in facts and meta.family not in ("exaone4", "mistral", "mixtral"):
            window = meta.sliding_window[number] if meta.sliding_window else None
            assert (facts["sliding_window"] or None) == window
        if "use_rope" in facts:
            assert bool(facts["use_rope"]) == meta.rope.layers[number]
        assert facts.get("attn_logit_softcapping") == meta.attention.softcap or meta.family == "gemma3_text"
        assert vars(layer).get("residual_multiplier", 1.0) == meta.multipliers.residual
        assert ("sinks" in attention._parameters) == meta.attention.sinks
    final = model.model.norm
    assert {"eps", "variance_epsilon"} & set(vars(final)) and meta.norm_eps in vars(final).values()
    centre = 0.0 if meta.norm.zero_centered else 1.0
    assert torch.equal(final.weight, torch.full_like(final.weight, centre))
    scale = vars(model.model).get(
        "embedding_multiplier", vars(model.model.embed_tokens).get("scalar_embed_scale", 1.0)
    )
    assert scale == meta.multipliers.embedding
    assert vars(config).get("final_logit_softcapping") == meta.multipliers.logits_softcap


@pytest.mark.parametrize("case", CASES)
def test_projections_have_biases_where_the_facts_say_so(case: str, tmp_path: Path) -> None:
    config, meta = saved(case, tmp_path)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    names = {name for name, _ in model.named_parameters()}
    queries = "kv_a_proj_with_mqa" if meta.mla else "qkv_proj" if meta.family == "phi3" else "k_proj"
    up = {"phi3": "gate_up_proj", "glm4": "gate_up_proj", "starcoder2": "c_fc"}.get(meta.family, "up_proj")
    assert any(f"{queries}.bias" in name for name in names) == meta.qkv_bias
    assert any("o_proj.bias" in name for name in names) == meta.attention_out_bias
    assert any(f"{up}.bias" in name and ".experts." not in name for name in names) == meta.mlp_bias
    assert ("lm_head.bias" in names) == meta.lm_head_bias
