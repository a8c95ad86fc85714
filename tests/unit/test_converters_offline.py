"""Offline conversion: bytes land where both sides expect them, and broken input is refused."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megaswift.converters.conversion import carry_out
from megaswift.converters.dcp_metadata import read_metadata
from megaswift.converters.dcp_model import find_checkpoint
from megaswift.converters.dtypes import cast
from megaswift.converters.offline import to_hf, to_mcore
from megaswift.errors import CheckpointError
from megaswift.metadata.read import get_model_meta
from tests.harness.conversions import back, saved, tensors_of, there
from tests.harness.tiny import save_tiny

NAMES = ("llama-tied", "qwen2", "qwen3_moe", "qwen2_moe-mixed", "mixtral")
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


@pytest.mark.parametrize("name", NAMES)
def test_there_and_back_is_bit_identical(tmp_path: Path, name: str) -> None:
    there(saved(name), tmp_path / "mcore")
    back(saved(name), tmp_path / "mcore", tmp_path / "hf")
    before, after = tensors_of(saved(name)), tensors_of(tmp_path / "hf")
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    sums = [
        json.loads((tmp_path / side / "conversion.json").read_text())["tensors"] for side in ("mcore", "hf")
    ]
    assert sums[0] == sums[1] and sums[0].keys() == before.keys()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "mcore"]


def test_dtype_changes_as_torch_rounds(tmp_path: Path) -> None:
    folder = save_tiny("qwen2", tmp_path / "wide", dtype=torch.float32)
    there(folder, tmp_path / "mcore", dtype="bfloat16")
    back(folder, tmp_path / "mcore", tmp_path / "hf", dtype="float32")
    before, after = tensors_of(folder), tensors_of(tmp_path / "hf")
    assert all(torch.equal(before[key].bfloat16().float(), after[key]) for key in before)
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["dtype"] == "float32"


@pytest.mark.parametrize("target", DTYPES)
@pytest.mark.parametrize("source", DTYPES)
def test_casts_are_those_of_torch(source: str, target: str) -> None:
    values = torch.randn(10_000, generator=torch.Generator().manual_seed(0)).exp() ** 4
    values[:7] = torch.tensor([torch.nan, torch.inf, -torch.inf, 65520.0, -0.0, 1e-40, 3.3895e38])
    before = values.to(DTYPES[source])
    bits = before.view(torch.uint8).numpy().view(f"u{before.element_size()}")
    after = torch.from_numpy(cast(bits, source, target).copy()).view(DTYPES[target])
    torch.testing.assert_close(after, before.to(DTYPES[target]), rtol=0, atol=0, equal_nan=True)


def test_metadata_is_what_torch_reads(tmp_path: Path) -> None:
    there(saved("qwen3_moe"), tmp_path / "mcore")
    metadata = FileSystemReader(tmp_path / "mcore" / "release").read_metadata()
    ours = read_metadata(tmp_path / "mcore" / "release")
    experts = metadata.state_dict_metadata["decoder.layers.1.mlp.experts.experts.linear_fc1.weight"]
    assert experts.size == torch.Size([4, 96, 64]) and experts.properties.dtype == torch.bfloat16
    assert {
        key for key, value in metadata.state_dict_metadata.items() if hasattr(value, "chunks")
    } == ours.keys()
    assert (
        "decoder.layers.3.self_attention.core_attention._extra_state/shard_0_1"
        in metadata.state_dict_metadata
    )


def test_metadata_is_what_torch_would_write(tmp_path: Path) -> None:
    there(saved("qwen3_moe"), tmp_path / "mcore")
    read = FileSystemReader(tmp_path / "mcore" / "release").read_metadata()
    (tmp_path / "theirs").write_bytes(pickle.dumps(read))
    assert pickle.loads((tmp_path / "theirs").read_bytes()) == read
    chunk = ChunkStorageMetadata(torch.Size([0, 0]), torch.Size([131, 64]))
    assert read.state_dict_metadata["output_layer.weight"] == TensorStorageMetadata(
        TensorProperties(dtype=torch.bfloat16), torch.Size([131, 64]), [chunk]
    )
    assert (
        read.state_dict_metadata["decoder.layers.0.mlp.router._extra_state/shard_0_1"]
        == BytesStorageMetadata()
    )
    place = read.storage_data[MetadataIndex("output_layer.weight", torch.Size([0, 0]))]
    assert isinstance(place, _StorageInfo) and place.relative_path.endswith(".distcp")
    common = torch.load(tmp_path / "mcore" / "release" / "common.pt", weights_only=True)
    assert common["checkpoint_version"] == 3.0 and common["content_metadata"]["non_homogeneous_layers"]


def test_metadata_that_would_run_code_is_refused_and_runs_nothing(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "ran",))

    (tmp_path / ".metadata").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(CheckpointError, match="not the metadata"):
        read_metadata(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    there(saved("qwen2"), tmp_path / "mcore")
    deeper = save_tiny("qwen2", tmp_path / "deeper", num_hidden_layers=5)
    wider = save_tiny("qwen2", tmp_path / "wider", intermediate_size=128)
    with pytest.raises(CheckpointError, match="do not belong together"):
        to_hf(get_model_meta(deeper), tmp_path / "mcore" / "release", dtype=None, max_bytes=10**9)
    with pytest.raises(
        CheckpointError, match=r"linear_fc1.weight is \[4, 192, 64\].*\[4, 256, 64\] by config.json"
    ):
        to_hf(get_model_meta(wider), tmp_path / "mcore" / "release", dtype=None, max_bytes=10**9)
    moe = get_model_meta(saved("qwen3_moe"))
    with pytest.raises(CheckpointError, match="has no tensor"):
        to_hf(moe, tmp_path / "mcore" / "release", dtype=None, max_bytes=10**9)


def test_truncated_checkpoint_is_refused(tmp_path: Path) -> None:
    there(saved("qwen2"), tmp_path / "mcore")
    largest = max((tmp_path / "mcore" / "release").glob("*.distcp"), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"distcp holds no tensor"):
        back(saved("qwen2"), tmp_path / "mcore", tmp_path / "hf")


def test_folder_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no \.metadata"):
        find_checkpoint(tmp_path)


def test_megatron_tracker_is_followed(tmp_path: Path) -> None:
    for name in ("iter_0000020", "iter_0000100"):
        (tmp_path / name).mkdir()
        (tmp_path / name / ".metadata").touch()
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("100\n")
    assert find_checkpoint(tmp_path).name == "iter_0000100"


def test_without_a_tracker_the_highest_iteration_is_meant_or_nothing(tmp_path: Path) -> None:
    for name in ("iter_0000100", "iter_0002000"):
        (tmp_path / name).mkdir()
        (tmp_path / name / ".metadata").touch()
    assert find_checkpoint(tmp_path).name == "iter_0002000"
    (tmp_path / "iter_0000100").rename(tmp_path / "best")
    with pytest.raises(CheckpointError, match="several checkpoints: best, iter_0002000"):
        find_checkpoint(tmp_path)


def test_vocabulary_is_padded_with_zero_rows_and_comes_back_without(tmp_path: Path) -> None:
    meta = get_model_meta(saved("qwen2"))
    conversion = to_mcore(meta, saved("qwen2"), dtype=None, vocab_multiple=128, max_bytes=10**9)
    carry_out(conversion, tmp_path / "mcore", source=saved("qwen2"))
    stored = read_metadata(tmp_path / "mcore" / "release")
    assert (
        stored["embedding.word_embeddings.weight"].shape == (256, 64) == stored["output_layer.weight"].shape
    )
    back(saved("qwen2"), tmp_path / "mcore", tmp_path / "hf")
    before, after = tensors_of(saved("qwen2")), tensors_of(tmp_path / "hf")
    assert all(torch.equal(before[key], after[key]) for key in before)
