"""Megatron adapters and PEFT folders: the same logits as peft computes, in every layout, also with different A matrices."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from megaswift.config.tuner import TunerConfig
from megaswift.converters.adapters import load_peft, save_peft
from megaswift.converters.export import export_hf
from megaswift.converters.peft_folder import read_adapter
from megaswift.errors import WeightsError
from megaswift.metadata.read import get_model_meta
from megaswift.parallel.layout import Layout
from tests.harness.adapters import (
    DENSE,
    LAYOUTS,
    TOLERANCE,
    base_model,
    build,
    check_equal,
    from_peft,
    logits,
    make_peft,
    trained,
)
from tests.harness.distributed import run_distributed
from tests.harness.tiny import save_tiny


@pytest.mark.ranks(4)
@pytest.mark.parametrize("layout", ["one", "tp2", "tp4", "tp2_pp2"])
@pytest.mark.parametrize(("name", "use_dora"), [("llama-tied", False), ("qwen2", False), ("qwen2", True)])
def test_adapter_of_peft_comes_back_bit_identical_and_merges_to_the_same_logits(
    tmp_path: Path, name: str, use_dora: bool, layout: str
) -> None:
    folder = save_tiny(name, tmp_path / "model")
    expected = make_peft(
        folder, tmp_path / "peft", r=3, lora_alpha=5, target_modules=DENSE, use_dora=use_dora
    )
    found = run_distributed(
        from_peft, LAYOUTS[layout].world, folder, tmp_path / "peft", tmp_path, LAYOUTS[layout]
    )
    assert found[0]["decoder.layers.3.self_attention.linear_qkv"] == 9
    assert found[0]["decoder.layers.0.mlp.linear_fc1"] == 6
    check_equal(tmp_path / "peft", tmp_path / "adapter")
    assert (logits(base_model(tmp_path / "merged")) - expected).abs().max() < TOLERANCE
    reopened = PeftModel.from_pretrained(base_model(folder), tmp_path / "adapter")
    assert torch.equal(logits(reopened), expected)


@pytest.mark.ranks(2)
def test_heads_that_tp_does_not_divide_keep_their_adapters(tmp_path: Path) -> None:
    folder = save_tiny(
        "llama", tmp_path / "model", hidden_size=72, num_attention_heads=9, num_key_value_heads=3
    )
    expected = make_peft(folder, tmp_path / "peft", r=2, lora_alpha=4, target_modules=DENSE)
    run_distributed(from_peft, 4, folder, tmp_path / "peft", tmp_path, Layout(world=4, tp=4))
    check_equal(tmp_path / "peft", tmp_path / "adapter")
    assert (logits(base_model(tmp_path / "merged")) - expected).abs().max() < TOLERANCE


@pytest.mark.ranks(2)
@pytest.mark.parametrize(
    "settings",
    [
        {"r": 4, "lora_alpha": 6, "use_rslora": True, "target_modules": DENSE},
        {"r": 4, "lora_alpha": 6, "use_dora": True, "target_modules": DENSE},
        {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"]},
        {"r": 4, "lora_alpha": 6, "target_modules": ["down_proj"], "layers_to_transform": [1, 3]},
        {
            "r": 4,
            "lora_alpha": 6,
            "target_modules": DENSE,
            "rank_pattern": {"v_proj": 2},
            "alpha_pattern": {"layers.1.mlp.up_proj": 20},
        },
    ],
    ids=["rslora", "dora", "q_and_v_only", "some_layers", "patterns"],
)
def test_settings_of_peft_give_the_same_function(tmp_path: Path, settings: dict[str, Any]) -> None:
    folder = save_tiny("llama-tied", tmp_path / "model")
    expected = make_peft(folder, tmp_path / "peft", **settings)
    run_distributed(from_peft, 2, folder, tmp_path / "peft", tmp_path, LAYOUTS["tp2"])
    assert (logits(base_model(tmp_path / "merged")) - expected).abs().max() < TOLERANCE
    reopened = PeftModel.from_pretrained(base_model(folder), tmp_path / "adapter")
    assert (logits(reopened) - expected).abs().max() < TOLERANCE


@pytest.mark.ranks(2)
@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("name", ["llama-tied", "qwen3", "gemma4_text"])
def test_adapter_with_a_shared_a_opens_in_peft(tmp_path: Path, name: str, use_rslora: bool) -> None:
    folder = save_tiny(name, tmp_path / "model")
    tuner = TunerConfig(tuner_type="lora", lora_rank=3, lora_alpha=7, use_rslora=use_rslora)
    run_distributed(trained, 1, folder, tmp_path, LAYOUTS["one"], tuner)
    expected = logits(base_model(tmp_path / "merged"))
    opened = PeftModel.from_pretrained(base_model(folder), tmp_path / "adapter")
    assert (logits(opened) - expected).abs().max() < TOLERANCE
    assert (expected - logits(base_model(folder))).abs().max() > 0.01  # the adapter does something
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    prefix = "base_model.model.model.layers.2.self_attn"
    assert torch.equal(tensors[f"{prefix}.q_proj.lora_A.weight"], tensors[f"{prefix}.v_proj.lora_A.weight"])
    found = run_distributed(from_peft, 2, folder, tmp_path / "adapter", tmp_path / "again", LAYOUTS["tp2"])
    assert found[0] == {}
    check_equal(tmp_path / "adapter", tmp_path / "again" / "adapter")


def mix(rank: int, world_size: int, folder: Path, adapter_folder: Path, output: Path, layout: Layout) -> None:
    """Load stacked adapters and fill the zero blocks of B, as training does."""
    meta = get_model_meta(folder)
    adapter = read_adapter(adapter_folder, meta)
    tuner = adapter.adopt(TunerConfig(tuner_type="lora"), meta)
    chunks = build(rank, folder, layout, tuner, adapter.ranks(meta))
    load_peft(chunks, meta, layout, rank, adapter)
    if rank == 0:  # one element on one rank is enough for all to change the file
        weight = chunks[0].decoder.layers[0].self_attention.linear_qkv.lora_b.weight
        weight.data[-1, 0] = 0.5
    save_peft(chunks, meta, layout, rank, output / "adapter", tuner=tuner, dtype="float32")
    export_hf(chunks, meta, layout, rank, output / "merged", dtype="float32", merge_lora=True)


@pytest.mark.ranks(2)
@pytest.mark.parametrize("use_rslora", [False, True])
def test_stacked_adapter_that_has_trained_is_written_with_its_whole_rank(
    tmp_path: Path, use_rslora: bool
) -> None:
    folder = save_tiny("llama-tied", tmp_path / "model")
    make_peft(folder, tmp_path / "peft", r=2, lora_alpha=4, use_rslora=use_rslora, target_modules=DENSE)
    run_distributed(mix, 2, folder, tmp_path / "peft", tmp_path, LAYOUTS["tp2"])
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["rank_pattern"] == {f"model.layers.0.self_attn.{name}_proj": 6 for name in "qkv"}
    opened = PeftModel.from_pretrained(base_model(folder), tmp_path / "adapter")
    assert (logits(opened) - logits(base_model(tmp_path / "merged"))).abs().max() < TOLERANCE


@pytest.mark.ranks(4)
@pytest.mark.parametrize("layout", ["one", "tp2_ep2_etp2"])
@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral"])
def test_packed_experts_of_peft_are_read(tmp_path: Path, name: str, layout: str) -> None:
    folder = save_tiny(name, tmp_path / "model")
    targets = {
        "target_modules": ["q_proj"],
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    }
    expected = make_peft(folder, tmp_path / "peft", r=2, lora_alpha=4, **targets)
    run_distributed(from_peft, LAYOUTS[layout].world, folder, tmp_path / "peft", tmp_path, LAYOUTS[layout])
    assert (logits(base_model(tmp_path / "merged")) - expected).abs().max() < TOLERANCE


@pytest.mark.ranks(1)
@pytest.mark.parametrize(
    ("name", "expression"),
    [("qwen3_moe", None), ("mixtral", None), ("mixtral", r".*layers\.2\..*experts\.\d+\.w[123]")],
)
def test_adapters_of_experts_open_in_peft(tmp_path: Path, name: str, expression: str | None) -> None:
    folder = save_tiny(name, tmp_path / "model")
    tuner = TunerConfig(tuner_type="lora", lora_rank=2, lora_alpha=6, target_regex=expression)
    run_distributed(trained, 1, folder, tmp_path, LAYOUTS["one"], tuner)
    opened = PeftModel.from_pretrained(base_model(folder), tmp_path / "adapter")
    assert (logits(opened) - logits(base_model(tmp_path / "merged"))).abs().max() < TOLERANCE


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_modules": ["q_proj", "lm_head"]}, r"lm_head\.lora_A"),
        ({"target_modules": ["q_proj"], "bias": "all"}, "bias='all'"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["act_fn"]}, "modules_to_save=act_fn in"),
    ],
)
def test_adapters_that_megatron_cannot_hold_are_refused(
    tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    folder = save_tiny("llama", tmp_path / "model")
    make_peft(folder, tmp_path / "peft", r=2, lora_alpha=4, **settings)
    with pytest.raises(WeightsError, match=message):
        read_adapter(tmp_path / "peft", get_model_meta(folder))


def test_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "model")
    make_peft(folder, tmp_path / "peft", r=2, lora_alpha=4, target_modules=["q_proj"])
    other = save_tiny("llama", tmp_path / "other", hidden_size=32)
    with pytest.raises(WeightsError, match="belongs to another model"):
        read_adapter(tmp_path / "peft", get_model_meta(other))


@pytest.mark.parametrize("damage", ["no weights", "no config", "not LoRA"])
def test_incomplete_adapter_is_refused(tmp_path: Path, damage: str) -> None:
    folder = save_tiny("llama", tmp_path / "model")
    make_peft(folder, tmp_path / "peft", r=2, lora_alpha=4, target_modules=["q_proj"])
    if damage == "no weights":
        (tmp_path / "peft" / "adapter_model.safetensors").unlink()
    elif damage == "no config":
        (tmp_path / "peft" / "adapter_config.json").unlink()
    else:
        (tmp_path / "peft" / "adapter_config.json").write_text(
            '{"peft_type": "IA3", "r": 2, "lora_alpha": 2}'
        )
    with pytest.raises(WeightsError, match=r"adapter_model\.safetensors|adapter_config\.json"):
        read_adapter(tmp_path / "peft", get_model_meta(folder))


def test_half_of_a_pair_is_refused(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "model")
    make_peft(folder, tmp_path / "peft", r=2, lora_alpha=4, target_modules=["q_proj"])
    path = tmp_path / "peft" / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors.pop("base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight")
    save_file(tensors, path)
    with pytest.raises(WeightsError, match=r"layers\.1\.self_attn\.q_proj\.lora_A"):
        read_adapter(tmp_path / "peft", get_model_meta(folder))
