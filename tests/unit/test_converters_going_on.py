"""Conversions that are interrupted, repeated, or shared by several processes end with the bytes of one that is not."""

import json
import multiprocessing as mp
import os
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from megaswift.converters import conversion as conversion_module
from megaswift.converters.conversion import Conversion, Part, Stretch, carry_out
from megaswift.converters.copying import Literal, SpanWriter
from megaswift.converters.offline import to_mcore
from megaswift.errors import CheckpointError, ConfigError
from megaswift.metadata.read import get_model_meta
from tests.harness.conversions import files_of, saved, there


def one_of_several(folder: Path, output: Path, rank: int, world: int, *, fsync: bool | None = None) -> None:
    """Write this process's share of a conversion."""
    conversion = to_mcore(get_model_meta(folder), folder, dtype=None, vocab_multiple=1, max_bytes=30_000)
    carry_out(conversion, output, source=folder, rank=rank, world=world, fsync=fsync)


def run_several(output: Path, world: int) -> None:
    """Convert by so many processes."""
    context = mp.get_context("fork")  # nothing here needs torch's threads
    workers = [
        context.Process(target=one_of_several, args=(saved("mixtral"), output, rank, world))
        for rank in range(world)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
        assert worker.exitcode == 0


def test_several_processes_write_the_bytes_of_one(tmp_path: Path) -> None:
    there(saved("mixtral"), tmp_path / "one", max_bytes=30_000, fsync=True)  # as several do
    run_several(tmp_path / "many", 3)
    assert len(list((tmp_path / "one" / "release").glob("*.distcp"))) > 10
    assert files_of(tmp_path / "one") == files_of(tmp_path / "many")


EVENTS = ("pwrite", "ftruncate", "fsync", "rename", "mkdir", "unlink")  # of os


def convert_and_die(folder: Path, output: Path, events: int, *, fsync: bool) -> None:
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
    one_of_several(folder, output, 0, 1, fsync=fsync)


def killed_after(folder: Path, output: Path, events: int, *, fsync: bool) -> bool:
    """Whether a conversion in a process of its own was killed after so many calls, rather than ready before."""
    process = mp.get_context("fork").Process(
        target=convert_and_die, args=(folder, output, events), kwargs={"fsync": fsync}
    )
    process.start()
    process.join(120)
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


@pytest.mark.parametrize("fsync", [False, True])
def test_conversion_killed_at_twenty_moments_is_never_taken_for_complete_and_ends_with_the_same_bytes(
    tmp_path: Path, fsync: bool
) -> None:
    there(saved("mixtral"), tmp_path / "whole", max_bytes=30_000, fsync=fsync)
    whole, output, draw = files_of(tmp_path / "whole"), tmp_path / "out", random.Random(0)
    kills, partly = 0, 0
    while kills < 20:
        if killed_after(saved("mixtral"), output, draw.randint(1, 120), fsync=fsync):
            kills += 1
            partly += 0 < len(list(tmp_path.glob("out.incomplete/release/*.distcp"))) < len(whole)
            assert not output.exists() or files_of(output) == whole  # a kill after the last rename
        if output.exists():
            assert files_of(output) == whole
            shutil.rmtree(output)
    assert partly > 5
    assert not killed_after(saved("mixtral"), output, 10**9, fsync=fsync)
    assert files_of(output) == whole


def full_disk(*_: object, **rest: object) -> None:
    raise OSError(28, "No space left")


def test_another_plan_does_not_go_on_from_these_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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


def test_complete_parts_are_not_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_complete_output_is_left_alone(tmp_path: Path) -> None:
    there(saved("qwen2"), tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    there(saved("qwen2"), tmp_path / "out")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before


def lose_power(path: Path) -> None:
    """Leave of a file what a file system keeps whose data had not been written: its length."""
    num_bytes = path.stat().st_size
    path.write_bytes(b"")
    os.truncate(path, num_bytes)


def test_output_that_a_loss_of_power_has_damaged_is_written_again(tmp_path: Path) -> None:
    there(saved("qwen2"), tmp_path / "out")
    whole = files_of(tmp_path / "out")
    lose_power(next((tmp_path / "out" / "release").glob("*.distcp")))
    assert files_of(tmp_path / "out") != whole
    there(saved("qwen2"), tmp_path / "out")
    assert files_of(tmp_path / "out") == whole


@pytest.mark.parametrize("fsync", [False, True])
def test_part_without_checksums_is_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fsync: bool
) -> None:
    there(saved("qwen2"), tmp_path / "whole", max_bytes=50_000, fsync=fsync)
    interrupt_at_the_end(tmp_path / "out", monkeypatch, fsync=fsync)
    progress = tmp_path / "out.incomplete" / "progress-0.jsonl"
    os.truncate(progress, progress.stat().st_size // 2)
    parts = sorted((tmp_path / "out.incomplete" / "release").glob("*.distcp"))
    before = {path.name: path.stat().st_mtime_ns for path in parts}
    there(saved("qwen2"), tmp_path / "out", max_bytes=50_000, fsync=fsync)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")
    after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out" / "release").glob("*.distcp")}
    assert 0 < sum(after[name] != changed for name, changed in before.items()) < len(before)


def fail_at_the_end(output: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Leave what two processes have converted without its name, and return the folder."""
    with monkeypatch.context() as patch:
        patch.setattr(conversion_module, "_finish", full_disk)
        other = Thread(target=one_of_several, args=(saved("mixtral"), output, 1, 2))
        other.start()
        with pytest.raises(CheckpointError, match="No space left"):
            one_of_several(saved("mixtral"), output, 0, 2)
        other.join(120)
    return output.with_name(output.name + ".incomplete")


def test_parts_whose_checksums_are_lost_are_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_several(tmp_path / "whole", 2)
    growing = fail_at_the_end(tmp_path / "out", monkeypatch)
    (growing / "progress-1.jsonl").unlink()
    (growing / "release" / "left.partial").write_bytes(b"half")
    run_several(tmp_path / "out", 2)
    (tmp_path / "out" / "release" / "left.partial").unlink()
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def test_process_that_comes_late_leaves_its_parts_alone_while_process_0_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_several(tmp_path / "whole", 2)
    fail_at_the_end(tmp_path / "out", monkeypatch)
    real_parts, real_publish = conversion_module._write_parts, conversion_module.publish

    def late(*arguments: Any, **rest: Any) -> None:
        """Process 0 has removed what was noted, and not yet given the folder its name."""
        monkeypatch.setattr(conversion_module, "_write_parts", real_parts)

        def publish(*folders: Path, fsync: bool) -> None:
            monkeypatch.setattr(conversion_module, "publish", real_publish)
            real_parts(*arguments, **rest)
            real_publish(*folders, fsync=fsync)

        monkeypatch.setattr(conversion_module, "publish", publish)
        one_of_several(saved("mixtral"), tmp_path / "out", 0, 2)

    monkeypatch.setattr(conversion_module, "_write_parts", late)
    one_of_several(saved("mixtral"), tmp_path / "out", 1, 2)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def interrupt_at_the_end(output: Path, monkeypatch: pytest.MonkeyPatch, *, fsync: bool) -> None:
    """Leave a conversion whose parts are there, and which has no name yet."""
    with monkeypatch.context() as patch:
        patch.setattr(conversion_module, "_finish", full_disk)
        with pytest.raises(CheckpointError, match="No space left"):
            there(saved("qwen2"), output, max_bytes=50_000, fsync=fsync)


def test_part_that_a_loss_of_power_has_damaged_is_written_again_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there(saved("qwen2"), tmp_path / "whole", max_bytes=50_000)
    interrupt_at_the_end(tmp_path / "out", monkeypatch, fsync=False)
    parts = sorted((tmp_path / "out.incomplete" / "release").glob("*.distcp"))
    lose_power(parts[1])
    before = {path.name: path.stat().st_mtime_ns for path in parts}
    there(saved("qwen2"), tmp_path / "out", max_bytes=50_000)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")
    after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out" / "release").glob("*.distcp")}
    assert [name for name in before if after[name] != before[name]] == [parts[1].name]


def test_output_that_nobody_waited_for_is_written_again_where_fsync_is_asked_for(tmp_path: Path) -> None:
    there(saved("qwen2"), tmp_path / "out")
    assert not json.loads((tmp_path / "out" / "conversion.json").read_text())["fsync"]
    there(saved("qwen2"), tmp_path / "out", fsync=True)
    assert json.loads((tmp_path / "out" / "conversion.json").read_text())["fsync"]


def test_several_processes_wait_for_the_disk(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="fsync false is for one process, and 2 share"):
        one_of_several(saved("qwen2"), tmp_path / "out", 0, 2, fsync=False)


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


def test_edited_settings_are_written_though_the_weights_are_the_same(tmp_path: Path) -> None:
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
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    meta, output = get_model_meta(saved("qwen2")), tmp_path / "out"
    plan = to_mcore(meta, saved("qwen2"), dtype=None, vocab_multiple=1, max_bytes=10**9)

    def meanwhile(*arguments: object) -> None:
        """Process 0 finishes between this process's first look and its next."""
        monkeypatch.undo()
        monkeypatch.setattr(conversion_module, "STALL_S", 1.0)
        carry_out(plan, output, source=saved("qwen2"), fsync=True)  # as several do

    monkeypatch.setattr(conversion_module.time, "sleep", meanwhile)
    assert carry_out(plan, output, source=saved("qwen2"), rank=1, world=2) == output
