"""Hugging Face -> Megatron -> Hugging Face is bit-identical for every family in every layout."""

import json
import shutil
from collections.abc import Callable
from functools import cache
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
from megaswift.converters.table import Place
from megaswift.converters.tables.catalogue import TABLES
from megaswift.errors import WeightsError
from megaswift.kernels.block_fp8 import reference as block_fp8
from megaswift.mcore.process_groups import destroy, initialise
from megaswift.metadata.catalogue import FAMILIES
from megaswift.metadata.read import get_model_meta
from megaswift.models.build import build_model
from megaswift.parallel.layout import Layout
from megaswift.platforms.platform import select_platform
from tests.harness.distributed import run_distributed
from tests.harness.quantised import save_fp8, save_mxfp4, tensors_of
from tests.harness.tiny import MODELS, save_tiny

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
# One tiny model of every table, with every bias, norm and packing that its family can have.
FAMILIES_OF = {model_type: name for name, (model_type, _) in reversed(MODELS.items())}  # its first tiny model
RICHER = {
    "arcee": "arcee-bias",
    "deepseek_v2": "deepseek_v2-groups",
    "gemma4_text": "gemma4_text",
    "qwen2_moe": "qwen2_moe-mixed",
}
REPEATING = {"kimi_k2": "deepseek_v3", "mimo": "qwen2"}  # not in transformers: saved as what they repeat
EVERY_FAMILY = {
    family: RICHER.get(family) or REPEATING.get(family) or FAMILIES_OF[family] for family in TABLES
}
WITH_EXPERTS = tuple(
    family for family in EVERY_FAMILY if any(row.place is Place.EXPERT for row in TABLES[family].rows)
)
TRANSPOSED = ("gpt_oss", "llama4_text")  # experts that etp does not cut
VARIANTS = ("llama-tied", "qwen2-tied", "olmo2-odd-heads", "llama-mlp-bias", "gemma4_text-dense")
# layout -> tiny models; each list goes through one start of the ranks.
CASES: dict[str, tuple[str, ...]] = {
    "one": ("llama", "llama-tied", "qwen3", "qwen2_moe-mixed", "qwen3_next"),
    "tp2": (*EVERY_FAMILY, *VARIANTS, "gemma4_text-small"),
    "pp2": (*EVERY_FAMILY, *VARIANTS),
    "ep2": WITH_EXPERTS,
    # Cuts every parameter that can be cut, and ties embeddings over stages.
    "tp2_pp2": (*(family for family in EVERY_FAMILY if family not in WITH_EXPERTS), *VARIANTS),
    "tp2_ep2_etp2": tuple(family for family in WITH_EXPERTS if family not in TRANSPOSED),
    "tp2_ep2_pp2": ("qwen2_moe", "qwen3_moe", "mixtral", "qwen3_next"),
    "tp4": (
        "llama-tied",
        "mixtral",
        "gemma4_text-small",
        "phi3",
    ),  # phi3: part of one kv group of a fused tensor on a rank
    "pp2_vpp2": ("llama-tied", "mixtral", "qwen3_next"),
    "uneven_pp": ("llama-tied", "mixtral", "qwen3_5_text"),
    "tp2_cp2": ("llama-tied", "mixtral"),
    "dp2": ("llama-tied", "mixtral"),
}


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


def all_there_and_back(rank: int, world_size: int, root: Path, names: list[str], layout: Layout) -> None:
    """Do it for the models `names` below `root`, one after the other."""
    for name in names:
        there_and_back(rank, world_size, root / name / "in", root / name / "out", layout, "bfloat16")
        destroy()


def changed(before: Path, after: Path) -> list[str]:
    """Return the tensors that are not the same in both folders, bit for bit."""
    one, other = tensors_of(before), tensors_of(after)
    names = sorted(one.keys() ^ other.keys())
    return names + [name for name in one if name in other and not torch.equal(one[name], other[name])]


def all_changed(root: Path, names: list[str]) -> dict[str, list[str]]:
    """Return, for every model that changed on its way, the tensors that did."""
    found = {name: changed(root / name / "in", root / name / "out") for name in names}
    return {name: tensors for name, tensors in found.items() if tensors}


def check_round_trip(
    tmp_path: Path, layout: Layout, folder: Path, *, dtype: str
) -> list[tuple[LoadReport, ExportReport]]:
    reports = run_distributed(there_and_back, layout.world, folder, tmp_path / "out", layout, dtype)
    assert changed(folder, tmp_path / "out") == []
    return reports


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that gives the folder of a tiny model, or of a family's, in bfloat16."""

    @cache
    def folder_of(name: str) -> Path:
        folder = save_tiny(EVERY_FAMILY.get(name, name), tmp_path_factory.mktemp(name), dtype=torch.bfloat16)
        if name in REPEATING:
            config = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps({**config, "model_type": name}))
        return folder

    return folder_of


@pytest.mark.ranks(4)
@pytest.mark.parametrize("layout", CASES)
def test_round_trip_of_every_family_is_bit_identical(
    tmp_path: Path, saved: Callable[[str], Path], layout: str
) -> None:
    names = list(CASES[layout])
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "in").symlink_to(saved(name), target_is_directory=True)
    run_distributed(all_there_and_back, LAYOUTS[layout].world, tmp_path, names, LAYOUTS[layout])
    assert all_changed(tmp_path, names) == {}


def test_every_family_goes_through_every_layout_that_it_can() -> None:
    supported = {name for name, family in FAMILIES.items() if family.supported}
    assert set(TABLES) == supported
    assert supported <= set(CASES["tp2"]) and supported <= set(CASES["pp2"])
    has_experts = {family for family in supported if FAMILIES[family].facts.get("moe")}
    assert has_experts == set(CASES["ep2"])


@pytest.mark.ranks(2)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_round_trip_is_bit_identical_in_other_dtypes(tmp_path: Path, dtype: str) -> None:
    folder = save_tiny("qwen2", tmp_path / "in", dtype=getattr(torch, dtype))
    check_round_trip(tmp_path, LAYOUTS["tp2"], folder, dtype=dtype)


ODD = {"hidden_size": 192, "intermediate_size": 200}  # neither is a multiple of a block
EVEN = {"hidden_size": 128, "intermediate_size": 256, "moe_intermediate_size": 128, "head_dim": 64}


@pytest.mark.ranks(4)
@pytest.mark.parametrize(
    ("name", "layout"),
    [("qwen3_moe", "tp2_ep2_pp2"), ("deepseek_v3", "tp2"), ("gpt_oss", "tp2"), ("gpt_oss", "ep2")],
)
def test_quantised_files_fill_shards_with_the_numbers_they_stand_for(
    tmp_path: Path, name: str, layout: str
) -> None:
    """Block FP8, and MXFP4 of gpt-oss."""
    folder = tmp_path / "in"
    expected = save_mxfp4(folder) if name == "gpt_oss" else save_fp8(name, folder, **ODD)
    run_distributed(
        there_and_back, LAYOUTS[layout].world, folder, tmp_path / "out", LAYOUTS[layout], "bfloat16"
    )
    found = tensors_of(tmp_path / "out")
    assert found.keys() == expected.keys()
    assert [key for key, tensor in expected.items() if not torch.equal(found[key], tensor)] == []
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


def export_in_fp8(rank: int, world_size: int, folder: Path, output: Path, layout: Layout) -> None:
    """Load a folder and export it in block FP8."""
    initialise(layout, seed=1, timeout_min=2)
    meta = get_model_meta(folder)
    run = RunConfig(model=ModelConfig(torch_dtype="bfloat16"))
    chunks = build_model(meta, run, layout, select_platform("cpu"))
    load_weights(chunks, meta, layout, rank, folder)
    export_hf(chunks, meta, layout, rank, output, dtype="bfloat16", quant_method="fp8")


@pytest.mark.ranks(4)
def test_an_export_in_fp8_is_read_back_as_the_nearest_numbers(tmp_path: Path) -> None:
    folder = save_tiny("qwen3_moe", tmp_path / "in", dtype=torch.bfloat16, **EVEN)
    layout = Layout(world=4, pp=2, ep=2)
    run_distributed(export_in_fp8, 4, folder, tmp_path / "fp8", layout)
    run_distributed(there_and_back, 4, tmp_path / "fp8", tmp_path / "out", layout, "bfloat16")
    written, found = tensors_of(tmp_path / "fp8"), tensors_of(tmp_path / "out")
    in_fp8 = {key for key, tensor in written.items() if tensor.dtype == torch.float8_e4m3fn}
    assert "model.layers.3.mlp.experts.2.up_proj.weight" in in_fp8
    for key, tensor in tensors_of(folder).items():
        if key not in in_fp8:
            assert torch.equal(found[key], tensor), key
            continue
        values, scales = block_fp8.quantise(
            tensor, block_rows=128, block_columns=128, dtype=torch.float8_e4m3fn, power_of_two=False
        )
        assert torch.equal(written[key].view(torch.uint8), values.view(torch.uint8)), key
        nearest = block_fp8.dequantise(
            values, scales, block_rows=128, block_columns=128, dtype=torch.bfloat16
        )
        assert torch.equal(found[key], nearest), key


@pytest.mark.ranks(2)
def test_round_trip_with_padded_heads_is_bit_identical(tmp_path: Path) -> None:
    folder = save_tiny(
        "qwen2", tmp_path / "in", dtype=torch.bfloat16, num_attention_heads=9, num_key_value_heads=3
    )
    check_round_trip(tmp_path, LAYOUTS["tp2"], folder, dtype="bfloat16")


# family -> (key of config.json that announces layers for multi-token prediction, where its file has them)
PREDICTING = {
    "deepseek_v3": ("num_nextn_predict_layers", "model.layers.4."),
    "glm4_moe": ("num_nextn_predict_layers", "model.layers.4."),
    "glm4_moe_lite": ("num_nextn_predict_layers", "model.layers.4."),
    "kimi_k2": ("num_nextn_predict_layers", "model.layers.4."),
    "mimo": ("num_nextn_predict_layers", "model.mtp_layers.0."),
    "qwen3_5_moe_text": ("mtp_num_hidden_layers", "mtp."),
    "qwen3_5_text": ("mtp_num_hidden_layers", "mtp."),
    "qwen3_next": (None, "mtp."),
}


@pytest.mark.ranks(2)
@pytest.mark.parametrize("layout", ["tp2", "pp2", "ep2"])
def test_layers_of_multi_token_prediction_go_through_untouched(
    tmp_path: Path, saved: Callable[[str], Path], layout: str
) -> None:
    names = [name for name in PREDICTING if layout != "ep2" or name in WITH_EXPERTS]
    for name in names:
        key, prefix = PREDICTING[name]
        folder = Path(shutil.copytree(saved(name), tmp_path / name / "in"))
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **({key: 1} if key else {})}))
        tensors = load_file(folder / "model.safetensors")
        tensors[f"{prefix}eh_proj.weight"] = torch.randn(64, 128)
        tensors[f"{prefix}enorm.weight"] = torch.randn(64).bfloat16()
        tensors[f"{prefix}mlp.experts.3.up_proj.weight"] = torch.randn(48, 64).bfloat16()
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    run_distributed(all_there_and_back, 2, tmp_path, names, LAYOUTS[layout])
    assert all_changed(tmp_path, names) == {}


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
