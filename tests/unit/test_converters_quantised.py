"""Quantised folders read as the bfloat16 ones that they stand for, in every offline path, and FP8 folders are written."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from megaswift.cli.main import main
from megaswift.converters.check import check_files
from megaswift.converters.quantised import read_model
from megaswift.errors import WeightsError
from megaswift.kernels.block_fp8 import reference
from megaswift.metadata.read import get_model_meta
from tests.harness.quantised import FP8_CONFIG, edit_config, save_fp8, save_mxfp4, tensors_of
from tests.harness.tiny import save_tiny

ODD = {"hidden_size": 192, "intermediate_size": 200}  # neither is a multiple of a block
EVEN: dict[str, Any] = {
    "hidden_size": 128, "intermediate_size": 256, "head_dim": 64, "num_hidden_layers": 2,
}  # fmt: skip
EVEN_EXPERTS = EVEN | {"moe_intermediate_size": 128}
EVEN_LATENTS = EVEN_EXPERTS | {
    "qk_nope_head_dim": 48, "qk_rope_head_dim": 16, "v_head_dim": 64, "head_dim": 16, "q_lora_rank": 128, "kv_lora_rank": 112,
}  # fmt: skip
EVEN_SIZES = {"qwen3": EVEN, "qwen3_moe": EVEN_EXPERTS, "deepseek_v3": EVEN_LATENTS}


def convert(*argv: str | Path) -> None:
    assert main(["convert", *map(str, argv)]) == 0


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "deepseek_v3"])
def test_fp8_folder_becomes_a_checkpoint_and_comes_back_in_bfloat16(tmp_path: Path, name: str) -> None:
    expected = save_fp8(name, tmp_path / "in", **ODD)
    convert("--model", tmp_path / "in", "--to", "mcore", "--output_dir", tmp_path / "mcore")
    convert(
        "--model",
        tmp_path / "mcore",
        "--to",
        "hf",
        "--output_dir",
        tmp_path / "hf",
        "--max_shard_size",
        "200KB",
    )
    assert_same(tensors_of(tmp_path / "hf"), expected)
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert "quantization_config" not in config
    summed = json.loads((tmp_path / "mcore" / "conversion.json").read_text())["tensors"]
    assert summed.keys() == tensors_of(tmp_path / "in").keys()  # values and scales, as they lie in the file


def test_mxfp4_folder_becomes_a_checkpoint_and_comes_back_in_bfloat16(tmp_path: Path) -> None:
    expected = save_mxfp4(tmp_path / "in")
    convert("--model", tmp_path / "in", "--to", "mcore", "--output_dir", tmp_path / "mcore")
    convert("--model", tmp_path / "mcore", "--to", "hf", "--output_dir", tmp_path / "hf")
    assert_same(tensors_of(tmp_path / "hf"), expected)
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(info.values()), info


@pytest.mark.parametrize(
    "name", ["gpt_oss", "llama4_text", "granitemoe", "minimax_m2", "glm4_moe", "deepseek_v2"]
)
def test_every_kind_of_expert_and_latent_goes_there_and_back(tmp_path: Path, name: str) -> None:
    save_tiny(name, tmp_path / "in", dtype=torch.bfloat16)
    convert(
        "--model",
        tmp_path / "in",
        "--to",
        "mcore",
        "--output_dir",
        tmp_path / "mcore",
        "--max_shard_size",
        "100KB",
    )
    convert(
        "--model",
        tmp_path / "mcore",
        "--to",
        "hf",
        "--output_dir",
        tmp_path / "hf",
        "--max_shard_size",
        "150KB",
    )
    assert_same(tensors_of(tmp_path / "hf"), tensors_of(tmp_path / "in"))
    sums = [
        json.loads((tmp_path / side / "conversion.json").read_text())["tensors"] for side in ("mcore", "hf")
    ]
    assert sums[0] == sums[1]


@pytest.mark.parametrize("name", EVEN_SIZES)
def test_transformers_opens_what_is_written_in_fp8(tmp_path: Path, name: str) -> None:
    save_tiny(name, tmp_path / "in", dtype=torch.bfloat16, **EVEN_SIZES[name])
    convert("--model", tmp_path / "in", "--to", "mcore", "--output_dir", tmp_path / "mcore")
    convert(
        "--model", tmp_path / "mcore", "--to", "hf", "--output_dir", tmp_path / "hf", "--quant_method", "fp8",
        "--max_shard_size", "100KB",
    )  # fmt: skip
    before, after = tensors_of(tmp_path / "in"), tensors_of(tmp_path / "hf")
    quantised = {key for key, tensor in after.items() if tensor.dtype == torch.float8_e4m3fn}
    assert "model.layers.1.self_attn.o_proj.weight" in quantised and len(quantised) > 10
    assert not any(
        word in key for key in quantised for word in ("embed", "lm_head", "norm", "mlp.gate.weight")
    )
    if name == "deepseek_v3":  # 112 + 16 rows are a block, kv_b_proj's 112 columns are none
        assert "model.layers.0.self_attn.kv_a_proj_with_mqa.weight" in quantised
        assert "model.layers.0.self_attn.kv_b_proj.weight" not in quantised
    expected = dict(before)
    for key in quantised:
        values, scales = reference.quantise(
            before[key], block_rows=128, block_columns=128, dtype=torch.float8_e4m3fn, power_of_two=False
        )
        assert torch.equal(after[key].view(torch.uint8), values.view(torch.uint8)), key
        assert torch.equal(after[f"{key}_scale_inv"], scales), key
        expected[key] = reference.dequantise(
            values, scales, block_rows=128, block_columns=128, dtype=torch.bfloat16
        )
    # transformers, which dequantises on a CPU, sees exactly those numbers; so do we.
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(info.values()), info
    plain = tmp_path / "plain"
    save_tiny(name, plain, dtype=torch.bfloat16, **EVEN_SIZES[name])
    save_file(expected, plain / "model.safetensors", metadata={"format": "pt"})
    reopened = AutoModelForCausalLM.from_pretrained(plain)
    for (key, ours), theirs in zip(model.named_parameters(), reopened.parameters(), strict=True):
        assert torch.equal(ours, theirs), key
    convert("--model", tmp_path / "hf", "--to", "mcore", "--output_dir", tmp_path / "again")
    convert("--model", tmp_path / "again", "--to", "hf", "--output_dir", tmp_path / "back")
    assert_same(tensors_of(tmp_path / "back"), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e8m0fnu])
def test_scales_of_other_dtypes_are_read(tmp_path: Path, dtype: torch.dtype) -> None:
    expected = save_fp8("llama", tmp_path / "in", scale_dtype=dtype)
    convert("--model", tmp_path / "in", "--to", "mcore", "--output_dir", tmp_path / "mcore")
    convert("--model", tmp_path / "mcore", "--to", "hf", "--output_dir", tmp_path / "hf")
    assert_same(tensors_of(tmp_path / "hf"), expected)


def test_one_scale_for_a_whole_weight_is_read(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "in", dtype=torch.bfloat16)
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.gate_proj.weight"
    values = (tensors[name].float() / 0.25).to(torch.float8_e4m3fn)
    changed = {
        name: values,
        f"{name}_scale_inv": torch.tensor(0.25),
        name.replace("weight", "activation_scale"): torch.tensor(3.0),
    }
    save_file(tensors | changed, folder / "model.safetensors")
    edit_config(
        folder, quantization_config=FP8_CONFIG | {"weight_block_size": None, "activation_scheme": "static"}
    )
    convert("--model", folder, "--to", "mcore", "--output_dir", tmp_path / "mcore")
    convert("--model", tmp_path / "mcore", "--to", "hf", "--output_dir", tmp_path / "hf")
    assert_same(tensors_of(tmp_path / "hf"), tensors | {name: (values.float() * 0.25).bfloat16()})


def test_headers_alone_certify_a_quantised_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_mxfp4(tmp_path / "in")
    convert("--model", tmp_path / "in", "--dry_run", "--ep", "2")
    assert "every element of every tensor is held by exactly one shard" in capsys.readouterr().out


def break_scales(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.0.mlp.up_proj.weight_scale_inv"] = torch.ones(3, 1)


def drop_scales(tensors: dict[str, torch.Tensor]) -> None:
    tensors.pop("model.layers.0.mlp.up_proj.weight_scale_inv")


def drop_values(tensors: dict[str, torch.Tensor]) -> None:
    tensors.pop("model.layers.0.mlp.up_proj.weight")


@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        (break_scales, {}, r"scales .*up_proj.weight_scale_inv are \[3, 1\] of F32 where \[1, 1\] are due"),
        (drop_scales, {}, "up_proj.weight_scale_inv are missing"),
        (
            drop_values,
            {},
            "missing: model.layers.0.mlp.up_proj.weight; not claimed .*up_proj.weight_scale_inv",
        ),
        (lambda tensors: None, {"weight_block_size": [64, 64]}, r"weight_block_size=\[64, 64\]"),
        (lambda tensors: None, {"quant_method": "awq"}, "quant_method=awq"),
    ],
)
def test_quantised_folder_that_does_not_fit_together_is_refused(
    tmp_path: Path, change: Any, config: dict[str, Any], message: str
) -> None:
    save_fp8("llama", tmp_path / "in")
    tensors = load_file(tmp_path / "in" / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "in" / "model.safetensors")
    edit_config(tmp_path / "in", quantization_config=FP8_CONFIG | config)
    meta = get_model_meta(tmp_path / "in")
    with pytest.raises(WeightsError, match=message):
        check_files(meta, read_model(meta, tmp_path / "in"))


def test_mxfp4_without_its_scales_is_refused(tmp_path: Path) -> None:
    save_mxfp4(tmp_path / "in")
    tensors = load_file(tmp_path / "in" / "model.safetensors")
    tensors.pop("model.layers.1.mlp.experts.down_proj_scales")
    save_file(tensors, tmp_path / "in" / "model.safetensors")
    with pytest.raises(WeightsError, match="down_proj_scales are missing"):
        read_model(get_model_meta(tmp_path / "in"), tmp_path / "in")


@pytest.mark.parametrize(
    ("name", "to", "message"),
    [
        ("qwen3", "mcore", "quant_method is for --to hf"),
        ("qwen3", "hf", "no linear is a multiple of 128"),
        ("gpt_oss", "hf", "pack all experts into one tensor"),
    ],
)
def test_fp8_that_cannot_be_written_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, to: str, message: str
) -> None:
    source = save_tiny(name, tmp_path / "in", dtype=torch.bfloat16)
    if to == "hf":
        convert("--model", source, "--to", "mcore", "--output_dir", tmp_path / "mcore")
        source = tmp_path / "mcore"
    argv = [
        "convert",
        "--model",
        str(source),
        "--to",
        to,
        "--output_dir",
        str(tmp_path / "out"),
        "--quant_method",
        "fp8",
    ]
    assert main(argv) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()
