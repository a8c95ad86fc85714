"""Offline conversion: bytes land where both sides expect them, interrupted work goes on, broken input is refused."""

import io
import json
import multiprocessing as mp
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megaswift.cli.main import main
from megaswift.converters import conversion as conversion_module
from megaswift.converters.conversion import Conversion, Part, Stretch, carry_out
from megaswift.converters.copying import Literal, SpanWriter
from megaswift.converters.dcp_items import empty_object, find_data, wrap
from megaswift.converters.dcp_metadata import read_metadata
from megaswift.converters.dtypes import cast
from megaswift.converters.offline import find_checkpoint, to_hf, to_mcore
from megaswift.errors import CheckpointError
from megaswift.metadata.read import get_model_meta
from tests.harness.tiny import save_tiny

NAMES = ("llama-tied", "qwen2", "qwen3_moe", "qwen2_moe-mixed", "mixtral")
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that saves a tiny model once."""
    root = tmp_path_factory.mktemp("models")

    def save(name: str) -> Path:
        return root / name if (root / name).exists() else save_tiny(name, root / name, dtype=torch.bfloat16)

    return save


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
    return found


def there(folder: Path, output: Path, *, max_bytes: int = 100_000, dtype: str | None = None) -> Path:
    meta = get_model_meta(folder)
    conversion = to_mcore(meta, folder, dtype=dtype, vocab_multiple=1, max_bytes=max_bytes)
    return carry_out(conversion, output, source=folder)


def back(folder: Path, checkpoint: Path, output: Path, *, dtype: str | None = None) -> Path:
    conversion = to_hf(get_model_meta(folder), find_checkpoint(checkpoint), dtype=dtype, max_bytes=120_000)
    return carry_out(conversion, output, source=checkpoint)


@pytest.mark.parametrize("name", NAMES)
def test_there_and_back_is_bit_identical(saved: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    there(saved(name), tmp_path / "mcore")
    back(saved(name), tmp_path / "mcore", tmp_path / "hf")
    before, after = tensors_of(saved(name)), tensors_of(tmp_path / "hf")
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    sums = [
        json.loads((tmp_path / side / "conversion.json").read_text())["tensors"] for side in ("mcore", "hf")
    ]
    assert sums[0] == sums[1] and sums[0].keys() == before.keys()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "mcore"]


def test_dtype_changes_as_torch_rounds(saved: Callable[[str], Path], tmp_path: Path) -> None:
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


def test_metadata_is_what_torch_reads(saved: Callable[[str], Path], tmp_path: Path) -> None:
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


def test_metadata_is_what_torch_would_write(saved: Callable[[str], Path], tmp_path: Path) -> None:
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


def test_conversion_loads_no_torch(saved: Callable[[str], Path], tmp_path: Path) -> None:
    code = "import sys; from megaswift.cli.main import main; assert main(sys.argv[1:]) == 0; assert 'torch' not in sys.modules"
    for source, to in ((saved("mixtral"), "mcore"), (tmp_path / "mcore", "hf")):
        argv = ["convert", "--model", str(source), "--to", to, "--output_dir", str(tmp_path / to)]
        subprocess.run([sys.executable, "-c", code, *argv], check=True)


def test_metadata_that_would_run_code_is_refused_and_runs_nothing(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "ran",))

    (tmp_path / ".metadata").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(CheckpointError, match="not the metadata"):
        read_metadata(tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 5), (7,), (), (1, 2, 3, 4), (0, 3)])
def test_items_are_what_torch_saves(tmp_path: Path, dtype: str, shape: tuple[int, ...]) -> None:
    expected = torch.randn(shape).to(DTYPES[dtype])
    raw = expected.reshape(-1).view(torch.uint8).numpy().tobytes()
    wrapping = wrap(dtype, shape)
    ours = wrapping.before + raw + wrapping.after
    found = torch.load(io.BytesIO(ours), weights_only=True)
    assert torch.equal(found, expected) and found.dtype == expected.dtype
    theirs = io.BytesIO()
    torch.save(expected, theirs)
    for item in (ours, theirs.getvalue()):
        (tmp_path / "file").write_bytes(b"before" + item + b"after")
        begin = find_data(tmp_path / "file", offset=6, length=len(item), num_bytes=len(raw))
        assert (tmp_path / "file").read_bytes()[begin : begin + len(raw)] == raw


def test_empty_object_is_a_list_of_none() -> None:
    assert torch.load(io.BytesIO(empty_object()), weights_only=True) == [None]


def test_items_beyond_four_gigabytes_are_zip64(tmp_path: Path) -> None:
    shape = (70_000, 32_768)
    wrapping, num_bytes = wrap("BF16", shape), 2 * 70_000 * 32_768
    with (tmp_path / "huge").open("wb") as file:  # a hole on the disk
        file.write(wrapping.before)
        file.seek(len(wrapping.before) + num_bytes - 2)
        file.write(b"\x80\x3f" + wrapping.after)
    assert zipfile.ZipFile(tmp_path / "huge").infolist()[-1].file_size == num_bytes
    assert torch.load(tmp_path / "huge", weights_only=True, mmap=True)[-1, -1] == 1
    length = (tmp_path / "huge").stat().st_size
    assert find_data(tmp_path / "huge", offset=0, length=length, num_bytes=num_bytes) == len(wrapping.before)


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def one_of_several(folder: Path, output: Path, rank: int, world: int) -> None:
    """Write this process's share of a conversion."""
    conversion = to_mcore(get_model_meta(folder), folder, dtype=None, vocab_multiple=1, max_bytes=30_000)
    carry_out(conversion, output, source=folder, rank=rank, world=world)


def test_several_processes_write_the_bytes_of_one(saved: Callable[[str], Path], tmp_path: Path) -> None:
    there(saved("mixtral"), tmp_path / "one", max_bytes=30_000)
    context = mp.get_context("fork")  # nothing here needs torch's threads
    workers = [
        context.Process(target=one_of_several, args=(saved("mixtral"), tmp_path / "many", rank, 3))
        for rank in range(3)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
        assert worker.exitcode == 0
    assert len(list((tmp_path / "one" / "release").glob("*.distcp"))) > 10
    assert files_of(tmp_path / "one") == files_of(tmp_path / "many")


EVENTS = ("pwrite", "ftruncate", "fsync", "rename", "mkdir", "unlink")  # of os


def convert_and_die(folder: Path, output: Path, events: int) -> None:
    """Convert in this process, which kills itself in the middle of its n-th call that changes the disk."""
    left = events

    def counted(call: Callable[..., Any], name: str) -> Callable[..., Any]:
        def dying(*args: Any, **rest: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                if name == "pwrite":
                    call(args[0], args[1][: len(args[1]) // 2], args[2])  # half of what was to be written
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **rest)

        return dying

    for name in EVENTS:
        setattr(os, name, counted(getattr(os, name), name))
    one_of_several(folder, output, 0, 1)


def killed_after(folder: Path, output: Path, events: int) -> bool:
    """Whether a conversion in a process of its own was killed after so many calls, rather than ready before."""
    process = mp.get_context("fork").Process(target=convert_and_die, args=(folder, output, events))
    process.start()
    process.join(120)
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


def test_conversion_killed_at_twenty_moments_is_never_taken_for_complete_and_ends_with_the_same_bytes(
    saved: Callable[[str], Path], tmp_path: Path
) -> None:
    there(saved("mixtral"), tmp_path / "whole", max_bytes=30_000)
    whole, output, draw = files_of(tmp_path / "whole"), tmp_path / "out", random.Random(0)
    kills, partly = 0, 0
    while kills < 20:
        if killed_after(saved("mixtral"), output, draw.randint(1, 120)):
            kills += 1
            partly += 0 < len(list(tmp_path.glob("out.incomplete/release/*.distcp"))) < len(whole)
            assert not output.exists() or files_of(output) == whole  # a kill after the last rename
        if output.exists():
            assert files_of(output) == whole
            shutil.rmtree(output)
    assert partly > 5
    assert not killed_after(saved("mixtral"), output, 10**9)
    assert files_of(output) == whole


def full_disk(*_: object, **rest: object) -> None:
    raise OSError(28, "No space left")


def test_another_plan_does_not_go_on_from_these_parts(
    saved: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    meta = get_model_meta(saved("qwen2"))
    first = to_mcore(meta, saved("qwen2"), dtype=None, vocab_multiple=1, max_bytes=50_000)
    with monkeypatch.context() as patch:
        patch.setattr(conversion_module, "_finish", full_disk)
        with pytest.raises(CheckpointError, match=r"No space left.*goes on where it stopped"):
            carry_out(first, tmp_path / "out", source=saved("qwen2"))
    assert not (tmp_path / "out").exists()
    there(saved("qwen2"), tmp_path / "out", dtype="float32")
    there(saved("qwen2"), tmp_path / "fresh", dtype="float32")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "fresh")


def test_complete_parts_are_not_written_again(
    saved: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    conversion = to_mcore(
        get_model_meta(saved("qwen2")), saved("qwen2"), dtype=None, vocab_multiple=1, max_bytes=50_000
    )
    written: list[str] = []

    def counting(path: Path, num_bytes: int) -> SpanWriter:
        if len(written) == 3:
            raise OSError(28, "No space left on device")
        written.append(path.name)
        return SpanWriter(path, num_bytes)

    monkeypatch.setattr(conversion_module, "THREADS", 1)
    monkeypatch.setattr(conversion_module, "SpanWriter", counting)
    with pytest.raises(CheckpointError, match="No space left on device"):
        carry_out(conversion, tmp_path / "out", source=saved("qwen2"))
    monkeypatch.setattr(
        conversion_module,
        "SpanWriter",
        lambda path, num_bytes: (written.append(path.name), SpanWriter(path, num_bytes))[1],
    )
    carry_out(conversion, tmp_path / "out", source=saved("qwen2"))
    assert len(written) == len(set(written)) == len(conversion.parts) > 4


def test_complete_output_is_left_alone(saved: Callable[[str], Path], tmp_path: Path) -> None:
    there(saved("qwen2"), tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    there(saved("qwen2"), tmp_path / "out")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before


def test_process_that_is_gone_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversion_module, "STALL_S", 0.3)
    stretch = Stretch(spans=(Literal(at=0, data=b"data"),), summed=())
    parts = tuple(Part(name=f"part-{i}", num_bytes=4, stretches=(stretch,)) for i in range(2))
    with pytest.raises(CheckpointError, match="A process is gone"):
        carry_out(
            Conversion(parts=parts, facts={}, begin=lambda growing: None),
            tmp_path / "out",
            source=tmp_path / "in",
            world=2,
        )


def test_checkpoint_of_another_model_is_refused(saved: Callable[[str], Path], tmp_path: Path) -> None:
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


def test_truncated_checkpoint_is_refused(saved: Callable[[str], Path], tmp_path: Path) -> None:
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


def test_edited_settings_are_written_though_the_weights_are_the_same(
    saved: Callable[[str], Path], tmp_path: Path
) -> None:
    source = tmp_path / "source"
    shutil.copytree(saved("qwen2"), source)
    there(source, tmp_path / "out")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "rope_theta": 5e5}))
    (source / "chat_template.jinja").write_text("{{ messages }}")
    there(source, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "hf" / "config.json").read_text())["rope_theta"] == 5e5
    assert (tmp_path / "out" / "hf" / "chat_template.jinja").exists()


def test_process_that_comes_when_all_is_done_is_done_too(
    saved: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    meta, output = get_model_meta(saved("qwen2")), tmp_path / "out"
    plan = to_mcore(meta, saved("qwen2"), dtype=None, vocab_multiple=1, max_bytes=10**9)

    def meanwhile(*arguments: object) -> None:
        """Process 0 finishes between this process's first look and its next."""
        monkeypatch.undo()
        monkeypatch.setattr(conversion_module, "STALL_S", 1.0)
        carry_out(plan, output, source=saved("qwen2"))

    monkeypatch.setattr(conversion_module.time, "sleep", meanwhile)
    assert carry_out(plan, output, source=saved("qwen2"), rank=1, world=2) == output


def test_vocabulary_is_padded_with_zero_rows_and_comes_back_without(
    saved: Callable[[str], Path], tmp_path: Path
) -> None:
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


def test_command_line_converts_both_ways(
    saved: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert (
        main(
            [
                "convert",
                "--model",
                str(saved("qwen3_moe")),
                "--to",
                "mcore",
                "--output_dir",
                "mcore",
                "--tp",
                "2",
                "--ep",
                "2",
            ]
        )
        == 0
    )
    assert (
        main(["convert", "--model", "mcore", "--to", "hf", "--output_dir", "hf", "--max_shard_size", "50KB"])
        == 0
    )
    before, after = tensors_of(saved("qwen3_moe")), tensors_of(tmp_path / "hf")
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


def test_dry_run_needs_a_config_alone(
    saved: Callable[[str], Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    config = saved("qwen3_moe") / "config.json"
    assert main(["convert", "--model", str(config), "--dry_run", "--tp", "2", "--pp", "2", "--ep", "4"]) == 0
    assert "tp=2 pp=2 ep=4" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--to", "mcore"], "model is missing"),
        (["--model", "{model}"], "to and output_dir are needed"),
        (["--model", "{model}", "--to", "mcore", "--output_dir", "out", "--spam", "1"], "spam is not a flag"),
        (["--model", "{model}", "--to", "mcore", "--output_dir", "{model}"], "is read from"),
        (["--model", "{model}/config.json", "--to", "mcore", "--output_dir", "out"], "is a file"),
        (["--model", "{model}", "--to", "hf", "--output_dir", "out"], "hf_model"),
        (["--model", "{model}", "--dry_run", "--tp", "7", "--etp", "7"], "etp=7 does not cut"),
        (["--model", "{model}", "--dry_run", "--ep", "3"], "ep=3 does not divide num_experts=4"),
        (
            ["--model", "{model}", "--to", "mcore", "--output_dir", "out", "--max_shard_size", "big"],
            "max_shard_size=big",
        ),
    ],
)
def test_bad_requests_are_user_errors(
    saved: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    argv: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["convert", *(word.format(model=saved("qwen3_moe")) for word in argv)]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_gap_in_the_files_stops_the_command(
    saved: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(saved("mixtral"), folder)
    from safetensors.torch import save_file

    tensors = tensors_of(folder)
    tensors.pop("model.layers.2.block_sparse_moe.experts.3.w2.weight")
    save_file(tensors, folder / "model.safetensors")
    assert main(["convert", "--model", str(folder), "--dry_run"]) == 2
    assert "missing: model.layers.2.block_sparse_moe.experts.3.w2.weight" in capsys.readouterr().err
