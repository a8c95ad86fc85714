"""A torch_dist checkpoint as the source of weights: every piece of every rank has the bits of the Hugging Face folder."""

import json
import shutil
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from megaswift.converters.conversion import carry_out
from megaswift.converters.dcp_model import find_checkpoint
from megaswift.converters.dcp_pieces import CheckpointReader, McoreCheckpoint
from megaswift.converters.export import export_hf
from megaswift.converters.load import load_weights
from megaswift.converters.offline import to_hf, to_mcore
from megaswift.converters.plan import plan_chunk
from megaswift.converters.reading import FolderReader
from megaswift.errors import CheckpointError, UserError
from megaswift.metadata.meta import ModelMeta
from megaswift.metadata.read import get_model_meta
from megaswift.parallel.layout import Layout, coordinates
from megaswift.tasks.scores import scoring_model
from tests.harness.conversions import saved, tensors_of, there
from tests.unit.test_converters_live import fake_chunk

LAYOUTS = {
    "one": Layout(),
    "tp2": Layout(world=2, tp=2),
    "tp4": Layout(world=4, tp=4),  # more ranks than kv heads
    "pp2": Layout(world=2, pp=2),  # ties embeddings over stages
    "ep2": Layout(world=2, ep=2),
    "tp2 ep2 etp2": Layout(world=4, tp=2, ep=2, etp=2, sequence_parallel=True),
}
FAMILIES = (
    "llama-tied", "qwen2", "llama-odd-heads", "olmo2-odd-heads", "phi3", "starcoder2", "gemma4_text",
    "qwen2_moe-mixed", "mixtral", "granitemoe", "deepseek_v3", "glm4_moe_lite", "llama4_text", "gpt_oss", "qwen3_next",
)  # fmt: skip
TRANSPOSED = ("llama4_text", "gpt_oss")  # experts that etp does not cut


@cache
def checkpoint(name: str, dtype: str | None = None) -> Path:
    """Return a converted tiny model: its vocabulary padded, its tensors in many files."""
    folder = saved(name)
    conversion = to_mcore(get_model_meta(folder), folder, dtype=dtype, vocab_multiple=16, max_bytes=30_000)
    return carry_out(conversion, folder.with_name(f"{name}-{dtype}-mcore"), source=folder)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_piece_has_the_bits_of_the_folder(name: str) -> None:
    folder = saved(name)
    meta = get_model_meta(folder)
    ours, theirs = (
        CheckpointReader(meta, McoreCheckpoint(folder=checkpoint(name))),
        FolderReader(meta, folder),
    )
    assert {name: info.shape for name, info in ours.tensors.items()} == {
        name: info.shape for name, info in theirs.tensors.items() if name in ours.tensors
    }
    for layout in (one for key, one in LAYOUTS.items() if key != "tp2 ep2 etp2" or name not in TRANSPOSED):
        read = set()
        for rank in range(layout.world):
            for parameter in plan_chunk(meta, layout, coordinates(layout, rank)):
                for piece in parameter.pieces:
                    found, expected = ours.read(piece), theirs.read(piece)
                    assert found.dtype == expected.dtype and np.array_equal(found, expected), piece
                    read.add(piece.tensor)
        assert read == ours.tensors.keys()


def filled(meta: ModelMeta, source: Path | McoreCheckpoint) -> dict[str, torch.Tensor]:
    chunk = fake_chunk(meta, dtype=torch.float32)
    load_weights([chunk], meta, Layout(), 0, source)
    return dict(chunk.named_parameters())


@pytest.mark.parametrize("name", ["llama-tied", "deepseek_v3"])
def test_other_dtypes_are_cast_to_the_parameters(name: str) -> None:
    folder = saved(name)
    meta = get_model_meta(folder)
    expected = filled(meta, folder)
    for dtype in (None, "float32", "float16"):
        found = filled(meta, McoreCheckpoint(folder=checkpoint(name, dtype)))
        for key, weight in expected.items():
            kept = weight.half().float() if dtype == "float16" and "expert_bias" not in key else weight
            assert torch.equal(found[key], kept), key


def test_a_report_counts_what_was_read() -> None:
    meta = get_model_meta(saved("qwen2"))
    found = load_weights([fake_chunk(meta)], meta, Layout(), 0, McoreCheckpoint(folder=checkpoint("qwen2")))
    expected = load_weights([fake_chunk(meta)], meta, Layout(), 0, saved("qwen2"))
    assert (found.bytes_read, found.tensors) == (expected.bytes_read, expected.tensors)


def test_a_head_for_scores_is_new_where_the_checkpoint_is_of_a_language_model() -> None:
    """Its own stays as it was built; the language model's, in the same place, is left behind."""
    for name in ("llama-tied", "qwen2"):
        meta = scoring_model(get_model_meta(saved(name)), num_labels=2, pad_id=0, asked="a test")
        found, expected = (
            filled(meta, source) for source in (McoreCheckpoint(folder=checkpoint(name)), saved(name))
        )
        assert found["output_layer.weight"].isnan().all()
        for key, weight in expected.items():
            assert torch.equal(found[key], weight) or weight.isnan().all(), key


def changed(tmp_path: Path, **facts: object) -> ModelMeta:
    """Return the facts of a tiny qwen2 whose config.json says something else."""
    folder = Path(shutil.copytree(saved("qwen2"), tmp_path / "changed"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **facts}))
    return get_model_meta(folder)


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"intermediate_size": 64}, r"linear_fc1.weight is \[4, 192, 64\].*\[4, 128, 64\] by config.json"),
        ({"num_hidden_layers": 5, "layer_types": None}, "belong together"),
        (
            {"tie_word_embeddings": True},
            "holds more of a model than config.json describes: output_layer.weight",
        ),
    ],
    ids=["narrower", "deeper", "tied"],
)
def test_a_checkpoint_of_another_model_is_refused(
    tmp_path: Path, facts: dict[str, object], message: str
) -> None:
    meta = changed(tmp_path, **facts)
    chunk = fake_chunk(meta)
    with pytest.raises(CheckpointError, match=message):
        load_weights([chunk], meta, Layout(), 0, McoreCheckpoint(folder=checkpoint("qwen2")))
    assert all(weight.isnan().all() for weight in chunk.parameters())


def test_what_is_no_checkpoint_or_a_broken_one_is_refused(tmp_path: Path) -> None:
    meta = get_model_meta(saved("qwen2"))
    with pytest.raises(CheckpointError, match="holds no torch_dist checkpoint"):
        filled(meta, McoreCheckpoint(folder=saved("qwen2")))
    broken = Path(shutil.copytree(checkpoint("qwen2"), tmp_path / "broken"))
    largest = max(broken.glob("release/*.distcp"), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match="Copy the checkpoint again"):
        filled(meta, McoreCheckpoint(folder=broken))
    largest.unlink()
    with pytest.raises(UserError, match="No such file"):
        filled(meta, McoreCheckpoint(folder=broken))


def test_a_checkpoint_without_a_head_for_scores_is_not_converted_back() -> None:
    meta = scoring_model(get_model_meta(saved("qwen2")), num_labels=2, pad_id=0, asked="a test")
    with pytest.raises(CheckpointError, match=r"lacks score\.weight"):
        to_hf(meta, find_checkpoint(checkpoint("qwen2")), dtype=None, max_bytes=10**9)


def test_layers_that_go_through_come_from_beside_the_checkpoint(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(saved("deepseek_v3"), tmp_path / "in"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_nextn_predict_layers": 1}))
    more = {
        "model.layers.4.enorm.weight": torch.randn(64),
        "model.layers.4.eh_proj.weight": torch.randn(64, 128),
    }
    save_file({**tensors_of(folder), **more}, folder / "model.safetensors", metadata={"format": "pt"})
    beside = there(folder, tmp_path / "mcore") / "hf"
    meta, chunk = get_model_meta(beside), fake_chunk(get_model_meta(folder))
    load_weights([chunk], meta, Layout(), 0, McoreCheckpoint(folder=tmp_path / "mcore"))
    export_hf([chunk], meta, Layout(), 0, tmp_path / "out", dtype="bfloat16")
    found = tensors_of(tmp_path / "out")
    assert found.keys() == tensors_of(folder).keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in more.items())
