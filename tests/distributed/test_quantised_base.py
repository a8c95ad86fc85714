"""Adapters beside a base in four bits: the numbers of bitsandbytes, under every layout, and what is written of it."""

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from safetensors.torch import load_file, save_file

from megaswift.converters.export import export_hf
from tests.harness.distributed import run_distributed
from tests.harness.tiny import save_tiny
from tests.harness.training import Case, Curve, curves, prepared, steps, temporary_folder

# Every block of 64 lies in one row of every shard of tp2, so that blocks are the same under every layout.
WIDE = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
MODELS: dict[str, dict[str, Any]] = {"llama": WIDE, "qwen3_moe": {**WIDE, "moe_intermediate_size": 128}}
FOUR_BITS = {"quant_method": "bnb", "quant_bits": 4, "bnb_4bit_use_double_quant": False}
LAYOUTS: dict[str, dict[str, tuple[int, dict[str, Any]]]] = {
    "llama": {
        "dp2": (2, {}),
        "tp2 sp": (2, {"tp": 2, "sequence_parallel": True}),
        "pp2": (2, {"pp": 2}),
        "tp2 pp2": (4, {"tp": 2, "pp": 2}),
    },
    "qwen3_moe": {"ep2": (2, {"ep": 2}), "tp2 etp2": (2, {"tp": 2, "etp": 2})},
}


def case(name: str, parallel: dict[str, Any], **tuner: Any) -> Case:
    return Case(
        name=name,
        settings={
            "tuner": {"tuner_type": "lora", "lora_dropout": 0.0, **tuner},
            "optimizer": {"lr": 1e-2, "adam_eps": 1e-3},
            "parallel": parallel,
            "training": {"train_iters": 6},
        },
    )


@cache
def folder_of(model: str) -> Path:
    return save_tiny(model, temporary_folder(), **MODELS[model])


@cache
def quantised_curves(model: str, ranks: int) -> dict[str, Curve]:
    layouts = {"one": (1, {}), **LAYOUTS[model]}
    cases = [
        case(name, parallel, **FOUR_BITS) for name, (world, parallel) in layouts.items() if world == ranks
    ]
    return run_distributed(curves, ranks, folder_of(model), cases)[0]


def round_trip(weight: torch.Tensor, *, double: bool) -> torch.Tensor:
    codes, state = quantize_4bit(weight, blocksize=64, compress_statistics=double, quant_type="nf4")
    return dequantize_4bit(codes, state)


def dequantised(folder: Path, output: Path) -> Path:
    """Write the model whose matrices are what bitsandbytes makes of each tensor of the file."""
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("_proj.weight"):
            tensors[name] = round_trip(tensor, double=False)
    output.mkdir()
    (output / "config.json").write_bytes((folder / "config.json").read_bytes())
    save_file(tensors, output / "model.safetensors", metadata={"format": "pt"})
    return output


def test_the_base_is_what_bitsandbytes_makes_of_the_file(tmp_path: Path) -> None:
    folder = folder_of("llama")
    plain = run_distributed(curves, 1, dequantised(folder, tmp_path / "base"), [case("one", {})])[0]["one"]
    np.testing.assert_allclose(quantised_curves("llama", 1)["one"], plain, rtol=1e-6)
    whole = run_distributed(curves, 1, folder, [case("one", {})])[0]["one"]
    assert abs(whole[0][0] - plain[0][0]) > 1e-4, (
        "quantising changes this model, or equal curves would say little"
    )


@pytest.mark.ranks(4)
@pytest.mark.parametrize(("model", "layout"), [(model, name) for model in LAYOUTS for name in LAYOUTS[model]])
def test_a_layout_trains_like_one_rank(model: str, layout: str) -> None:
    expected = quantised_curves(model, 1)["one"]
    assert expected[-1][0] < 0.95 * expected[0][0], "the run must learn"
    found = quantised_curves(model, LAYOUTS[model][layout][0])[layout]
    for (loss, norm), (one_loss, one_norm) in zip(found, expected, strict=True):
        assert loss == pytest.approx(one_loss, rel=1e-5)
        assert norm == pytest.approx(one_norm, rel=1e-4)


def train_and_export(rank: int, world_size: int, folder: Path, output: Path) -> tuple[int, int]:
    """Export after two steps; return the bytes of the decoder's base, and how many they would be in float32."""
    doubled = {**FOUR_BITS, "bnb_4bit_use_double_quant": True, "use_dora": True}
    with prepared(folder, case("one", {"tp": 2}, **doubled)) as trained:
        base = [
            module.weight
            for chunk in trained.engine.chunks
            for module in chunk.module.decoder.modules()
            if hasattr(module, "product")
        ]
        held = sum(weight.numel() * weight.element_size() for weight in base)
        steps(trained, 0, 2)
        chunks = [chunk.module for chunk in trained.engine.chunks]
        args = chunks, trained.meta, trained.layout, rank
        export_hf(*args, output / "base", dtype="float32")
        export_hf(*args, output / "merged", dtype="float32", merge_lora=True)
        full = sum(module.product.shape.numel() * 4 for chunk in chunks for module in chunk.decoder.modules() if hasattr(module, "product"))  # fmt: skip
    return held, full


@pytest.mark.ranks(2)
def test_exports_hold_the_base_that_was_trained_beside(tmp_path: Path) -> None:
    folder = folder_of("llama")
    held, full = run_distributed(train_and_export, 2, folder, tmp_path)[0]
    assert held == full // 8
    before, base, merged = (
        load_file(one / "model.safetensors") for one in (folder, tmp_path / "base", tmp_path / "merged")
    )
    for name, weight in before.items():
        if not name.endswith("_proj.weight"):
            assert torch.equal(base[name], weight), name
            continue
        # Scales of scales belong to a rank's shard of a fused matrix: at most a step of NF4 from those of the whole tensor.
        error, usual = (base[name] - weight).abs(), (round_trip(weight, double=True) - weight).abs()
        assert 0 < error.mean() < 1.05 * usual.mean(), name
        assert not torch.equal(merged[name], base[name]), name
