"""Adapters beside a base in four bits: the numbers of bitsandbytes, LoftQ's start, every layout, and what is written of them."""

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.loftq_utils import _low_rank_decomposition
from safetensors.torch import load_file, save_file

from megaswift.config.tuner import TunerConfig
from megaswift.converters.adapters import save_peft
from megaswift.converters.export import export_hf
from megaswift.metadata.read import get_model_meta
from megaswift.parallel.layout import Layout
from tests.harness.adapters import base_model, build, check_start, logits, start, trained
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
def quantised_curves(model: str, ranks: int, how: str = "true") -> dict[str, Curve]:
    layouts = {"one": (1, {}), **LAYOUTS[model]}
    cases = [
        case(name, parallel, init_weights=how, **FOUR_BITS)
        for name, (world, parallel) in layouts.items()
        if world == ranks
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
@pytest.mark.parametrize("how", ["true", "loftq", "lora-ga"])
@pytest.mark.parametrize(("model", "layout"), [(model, name) for model in LAYOUTS for name in LAYOUTS[model]])
def test_a_layout_trains_like_one_rank(model: str, layout: str, how: str) -> None:
    expected = quantised_curves(model, 1, how)["one"]
    assert expected[-1][0] < 0.95 * expected[0][0], "the run must learn"
    found = quantised_curves(model, LAYOUTS[model][layout][0], how)[layout]
    # Vectors of close singular values differ by 1e-4 between layouts, and so little grows: 1e-8, then ten times more every other step.
    steps = 3 if how == "lora-ga" else len(expected)
    for (loss, norm), (one_loss, one_norm) in zip(found[:steps], expected[:steps], strict=True):
        assert loss == pytest.approx(one_loss, rel=1e-5)
        assert norm == pytest.approx(one_norm, rel=1e-4)


LOFTQ = TunerConfig(tuner_type="lora", lora_rank=4, lora_dropout=0.0, init_weights="loftq", **FOUR_BITS)


def test_the_start_of_loftq_and_its_gradients_are_those_of_pefts_decomposition(tmp_path: Path) -> None:
    folder = folder_of("llama")
    targets = ["o_proj", "down_proj"]
    # The paper has no scale, and peft does not divide by its own: alpha is the rank, which makes it 1.
    tuner = replace(LOFTQ, lora_alpha=4, target_modules=targets)
    settings = LoraConfig(init_lora_weights=False, r=4, lora_alpha=4, target_modules=targets)
    model = get_peft_model(base_model(dequantised(folder, tmp_path / "base")), settings)
    for name, weight in base_model(folder).named_parameters():
        if name.removesuffix(".weight").endswith(tuple(targets)):
            parts = _low_rank_decomposition(weight.detach() - round_trip(weight.detach(), double=False), 4)
            linear = model.get_submodule(f"base_model.model.{name.removesuffix('.weight')}")
            linear.lora_A["default"].weight.data = parts["R"]
            linear.lora_B["default"].weight.data = parts["L"]
    [found] = run_distributed(start, 1, folder, tuner)
    torch.testing.assert_close(found["logits"][0], logits(model), rtol=0, atol=1e-5)
    # Singular values of this noise lie close, so that the last bits of a decomposition move its vectors further.
    check_start(found, model, tolerance=1e-4)


def save_start(rank: int, world_size: int, folder: Path, output: Path, layout: Layout) -> None:
    """Write the adapter as it is before the first step."""
    chunks = build(rank, folder, layout, LOFTQ)
    save_peft(chunks, get_model_meta(folder), layout, rank, output, tuner=LOFTQ, dtype="float32")


@pytest.mark.ranks(2)
@pytest.mark.parametrize("layout", [Layout(), Layout(world=2, tp=2)], ids=["one", "tp2"])
def test_loftq_starts_from_the_best_approximation_of_what_quantising_loses(
    tmp_path: Path, layout: Layout
) -> None:
    folder, output = folder_of("llama"), tmp_path / "adapter"
    run_distributed(save_start, layout.world, folder, output, layout)
    weights, adapter = (
        load_file(folder / "model.safetensors"),
        load_file(output / "adapter_model.safetensors"),
    )
    together = ["self_attn q k v", "self_attn o", "mlp gate up", "mlp down"]  # what is one matrix in Megatron
    for number, (part, *kinds) in ((number, words.split()) for number in range(4) for words in together):
        lost, found = [], []
        for kind in kinds:
            name = f"model.layers.{number}.{part}.{kind}_proj"
            weight, prefix = weights[f"{name}.weight"], f"base_model.model.{name}"
            lost.append(weight.double() - round_trip(weight, double=False))
            a, b = (adapter[f"{prefix}.lora_{letter}.weight"].double() for letter in "AB")
            found.append(32 / 4 * b @ a)  # lora_alpha over lora_rank
        u_FK, s_K, vt_KD = torch.linalg.svd(torch.cat(lost), full_matrices=False)
        best_FD = u_FK[:, :4] * s_K[:4] @ vt_KD[:4]
        # In float32, whose last bits move vectors further where singular values lie close.
        assert (torch.cat(found) - best_FD).norm() < 1e-4 * best_FD.norm(), (number, part)


def test_an_adapter_of_loftq_opens_in_peft_beside_the_base_in_four_bits(tmp_path: Path) -> None:
    folder = folder_of("llama")
    run_distributed(trained, 1, folder, tmp_path, Layout(), LOFTQ)
    base = base_model(dequantised(folder, tmp_path / "base"))
    adapted = logits(PeftModel.from_pretrained(base, tmp_path / "adapter"))
    merged = logits(base_model(tmp_path / "merged"))
    torch.testing.assert_close(adapted, merged, rtol=0, atol=1e-4 * float(merged.abs().max()))
    beside_the_original = logits(PeftModel.from_pretrained(base_model(folder), tmp_path / "adapter"))
    assert float((beside_the_original - merged).abs().max()) > 1e-2 * float(merged.abs().max())


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
