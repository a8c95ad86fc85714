"""The folder of checkpoints: complete or absent, newest first, and never without the last complete one."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from megaswift.checkpoint import store as store_module
from megaswift.checkpoint.resume import check_identity, find_checkpoint, named_folder
from megaswift.checkpoint.store import Checkpoint, Criterion, Manifest, Store, read_checkpoint
from megaswift.errors import CheckpointError


def manifest(step: int, **values: Any) -> Manifest:
    given = {
        "updates": step,
        "consumed_samples": step * 4,
        "resumable": True,
        "layout": {"tp": 1},
        "identity": {},
    }
    return Manifest(step=step, seed=1, **{**given, **values})


def save(store: Store, step: int, text: str = "weights", **values: Any) -> Checkpoint:
    folder = store.begin(step)
    (folder / "hf").mkdir()
    (folder / "hf" / "model.safetensors").write_text(text)
    return store.commit(folder, manifest(step, **values))


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_saved_checkpoint_is_read_back_with_its_files_and_sizes(tmp_path: Path) -> None:
    saved = save(Store(tmp_path), 5, "12345")
    found = read_checkpoint(tmp_path / "checkpoint-5")
    assert found == saved
    assert found.manifest.files == {"hf/model.safetensors": 5}
    assert (tmp_path / "latest").read_text() == "checkpoint-5\n"
    assert names(tmp_path) == {"checkpoint-5", "latest"}


def test_a_save_without_manifest_is_ignored_and_cleaned(tmp_path: Path) -> None:
    store = Store(tmp_path)
    save(store, 5)
    half = store.begin(6)
    (half / "shard").write_text("half")
    latest = store.latest_complete()
    assert latest is not None and latest.manifest.step == 5
    store.clean()
    assert names(tmp_path) == {"checkpoint-5", "latest"}


def test_every_write_point_of_a_commit_leaves_a_complete_newest_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Killed after n system calls that change or sync something, the folder holds the old or the new checkpoint, whole.
    calls, limit = 0, 0

    class Killed(BaseException):
        pass

    def counted(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls > limit:
                raise Killed
            return function(*args, **kwargs)

        return call

    real = {"fsync": os.fsync, "replace": os.replace, "rmtree": store_module.shutil.rmtree}
    outcomes = []
    for limit in range(40):
        folder = tmp_path / str(limit)
        store = Store(folder)
        save(store, 5, "old")
        save(store, 7, "replaced")
        begun = store.begin(7)
        (begun / "weights").write_text("new")
        calls = 0
        monkeypatch.setattr(os, "fsync", counted(real["fsync"]))
        monkeypatch.setattr(os, "replace", counted(real["replace"]))
        monkeypatch.setattr(store_module.shutil, "rmtree", counted(real["rmtree"]))
        try:
            store.commit(begun, manifest(7))
            finished = True
        except Killed:
            finished = False
        monkeypatch.setattr(os, "fsync", real["fsync"])
        monkeypatch.setattr(os, "replace", real["replace"])
        monkeypatch.setattr(store_module.shutil, "rmtree", real["rmtree"])
        store.clean()
        steps = [checkpoint.manifest.step for checkpoint in store.complete()]
        assert steps == [5, 7], f"after {limit} calls"
        outcomes.append("weights" in store.complete()[-1].manifest.files)
        assert not list(folder.glob("*.partial")) and not list(folder.glob("*.replaced"))
        if finished:
            break
    assert finished and outcomes[0] is False and outcomes[-1] is True


def test_the_newest_checkpoint_is_the_one_saved_last_not_the_highest_step(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for step in (5, 10, 6):  # a run that went back to step 5 and on from there
        save(store, step)
    latest = store.latest_complete()
    assert latest is not None and latest.manifest.step == 6


@pytest.mark.parametrize("damage", ["shorter", "missing", "manifest"])
def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path, damage: str) -> None:
    store = Store(tmp_path)
    save(store, 5)
    folder = save(store, 6).folder
    weights = folder / "hf" / "model.safetensors"
    if damage == "shorter":
        weights.write_text("x")
    elif damage == "missing":
        weights.unlink()
    else:
        (folder / "manifest.json").write_text("{")
    latest = store.latest_complete()
    assert latest is not None and latest.manifest.step == 5
    with pytest.raises(CheckpointError, match=r"damaged|cannot be read"):
        read_checkpoint(folder)


def test_rotation_keeps_the_newest(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for step in (1, 2, 3):
        save(store, step)
    store.rotate(None)
    assert len(store.complete()) == 3
    store.rotate(2)
    assert [checkpoint.manifest.step for checkpoint in store.complete()] == [2, 3]
    store.rotate(0)
    assert [checkpoint.manifest.step for checkpoint in store.complete()] == [3]
    assert names(tmp_path) == {"checkpoint-3", "latest"}


def test_the_best_checkpoint_is_named_and_kept(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for step, loss in enumerate((3.0, 2.0, float("nan"), 2.0, None), start=1):
        seen = None if loss is None else {"step": step, "loss": loss}
        save(store, step, validations=seen)
        store.rotate(1)
    # The loss of another step says nothing about this one.
    save(store, 6, validations={"step": 5, "loss": 1.0})
    store.rotate(2)
    assert [checkpoint.manifest.step for checkpoint in store.complete()] == [2, 5, 6]
    assert (tmp_path / "best").read_text() == "checkpoint-2\n"
    save(store, 7, validations={"step": 7, "loss": 1.5})
    store.rotate(1)
    assert names(tmp_path) == {"checkpoint-7", "latest", "best"}
    assert (tmp_path / "best").read_text() == "checkpoint-7\n"


def test_the_best_checkpoint_is_that_of_another_figure(tmp_path: Path) -> None:
    """An older manifest, which has the loss alone, has no say; equal figures leave the older one the best."""
    store = Store(tmp_path, criterion=Criterion(metric="token_acc", greater_is_better=True))
    save(store, 1, validations={"step": 1, "loss": 0.1, "lowest": 0.1, "since": 0})
    assert not (tmp_path / "best").exists()
    for step, accuracy in enumerate((0.5, 0.75, 0.75, float("nan"), 0.25), start=2):
        save(store, step, validations={"step": step, "figures": {"loss": 1 / step, "token_acc": accuracy}})
        store.rotate(1)
    assert (tmp_path / "best").read_text() == "checkpoint-3\n"
    assert [checkpoint.manifest.step for checkpoint in store.complete()] == [3, 6]
    by_loss = Store(tmp_path).best()
    assert by_loss is not None and by_loss.manifest.step == 6


def test_no_checkpoint_is_named_the_best_that_lacks_the_figure(tmp_path: Path) -> None:
    save(Store(tmp_path), 1, validations={"step": 1, "figures": {"loss": 1.0}})
    assert (tmp_path / "best").read_text() == "checkpoint-1\n"
    store = Store(tmp_path, criterion=Criterion(metric="accuracy", greater_is_better=True))
    save(store, 2, validations={"step": 2, "figures": {"loss": 0.5}})
    assert store.best() is None and not (tmp_path / "best").exists()


def test_a_named_checkpoint_is_gone_back_to_once(tmp_path: Path) -> None:
    store = Store(tmp_path)
    save(store, 5)
    save(store, 9)
    named = str(tmp_path / "checkpoint-5")
    assert find_checkpoint(store, named) == read_checkpoint(tmp_path / "checkpoint-5")
    newest = save(store, 6, resumed_from=named_folder(named))
    assert find_checkpoint(store, named) == newest
    assert find_checkpoint(store, str(tmp_path / "checkpoint-9")).manifest.step == 9  # type: ignore[union-attr]
    assert find_checkpoint(store, "auto") == newest


def test_a_checkpoint_that_cannot_be_removed_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def busy(folder: Path, **options: Any) -> None:
        raise OSError(39, "Directory not empty", str(folder))

    store = Store(tmp_path)
    for step in (1, 2):
        save(store, step)
    with monkeypatch.context() as patched:
        patched.setattr(store_module.shutil, "rmtree", busy)
        store.rotate(1)
        store.clean()
    assert [checkpoint.manifest.step for checkpoint in store.complete()] == [2]
    assert (tmp_path / "checkpoint-1.partial").exists()
    store.clean()
    assert names(tmp_path) == {"checkpoint-2", "latest"}


def test_a_folder_of_another_program_is_kept_aside(tmp_path: Path) -> None:
    other = tmp_path / "checkpoint-5"
    other.mkdir()
    (other / "trainer_state.json").write_text("{}")
    store = Store(tmp_path)
    assert store.latest_complete() is None
    store.clean()
    save(store, 5)
    store.rotate(1)
    assert (tmp_path / "checkpoint-5.aside-0" / "trainer_state.json").exists()
    assert [checkpoint.manifest.step for checkpoint in store.complete()] == [5]


def test_a_full_disk_is_told_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="GB free, but the checkpoint of step 3 takes"):
        Store(tmp_path).begin(3, expected_bytes=10**18)
    assert names(tmp_path) == set()


def test_resume_auto_takes_the_newest_and_never_refuses_to_mix_runs(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert find_checkpoint(store, "auto") is None
    assert find_checkpoint(store, "never") is None
    save(store, 5)
    newest = save(store, 6)
    assert find_checkpoint(store, "auto") == newest
    older = find_checkpoint(store, str(tmp_path / "checkpoint-5"))
    assert older is not None and older.manifest.step == 5
    with pytest.raises(CheckpointError, match=r"resume=never but .* holds checkpoint-6"):
        find_checkpoint(store, "never")
    with pytest.raises(CheckpointError, match="no manifest"):
        find_checkpoint(store, str(tmp_path))


def test_a_checkpoint_without_optimizer_state_is_refused(tmp_path: Path) -> None:
    store = Store(tmp_path)
    save(store, 5, resumable=False)
    with pytest.raises(CheckpointError, match="save_optim false"):
        find_checkpoint(store, "auto")


def test_another_model_is_refused_by_name(tmp_path: Path) -> None:
    checkpoint = save(Store(tmp_path), 5, identity={"hidden_size": 64, "lora_rank": 8})
    check_identity(checkpoint, {"hidden_size": 64, "lora_rank": 8})
    with pytest.raises(CheckpointError, match=r"lora_rank=16 but .* was trained with lora_rank=8"):
        check_identity(checkpoint, {"hidden_size": 64, "lora_rank": 16})


def test_the_manifest_is_text_that_people_can_read(tmp_path: Path) -> None:
    folder = save(Store(tmp_path), 5).folder
    stored = json.loads((folder / "manifest.json").read_text())
    assert stored["step"] == 5 and stored["consumed_samples"] == 20 and stored["sequence"] == 1
