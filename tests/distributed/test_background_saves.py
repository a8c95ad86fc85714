"""Saves that are written while the training goes on: the same checkpoint as one that the training waits for."""

import errno
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from torch.distributed.checkpoint import FileSystemWriter

from megaswift.checkpoint.store import Store
from megaswift.errors import CheckpointError
from megaswift.training.loop import Progress
from megaswift.training.saver import Saver
from tests.distributed.test_resume import case_of, model_of
from tests.harness.distributed import run_distributed
from tests.harness.training import Case, Curve, Trained, prepared, resumed_curve, saver_of, steps

SAVED_AT, LAST = 2, 4


def progress_at(trained: Trained, step: int) -> Progress:
    return Progress(step=step, updates=step, consumed_samples=step * trained.feed.items_per_step)


def background_saver(trained: Trained, output_dir: Path) -> Saver:
    saver = saver_of(trained, output_dir)
    checkpoint = replace(trained.run.checkpoint, async_save=True)
    saver.run = replace(trained.run, checkpoint=checkpoint)
    return saver


def saved_twice(rank: int, world_size: int, folder: Path, case: Case, waited: Path, beside: Path) -> Curve:
    """Save at once and in the background, and write the latter when all other steps are made; return those steps."""
    write, may_write = FileSystemWriter.write_data, threading.Event()

    def late(*args: Any) -> Any:
        assert may_write.wait(60)
        return write(*args)

    with prepared(folder, case) as trained:
        steps(trained, 0, SAVED_AT)
        saver, progress = background_saver(trained, beside), progress_at(trained, SAVED_AT)
        assert saver_of(trained, waited)(progress) is not None
        with patch.object(FileSystemWriter, "write_data", late):
            assert saver(progress) is None
            curve = steps(trained, SAVED_AT, LAST)
            assert saver.is_under_way
            assert not saver.is_written()
            assert Store(beside).complete() == []
            may_write.set()
            assert saver.finish() is not None
        assert not saver.is_under_way
        return curve


@pytest.mark.ranks(2)
@pytest.mark.parametrize(
    ("run", "layout"),
    [("bfloat16", "dp2 distopt"), ("galore", "dp2"), ("bfloat16", "tp2 sp"), ("experts", "pp2")],
)
def test_what_is_written_later_is_the_state_of_its_step(run: str, layout: str, tmp_path: Path) -> None:
    waited, beside = tmp_path / "waited", tmp_path / "beside"
    curve = run_distributed(saved_twice, 2, model_of(run), case_of(run, layout), waited, beside)[0]
    (expected,), (found,) = Store(waited).complete(), Store(beside).complete()
    assert replace(found.manifest, files={}) == replace(expected.manifest, files={})
    assert found.manifest.files.keys() == expected.manifest.files.keys()
    written = [name for name in found.manifest.files if name.endswith(".distcp")]
    assert len(written) == 2
    for name in written:
        assert (found.folder / name).read_bytes() == (expected.folder / name).read_bytes()
    resumed = run_distributed(resumed_curve, 2, model_of(run), case_of(run, layout), beside, LAST)[0]
    assert resumed == curve


def refused(rank: int, world_size: int, folder: Path, case: Case, output: Path) -> tuple[str, int]:
    """Save in the background, then again on a disk that is full for the last rank; return how that ended."""

    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with prepared(folder, case) as trained:
        saver = background_saver(trained, output)
        saver(progress_at(trained, 1))
        finished_s = saver.finish()
        assert finished_s is not None
        with patch.object(FileSystemWriter, "write_data", full if rank == 1 else FileSystemWriter.write_data):
            assert saver(progress_at(trained, 2)) is None
            try:
                saver(progress_at(trained, 3))
            except CheckpointError as error:
                return str(error), error.exit_code
            except SystemExit as error:
                assert isinstance(error.code, int)
                return "", error.code
    raise AssertionError("a save that failed passed for a checkpoint")


@pytest.mark.ranks(2)
def test_a_full_disk_is_found_with_the_next_save_and_told_once(tmp_path: Path) -> None:
    ends = run_distributed(refused, 2, model_of("experts"), case_of("experts", "dp2 distopt"), tmp_path)
    assert ends == [
        (
            "The checkpoint of step 2 could not be written: No space left on device. Older checkpoints are intact. "
            "Free some space and start the same command again.",
            2,
        ),
        ("", 2),
    ]
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]
    assert len(Store(tmp_path).complete()) == 1
