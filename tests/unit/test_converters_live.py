"""Loading into a model and exporting from it, with modules that have Megatron's names and nothing else."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from megaswift.converters import folders, live
from megaswift.converters.export import export_hf
from megaswift.converters.load import load_weights
from megaswift.converters.plan import plan_chunk
from megaswift.errors import WeightsError
from megaswift.metadata.meta import ModelMeta
from megaswift.metadata.read import get_model_meta
from megaswift.parallel.layout import Layout, coordinates
from tests.harness.tiny import save_tiny

FAMILIES = ("llama-tied", "qwen2", "qwen3", "qwen2_moe-mixed", "mixtral")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that saves a tiny model once."""
    root = tmp_path_factory.mktemp("models")

    def save(name: str) -> Path:
        return root / name if (root / name).exists() else save_tiny(name, root / name, dtype=torch.bfloat16)

    return save


def fake_chunk(
    meta: ModelMeta, *, spell: Callable[[str], str] = str, dtype: torch.dtype = torch.bfloat16
) -> torch.nn.Module:
    """Return nested modules that hold one rank's parameters, filled with NaN."""
    root = torch.nn.Module()
    for parameter in plan_chunk(meta, Layout(), coordinates(Layout(), 0)):
        *path, last = spell(parameter.name).split(".")
        module = root
        for part in path:
            if part not in dict(module.named_children()):
                module.add_module(part, torch.nn.Module())
            module = module.get_submodule(part)
        module.register_parameter(
            last, torch.nn.Parameter(torch.full(parameter.shape, torch.nan, dtype=dtype))
        )
    return root


def transformer_engine_spelling(name: str) -> str:
    """Spell a local spec's name as Transformer Engine's spec does, for the models of this file."""
    is_dense = not name.startswith(
        ("decoder.layers.1.", "decoder.layers.2.", "decoder.layers.3.")
    )  # qwen2_moe-mixed
    name = name.replace("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight")
    if is_dense:
        name = name.replace("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight")
    if "local_experts" in name:
        before, after = name.split(".local_experts.")
        index, linear, _ = after.split(".")
        name = f"{before}.{linear}.weight{index}"
    return name


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
    return found


def load(folder: Path, **kwargs: Any) -> tuple[ModelMeta, torch.nn.Module]:
    meta = get_model_meta(folder)
    chunk = fake_chunk(meta, **kwargs)
    load_weights([chunk], meta, Layout(), 0, folder)
    return meta, chunk


@pytest.mark.parametrize("name", FAMILIES)
def test_export_of_a_loaded_model_is_bit_identical(
    saved: Callable[[str], Path], name: str, tmp_path: Path
) -> None:
    meta, chunk = load(saved(name))
    export_hf([chunk], meta, Layout(), 0, tmp_path / "out", dtype="bfloat16", max_shard_size="40KB")
    before, after = tensors_of(saved(name)), tensors_of(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) > 1


def test_transformer_engine_names_load_alike(saved: Callable[[str], Path]) -> None:
    folder = saved("qwen2_moe-mixed")
    _, local = load(folder)
    _, fused = load(folder, spell=transformer_engine_spelling)
    names = {transformer_engine_spelling(name): weight for name, weight in local.named_parameters()}
    found = dict(fused.named_parameters())
    assert names.keys() == found.keys()
    assert "decoder.layers.1.mlp.experts.linear_fc1.weight3" in found
    assert "decoder.layers.0.mlp.linear_fc1.layer_norm_weight" in found
    assert all(torch.equal(found[name], weight) for name, weight in names.items())


def test_weights_are_cast_to_the_dtype_of_the_parameters(saved: Callable[[str], Path]) -> None:
    _, wide = load(saved("llama-tied"), dtype=torch.float32)
    _, same = load(saved("llama-tied"))
    for (name, weight), expected in zip(wide.named_parameters(), same.parameters(), strict=True):
        assert torch.equal(weight, expected.float()), name


def test_report_counts_what_was_read(saved: Callable[[str], Path]) -> None:
    meta = get_model_meta(saved("qwen2"))
    report = load_weights([fake_chunk(meta)], meta, Layout(), 0, saved("qwen2"))
    tensors = tensors_of(saved("qwen2"))
    assert report.tensors == len(tensors)
    assert report.bytes_read == sum(2 * tensor.numel() for tensor in tensors.values())


def change(folder: Path, target: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    """Copy a model and change its tensors."""
    shutil.copytree(folder, target)
    tensors = load_file(target / "model.safetensors")
    edit(tensors)
    save_file(tensors, target / "model.safetensors")
    return target


K_PROJ = "model.layers.1.self_attn.k_proj.weight"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop(K_PROJ), f"missing: {K_PROJ}"),
        (lambda t: t.update(stray=torch.ones(2)), "not claimed by the family llama: stray"),
        (
            lambda t: t.update({K_PROJ: t[K_PROJ].t().contiguous()}),
            r"another shape.*is \[64, 32\], not \[32, 64\]",
        ),
        (lambda t: t.update({K_PROJ: t[K_PROJ].to(torch.float8_e4m3fn)}), "F8_E4M3"),
    ],
    ids=["missing", "unclaimed", "transposed", "fp8"],
)
def test_files_that_do_not_fit_are_refused_before_anything_is_filled(
    saved: Callable[[str], Path], tmp_path: Path, edit: Callable[[dict[str, torch.Tensor]], Any], message: str
) -> None:
    folder = change(saved("llama-tied"), tmp_path / "changed", edit)
    meta = get_model_meta(folder)
    chunk = fake_chunk(meta)
    with pytest.raises(WeightsError, match=message):
        load_weights([chunk], meta, Layout(), 0, folder)
    assert all(weight.isnan().all() for weight in chunk.parameters())


def test_rotary_buffers_of_old_files_are_ignored(saved: Callable[[str], Path], tmp_path: Path) -> None:
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    load(change(saved("llama-tied"), tmp_path / "old", lambda tensors: tensors.update(buffer)))


def test_output_layer_of_a_tied_model_may_be_an_equal_copy(
    saved: Callable[[str], Path], tmp_path: Path
) -> None:
    load(
        change(
            saved("llama-tied"),
            tmp_path / "equal",
            lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}),
        )
    )


def test_output_layer_of_a_tied_model_must_not_differ(saved: Callable[[str], Path], tmp_path: Path) -> None:
    def differ(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["lm_head.weight"][130, 3] += 1

    with pytest.raises(WeightsError, match="tie_word_embeddings"):
        load(change(saved("llama-tied"), tmp_path / "differs", differ))


def test_parameter_without_a_row_is_refused(saved: Callable[[str], Path]) -> None:
    meta = get_model_meta(saved("llama-tied"))
    chunk = fake_chunk(meta)
    chunk.get_submodule("decoder.layers.0.mlp.linear_fc1").register_parameter(
        "bias", torch.nn.Parameter(torch.ones(3))
    )
    with pytest.raises(WeightsError, match=r"linear_fc1\.bias has no row"):
        load_weights([chunk], meta, Layout(), 0, saved("llama-tied"))


def test_adapter_parameters_are_left_alone(saved: Callable[[str], Path]) -> None:
    meta = get_model_meta(saved("llama-tied"))
    chunk = fake_chunk(meta)
    module = chunk.get_submodule("decoder.layers.0.mlp.linear_fc1")
    module.add_module("lora_a", torch.nn.Linear(64, 3, bias=False))
    before = module.lora_a.weight.detach().clone()
    load_weights([chunk], meta, Layout(), 0, saved("llama-tied"))
    assert torch.equal(module.lora_a.weight, before)


def test_parameter_of_another_shape_is_refused(saved: Callable[[str], Path]) -> None:
    meta = get_model_meta(saved("llama-tied"))
    chunk = fake_chunk(meta)
    chunk.get_submodule("decoder.layers.0.mlp.linear_fc1").weight = torch.nn.Parameter(torch.ones(3, 64))
    with pytest.raises(WeightsError, match=r"is \[3, 64\] in the model, \[192, 64\] by its table"):
        load_weights([chunk], meta, Layout(), 0, saved("llama-tied"))


def test_export_is_a_complete_folder(saved: Callable[[str], Path], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(saved("qwen2"), folder)
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": {"bits": 4}}
    (folder / "tokenizer.model").write_bytes(b"pieces")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "modeling_own.py").write_text("")
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    meta, chunk = load(folder)
    meta.raw.update(config)
    report = export_hf([chunk], meta, Layout(), 0, tmp_path / "out", dtype="float32")
    assert {path.name for path in report.folder.iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.model", "chat_template.jinja", "modeling_own.py",
    }  # fmt: skip
    written = json.loads((report.folder / "config.json").read_text())
    assert written["dtype"] == "float32" and "quantization_config" not in written
    assert AutoModelForCausalLM.from_pretrained(report.folder).dtype == torch.float32
    assert report.bytes_written == sum(tensor.numel() * 4 for tensor in tensors_of(report.folder).values())


def test_export_replaces_an_earlier_one(saved: Callable[[str], Path], tmp_path: Path) -> None:
    meta, chunk = load(saved("llama-tied"))
    for value in (1.0, 2.0):
        with torch.no_grad():
            chunk.get_parameter("decoder.final_layernorm.weight").fill_(value)
        export_hf([chunk], meta, Layout(), 0, tmp_path / "out", dtype="bfloat16")
    assert tensors_of(tmp_path / "out")["model.norm.weight"].unique().tolist() == [2.0]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_full_disk_leaves_nothing_behind(
    saved: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    meta, chunk = load(saved("llama-tied"))
    written = 0
    pwrite = os.pwrite

    def fill_up(descriptor: int, data: memoryview, offset: int) -> int:
        nonlocal written
        written += len(data)
        if written > 30_000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return pwrite(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", fill_up)
    with pytest.raises(WeightsError, match="No space left on device"):
        export_hf([chunk], meta, Layout(), 0, tmp_path / "out", dtype="bfloat16")
    assert written > 30_000 and list(tmp_path.iterdir()) == []


def test_disk_that_is_too_small_is_refused_before_anything_is_written(
    saved: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    meta, chunk = load(saved("llama-tied"))
    monkeypatch.setattr(folders.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(WeightsError, match="the disk is full"):
        export_hf([chunk], meta, Layout(), 0, tmp_path / "out", dtype="bfloat16")
    assert list(tmp_path.iterdir()) == []


def test_export_does_not_touch_the_source_or_a_stranger(saved: Callable[[str], Path], tmp_path: Path) -> None:
    meta, chunk = load(saved("llama-tied"))
    with pytest.raises(WeightsError, match="is read from"):
        export_hf([chunk], meta, Layout(), 0, saved("llama-tied"), dtype="bfloat16")
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(WeightsError, match="not an earlier output"):
        export_hf([chunk], meta, Layout(), 0, tmp_path, dtype="bfloat16")
    assert (tmp_path / "thesis.txt").exists() and (saved("llama-tied") / "model.safetensors").exists()


def test_a_parameter_kept_in_fp8_is_read_into_and_written_from_its_values(
    saved: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Transformer Engine's tensors have no rows; torch's own type with a scale of one stands for them here."""
    monkeypatch.setattr(live, "is_float8tensor", lambda x: x.dtype is torch.float8_e4m3fn)
    monkeypatch.setattr(live, "dequantize_fp8_tensor", lambda x: x.to(torch.bfloat16))
    folder = saved("llama-tied")
    meta = get_model_meta(folder)
    chunk = fake_chunk(meta)
    linear = chunk.get_submodule("decoder.layers.0.self_attention.linear_proj")
    linear.weight = torch.nn.Parameter(linear.weight.to(torch.float8_e4m3fn), requires_grad=False)
    load_weights([chunk], meta, Layout(), 0, folder)
    wanted = load_file(folder / "model.safetensors")["model.layers.0.self_attn.o_proj.weight"]
    assert linear.weight.dtype is torch.float8_e4m3fn
    assert torch.equal(linear.weight.float(), wanted.to(torch.float8_e4m3fn).float())
    export_hf([chunk], meta, Layout(), 0, tmp_path / "out", dtype="bfloat16")
    written = load_file(tmp_path / "out" / "model.safetensors")["model.layers.0.self_attn.o_proj.weight"]
    assert written.dtype is torch.bfloat16 and torch.equal(written.float(), linear.weight.float())
