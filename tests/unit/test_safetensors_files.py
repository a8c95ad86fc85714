"""Safetensors headers: read, refused when broken, and written so that the library reads them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from megaswift.converters.shards import create, index_json, parse_size, plan_files, write_at
from megaswift.converters.tensor_files import (
    TensorInfo,
    TensorReader,
    encode_header,
    read_folder,
    read_header,
)
from megaswift.errors import ConfigError, WeightsError


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "matrix": torch.randn(6, 4, generator=generator, dtype=torch.bfloat16),
        "vector": torch.randn(5, generator=generator, dtype=torch.float16),
        "cube": torch.randn(2, 3, 5, generator=generator),
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 4),
    }


def test_header_and_bytes_agree_with_the_library(tmp_path: Path) -> None:
    expected = tensors()
    save_file(expected, tmp_path / "model.safetensors")
    infos = read_folder(tmp_path)
    assert {name: info.shape for name, info in infos.items()} == {
        name: tuple(t.shape) for name, t in expected.items()
    }
    with TensorReader(infos) as reader:
        for name, tensor in expected.items():
            raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
            assert reader.matrix(name).tobytes() == raw.tobytes()
            assert reader.matrix(name).shape == (infos[name].rows, infos[name].cols)


def test_views_may_be_changed_without_reaching_the_file(tmp_path: Path) -> None:
    save_file(tensors(), tmp_path / "model.safetensors")
    before = (tmp_path / "model.safetensors").read_bytes()
    with TensorReader(read_folder(tmp_path)) as reader:
        reader.matrix("matrix")[:] = 0
    assert (tmp_path / "model.safetensors").read_bytes() == before


def split(folder: Path, *, max_bytes: int) -> dict[str, torch.Tensor]:
    """Write the tensors through our own planned files and return them."""
    names = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}
    expected = tensors()
    wanted = [
        TensorInfo(name=name, dtype=names[t.dtype], shape=tuple(t.shape), file=folder, begin=0)
        for name, t in expected.items()
    ]
    files = plan_files(wanted, folder, max_bytes=max_bytes)
    for file in files:
        create(file)
        with file.path.open("r+b") as opened:
            for info in file.tensors:
                data = expected[info.name].contiguous().reshape(-1).view(torch.uint8).numpy()
                write_at(opened.fileno(), memoryview(data), info.begin)
    if len(files) > 1:
        (folder / "model.safetensors.index.json").write_text(index_json(files))
    return expected


@pytest.mark.parametrize("max_bytes", [10**9, 60, 1])
def test_library_reads_what_we_write(tmp_path: Path, max_bytes: int) -> None:
    expected = split(tmp_path, max_bytes=max_bytes)
    found: dict[str, torch.Tensor] = {}
    for path in tmp_path.glob("*.safetensors"):
        found |= load_file(path)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert read_folder(tmp_path).keys() == expected.keys()


def test_shards_keep_to_their_size_and_are_named_as_transformers_names_them(tmp_path: Path) -> None:
    split(tmp_path, max_bytes=60)
    names = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert names == [f"model-{i:05d}-of-{len(names):05d}.safetensors" for i in range(1, len(names) + 1)]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in tensors().values())


def test_every_tensor_begins_on_a_multiple_of_its_element_size(tmp_path: Path) -> None:
    split(tmp_path, max_bytes=10**9)
    assert all(info.begin % info.item_bytes == 0 for info in read_folder(tmp_path).values())


@pytest.mark.parametrize(
    ("text", "expected"),
    [("5GB", 5 * 10**9), ("500 MiB", 500 * 2**20), ("1.5kb", 1500), ("12", 12), ("2tib", 2 * 2**40)],
)
def test_sizes_are_parsed(text: str, expected: int) -> None:
    assert parse_size(text) == expected


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "5 apples", "5G"])
def test_other_sizes_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="max_shard_size"):
        parse_size(text)


def edit_header(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    """Return a function that changes a file's header and leaves its tensors' bytes alone."""

    def edit(path: Path) -> None:
        raw = path.read_bytes()
        end = 8 + int.from_bytes(raw[:8], "little")
        entries = json.loads(raw[8:end])
        change(entries)
        text = json.dumps(entries).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + raw[end:])

    return edit


def overlap(entries: dict[str, Any]) -> None:
    """Let two tensors of one size share their bytes, which leaves a hole elsewhere."""
    entries["b"]["data_offsets"] = entries["a"]["data_offsets"]


def name_twice(path: Path) -> None:
    raw = path.read_bytes()
    text = raw[8 : 8 + int.from_bytes(raw[:8], "little")].replace(b'"b"', b'"a"')
    path.write_bytes(raw[:8] + text + raw[8 + len(text) :])


BREAKAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-3]), "end at byte"),
    "with bytes after the last tensor": (
        lambda path: path.write_bytes(path.read_bytes() + b"xx"),
        "end at byte",
    ),
    "empty": (lambda path: path.write_bytes(b""), "claims"),
    "a git-lfs pointer": (
        lambda path: path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n"),
        "claims",
    ),
    "not JSON": (
        lambda path: path.write_bytes((4).to_bytes(8, "little") + b"spam"),
        "not a safetensors header",
    ),
    "overlapping": (edit_header(overlap), "overlap"),
    "of an unknown dtype": (edit_header(lambda entries: entries["a"].update(dtype="Q4")), "unknown dtype"),
    "of a shape that does not fit its bytes": (
        edit_header(lambda e: e["a"].update(shape=[3, 3])),
        "16 bytes",
    ),
    "of negative shape": (edit_header(lambda e: e["a"].update(shape=[-2, -2])), "16 bytes"),
    "without offsets": (
        edit_header(lambda entries: entries["a"].pop("data_offsets")),
        "not a safetensors header",
    ),
    "naming a tensor twice": (name_twice, "twice"),
}


@pytest.mark.parametrize("kind", BREAKAGES)
def test_broken_file_is_refused_by_name(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(2, 2), "b": torch.zeros(2, 2)}, path)
    breaks, message = BREAKAGES[kind]
    breaks(path)
    with pytest.raises(WeightsError, match=message) as caught:
        read_header(path)
    assert str(path) in str(caught.value)


def test_missing_shard_is_named(tmp_path: Path) -> None:
    split(tmp_path, max_bytes=60)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"model-00002-of-00003\.safetensors is missing"):
        read_folder(tmp_path)


def test_index_that_names_a_tensor_its_file_lacks_is_refused(tmp_path: Path) -> None:
    split(tmp_path, max_bytes=60)
    index = tmp_path / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    values["weight_map"]["ghost"] = "model-00001-of-00003.safetensors"
    index.write_text(json.dumps(values))
    with pytest.raises(WeightsError, match="lacks the tensor ghost"):
        read_folder(tmp_path)


def test_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    for number in (1, 2):
        save_file({"twin": torch.ones(2)}, tmp_path / f"model-0000{number}-of-00002.safetensors")
    weight_map = {"twin": "model-00001-of-00002.safetensors", "other": "model-00002-of-00002.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(WeightsError, match="twin lies in"):
        read_folder(tmp_path)


@pytest.mark.parametrize("text", ["[]", "{}", "not json", '{"weight_map": 3}'])
def test_index_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(WeightsError, match="not a safetensors index"):
        read_folder(tmp_path)


def test_pickle_checkpoint_is_refused_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model-00001-of-00002.bin").write_bytes(b"")
    with pytest.raises(WeightsError, match="safe_serialization"):
        read_folder(tmp_path)


def test_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="neither"):
        read_folder(tmp_path)


def test_header_is_padded_to_eight_bytes() -> None:
    for length in range(1, 20):
        header, begins = encode_header([("x" * length, "F32", (2,))])
        assert len(header) % 8 == 0
        assert begins["x" * length] == len(header)


def test_elements_travel_as_their_bits(tmp_path: Path) -> None:
    save_file(
        {"nan": torch.tensor([float("nan"), -0.0, 1.0], dtype=torch.bfloat16)}, tmp_path / "model.safetensors"
    )
    with TensorReader(read_folder(tmp_path)) as reader:
        assert reader.matrix("nan").dtype == np.uint16
        assert reader.matrix("nan")[1:, 0].tolist() == [0x8000, 0x3F80]
