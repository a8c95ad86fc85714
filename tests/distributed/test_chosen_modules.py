"""Modules that LoRA is told of: those that an expression matches, and those that train whole beside adapters, in folders of peft."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from megaswift.config.tuner import TunerConfig
from megaswift.converters.lora_targets import adapted_modules, whole_tensors
from megaswift.converters.peft_folder import read_adapter
from megaswift.errors import ConfigError, WeightsError
from megaswift.metadata.read import get_model_meta
from megaswift.parallel.layout import Layout
from tests.harness.adapters import (
    LAYOUTS,
    TOLERANCE,
    base_model,
    check_equal,
    from_peft,
    logits,
    make_peft,
    trained,
)
from tests.harness.distributed import run_distributed
from tests.harness.tiny import save_tiny


@pytest.mark.ranks(4)
@pytest.mark.parametrize("layout", ["tp2", "tp2_pp2"])
@pytest.mark.parametrize(
    ("name", "modules", "files"),
    [
        ("llama", ["embed_tokens", "lm_head"], {"model.embed_tokens.weight", "lm_head.weight"}),
        ("llama-tied", ["lm_head", "model.norm"], {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"}),
        ("qwen2", ["1.self_attn.o_proj", "1.input_layernorm"], {"model.layers.1.self_attn.o_proj.weight", "model.layers.1.input_layernorm.weight"}),
    ],
)  # fmt: skip
def test_modules_that_train_whole_lie_in_the_folder_and_come_back(
    tmp_path: Path, name: str, modules: list[str], files: set[str], layout: str
) -> None:
    folder = save_tiny(name, tmp_path / "model")
    cut = ["q_proj", "k_proj", "v_proj"]  # their B is cut by tp: every rank may draw its own
    tuner = TunerConfig(tuner_type="lora", lora_rank=3, target_modules=cut, modules_to_save=modules)
    run_distributed(trained, LAYOUTS[layout].world, folder, tmp_path, LAYOUTS[layout], tuner)
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    whole = {tensor.removeprefix("base_model.model.") for tensor in tensors if "lora_" not in tensor}
    assert whole == files
    base = load_file(folder / "model.safetensors")
    for tensor in files & base.keys():
        assert torch.equal(tensors[f"base_model.model.{tensor}"], 1.25 * base[tensor])
    expected = logits(base_model(tmp_path / "merged"))
    opened = PeftModel.from_pretrained(base_model(folder), tmp_path / "adapter")
    assert (logits(opened) - expected).abs().max() < TOLERANCE
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert set(config["modules_to_save"]) == {tensor.removesuffix(".weight") for tensor in files}
    again = tmp_path / "again"
    run_distributed(from_peft, LAYOUTS[layout].world, folder, tmp_path / "adapter", again, LAYOUTS[layout])
    check_equal(tmp_path / "adapter", again / "adapter")
    assert torch.equal(logits(base_model(again / "merged")), expected)


@pytest.mark.ranks(2)
def test_whole_modules_of_peft_are_read(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "model")
    settings = {
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["gate_proj", "up_proj"],
        "modules_to_save": ["lm_head", "o_proj"],
    }
    torch.manual_seed(0)
    model = get_peft_model(
        base_model(folder), LoraConfig(init_lora_weights=False, task_type="CAUSAL_LM", **settings)
    )
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name:
            parameter.data *= 1.5
    model.save_pretrained(tmp_path / "peft")
    run_distributed(from_peft, 2, folder, tmp_path / "peft", tmp_path, LAYOUTS["tp2"])
    assert (logits(base_model(tmp_path / "merged")) - logits(model)).abs().max() < TOLERANCE
    check_equal(tmp_path / "peft", tmp_path / "adapter")


def test_a_tied_matrix_that_peft_has_parted_is_refused(tmp_path: Path) -> None:
    folder = save_tiny("llama-tied", tmp_path / "model")
    make_peft(
        folder,
        tmp_path / "peft",
        r=2,
        lora_alpha=4,
        target_modules=["q_proj"],
        modules_to_save=["embed_tokens"],
    )
    with pytest.raises(WeightsError, match="apart, and they are one matrix"):
        read_adapter(tmp_path / "peft", get_model_meta(folder))


@pytest.mark.parametrize(
    ("model", "modules", "message"),
    [
        ("llama", ["embed_token"], "modules_to_save=embed_token is no module of llama. Did you mean embed_tokens?"),
        ("llama", ["down_proj"], "which get an adapter too"),
        ("llama", ["q_proj"], "without model.layers.0.self_attn.k_proj.weight, model.layers.0.self_attn.v_proj.weight"),
        ("qwen3_moe", ["mlp.gate"], "transformers packs experts under other names"),
    ],
)  # fmt: skip
def test_modules_that_cannot_train_whole_are_refused(
    tmp_path: Path, model: str, modules: list[str], message: str
) -> None:
    meta = get_model_meta(save_tiny(model, tmp_path))
    tuner = TunerConfig(tuner_type="lora", target_modules=["down_proj"], modules_to_save=modules)
    with pytest.raises(ConfigError) as refused:
        whole_tensors(meta, tuner)
    assert message in str(refused.value)


SOME = r"model\.layers\.(0\.self_attn\.o|[13]\.mlp\.(gate|up))_proj"


@pytest.mark.ranks(2)
def test_an_adapter_of_some_modules_opens_in_peft(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "model")
    tuner = TunerConfig(tuner_type="lora", lora_rank=3, lora_alpha=7, target_regex=SOME)
    run_distributed(trained, 2, folder, tmp_path, Layout(world=2, pp=2), tuner)
    names = {
        "model.layers.0.self_attn.o_proj",
        *(f"model.layers.{layer}.mlp.{name}_proj" for layer in (1, 3) for name in ("gate", "up")),
    }
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {name.removeprefix("base_model.model.").rpartition(".lora_")[0] for name in tensors} == names
    assert (
        set(json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["target_modules"]) == names
    )
    opened = PeftModel.from_pretrained(base_model(folder), tmp_path / "adapter")
    assert {name.split(".lora_A")[0] for name, _ in opened.named_modules() if name.endswith("lora_A")} == {
        f"base_model.model.{name}" for name in names
    }
    expected = logits(base_model(tmp_path / "merged"))
    assert (logits(opened) - expected).abs().max() < TOLERANCE
    assert (expected - logits(base_model(folder))).abs().max() > 0.01
    run_distributed(from_peft, 1, folder, tmp_path / "adapter", tmp_path / "again", LAYOUTS["one"])
    assert (logits(base_model(tmp_path / "again" / "merged")) - expected).abs().max() < TOLERANCE


@pytest.mark.parametrize(
    ("model", "expression", "message"),
    [
        (
            "llama",
            r"layers\.0\.mlp\.up_proj",
            "matches no module of llama; it must match the whole name, such as model.layers.0",
        ),
        (
            "llama",
            r".*\.q_proj",
            "matches model.layers.0.self_attn.q_proj without model.layers.0.self_attn.k_proj",
        ),
        ("llama", r"lm_head|.*down_proj", "matches lm_head, which can have no adapter"),
        ("mixtral", r".*layers\.1.*experts\.0\..*", "or they are experts of one layer"),
    ],
)
def test_an_expression_that_names_no_whole_module_is_refused(
    tmp_path: Path, model: str, expression: str, message: str
) -> None:
    meta = get_model_meta(save_tiny(model, tmp_path))
    with pytest.raises(ConfigError) as refused:
        adapted_modules(meta, TunerConfig(tuner_type="lora", target_regex=expression))
    assert message in str(refused.value)
