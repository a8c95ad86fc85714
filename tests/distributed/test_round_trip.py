"""Hugging Face -> Megatron -> Hugging Face is bit-identical for every family in every layout."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from megaswift.config.model import ModelConfig
from megaswift.config.run import RunConfig
from megaswift.converters.export import ExportReport, export_hf
from megaswift.converters.load import LoadReport, load_weights
from megaswift.errors import WeightsError
from megaswift.mcore.process_groups import initialise
from megaswift.metadata.read import get_model_meta
from megaswift.models.build import build_model
from megaswift.parallel.layout import Layout
from megaswift.platforms.platform import select_platform
from tests.harness.distributed import run_distributed
from tests.harness.tiny import save_tiny

LAYOUTS = {
    "one": Layout(),
    "tp2": Layout(world=2, tp=2),
    "pp2": Layout(world=2, pp=2),
    "tp2_pp2": Layout(world=4, tp=2, pp=2),
    "tp4": Layout(world=4, tp=4),  # more ranks than kv heads
    "pp2_vpp2": Layout(world=2, pp=2, vpp=2),
    "uneven_pp": Layout(world=2, pp=2, pp_first=1),
    "tp2_cp2": Layout(world=4, tp=2, cp=2),
    "dp2": Layout(world=2),
    "ep2": Layout(world=2, ep=2),
    "tp2_ep2_etp2": Layout(world=4, tp=2, ep=2, etp=2, sequence_parallel=True),
    "tp2_ep2_pp2": Layout(world=4, tp=2, pp=2, ep=2, sequence_parallel=True),
}
EVERY_FAMILY = (
    "llama",
    "llama-tied",
    "mistral",
    "qwen2-tied",
    "qwen3",
    "qwen2_moe-mixed",
    "qwen3_moe",
    "mixtral",
)
EXPERTS = ("qwen2_moe-mixed", "qwen3_moe", "mixtral")
ROUTERS_AND_LATENTS = (
    "deepseek_v2",
    "deepseek_v3",
    "dots1",
    "ernie4_5_moe",
    "glm4_moe",
    "glm4_moe_lite",
    "granitemoe",
    "granitemoeshared",
    "hunyuan_v1_moe",
    "minimax_m2",
    "olmoe",
)
# One of each kind of table without experts; tp2_pp2 cuts every parameter that can be cut, and ties embeddings over stages.
DENSE = (
    "apertus",
    "arcee-bias",
    "cohere2",
    "ernie4_5",
    "exaone4",
    "gemma",
    "gemma2",
    "gemma3_text",
    "glm4",
    "granite",
    "hunyuan_v1_dense",
    "internlm3",
    "llama-mlp-bias",
    "ministral3",
    "olmo2",
    "olmo2-odd-heads",
    "olmo3",
    "phi3",
    "seed_oss",
    "smollm3",
    "starcoder2",
)
TRANSPOSED = ("gpt_oss", "llama4_text")  # experts that etp does not cut
CASES = [
    *[(name, layout) for name in TRANSPOSED for layout in ("tp2", "pp2", "ep2")],
    *[(name, "tp2_pp2") for name in DENSE],
    ("phi3", "tp4"),  # part of one kv group of a fused tensor on a rank
    *[(name, layout) for name in ROUTERS_AND_LATENTS for layout in ("tp2", "pp2", "ep2", "tp2_ep2_etp2")],
    *[(name, layout) for name in EVERY_FAMILY for layout in ("one", "tp2", "pp2", "tp2_pp2")],
    *[(name, layout) for name in EXPERTS for layout in ("ep2", "tp2_ep2_etp2", "tp2_ep2_pp2")],
    *[
        (name, layout)
        for name in ("llama-tied", "mixtral")
        for layout in ("tp4", "pp2_vpp2", "uneven_pp", "tp2_cp2", "dp2")
    ],
]


def there_and_back(
    rank: int, world_size: int, folder: Path, output: Path, layout: Layout, dtype: str
) -> tuple[LoadReport, ExportReport]:
    """Load, with parameters that were NaN before, and export again in many small files."""
    initialise(layout, seed=1, timeout_min=2)
    meta = get_model_meta(folder)
    run = RunConfig(model=ModelConfig(torch_dtype=dtype))
    chunks = build_model(meta, run, layout, select_platform("cpu"))
    for chunk in chunks:
        for parameter in chunk.parameters():
            torch.nn.init.constant_(parameter, torch.nan)
    loaded = load_weights(chunks, meta, layout, rank, folder)
    assert not any(parameter.isnan().any() for chunk in chunks for parameter in chunk.parameters())
    exported = export_hf(chunks, meta, layout, rank, output, dtype=dtype, max_shard_size="100KB")
    return loaded, exported


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
    return found


def check_round_trip(
    tmp_path: Path, layout: Layout, folder: Path, *, dtype: str
) -> list[tuple[LoadReport, ExportReport]]:
    reports = run_distributed(there_and_back, layout.world, folder, tmp_path / "out", layout, dtype)
    before, after = tensors_of(folder), tensors_of(tmp_path / "out")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]), name
    return reports


@pytest.mark.ranks(4)
@pytest.mark.parametrize(("name", "layout"), CASES)
def test_round_trip_is_bit_identical(tmp_path: Path, name: str, layout: str) -> None:
    folder = save_tiny(name, tmp_path / "in", dtype=torch.bfloat16)
    check_round_trip(tmp_path, LAYOUTS[layout], folder, dtype="bfloat16")


@pytest.mark.ranks(2)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_round_trip_is_bit_identical_in_other_dtypes(tmp_path: Path, dtype: str) -> None:
    folder = save_tiny("qwen2", tmp_path / "in", dtype=getattr(torch, dtype))
    check_round_trip(tmp_path, LAYOUTS["tp2"], folder, dtype=dtype)


@pytest.mark.ranks(2)
def test_round_trip_with_padded_heads_is_bit_identical(tmp_path: Path) -> None:
    folder = save_tiny(
        "qwen2", tmp_path / "in", dtype=torch.bfloat16, num_attention_heads=9, num_key_value_heads=3
    )
    check_round_trip(tmp_path, LAYOUTS["tp2"], folder, dtype="bfloat16")


@pytest.mark.ranks(2)
def test_layers_of_multi_token_prediction_go_through_untouched(tmp_path: Path) -> None:
    folder = save_tiny("deepseek_v3", tmp_path / "in", dtype=torch.bfloat16)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.4.eh_proj.weight"] = torch.randn(64, 128)
    tensors["model.layers.4.enorm.weight"] = torch.randn(64).bfloat16()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    check_round_trip(tmp_path, LAYOUTS["pp2"], folder, dtype="bfloat16")


@pytest.mark.ranks(4)
def test_ranks_read_their_share_and_write_each_byte_once(tmp_path: Path) -> None:
    folder = save_tiny("mixtral", tmp_path / "in", dtype=torch.bfloat16)
    reports = check_round_trip(tmp_path, LAYOUTS["tp2_ep2_pp2"], folder, dtype="bfloat16")
    total = sum(2 * tensor.numel() for tensor in tensors_of(folder).values())
    assert sum(exported.bytes_written for _, exported in reports) == total
    assert all(exported.bytes_written < 0.4 * total for _, exported in reports)
    assert max(loaded.bytes_read for loaded, _ in reports) < 0.3 * total


@pytest.mark.ranks(4)
def test_transformers_loads_an_export_with_no_key_missing_or_left_over(tmp_path: Path) -> None:
    folder = save_tiny("qwen2_moe-mixed", tmp_path / "in", dtype=torch.bfloat16)
    check_round_trip(tmp_path, LAYOUTS["tp2_ep2_pp2"], folder, dtype="bfloat16")
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    original = AutoModelForCausalLM.from_pretrained(folder)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), original.parameters(), strict=True))


def export_on_a_broken_disk(rank: int, world_size: int, folder: Path, output: Path, layout: Layout) -> str:
    """Let writing fail on the last rank alone; return what each rank raises."""
    initialise(layout, seed=1, timeout_min=2)
    meta = get_model_meta(folder)
    chunks = build_model(
        meta, RunConfig(model=ModelConfig(torch_dtype="bfloat16")), layout, select_platform("cpu")
    )
    load_weights(chunks, meta, layout, rank, folder)
    patch = pytest.MonkeyPatch()
    if rank == world_size - 1:

        def fail(*_: Any) -> int:
            raise OSError(28, "No space left on device")

        patch.setattr("os.pwrite", fail)
    try:
        export_hf(chunks, meta, layout, rank, output, dtype="bfloat16")
    except WeightsError as error:
        return str(error)
    finally:
        patch.undo()
    return "nothing"


@pytest.mark.ranks(4)
def test_all_ranks_fail_together_when_one_cannot_write(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "in", dtype=torch.bfloat16)
    messages = run_distributed(export_on_a_broken_disk, 4, folder, tmp_path / "out", LAYOUTS["tp2_pp2"])
    assert set(messages) == {messages[0]} and "failed on rank 3: No space left on device" in messages[0]
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
