"""Runs of Weights & Biases and SwanLab as their own packages write them without network: points, settings, resuming, no secrets."""

import json
import struct
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from megaswift.config import report_rules
from megaswift.config.parse import make_run
from megaswift.config.rules import check_request
from megaswift.config.run import RunConfig
from megaswift.errors import ConfigError
from megaswift.training.services import SERVICES, SwanLab, WeightsAndBiases

SECRET = "hf_very_secret"
BLOCK = 1 << 15  # of LevelDB's log format, in which wandb keeps its records
HEADER = 7  # bytes before the records of a file, and before each part of one


def run_of(output_dir: Path, **more: Any) -> RunConfig:
    return make_run("sft", model="m", dataset=["d"], output_dir=str(output_dir), hub_token=SECRET, **more)


def line(step: int, loss: float) -> dict[str, Any]:
    return {"step": step, "loss": loss, "grad_norm": None, "sample_ids": [1, 2]}


def written_below(folder: Path) -> bytes:
    return b"".join(file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file())


class TestWeightsAndBiases:
    """The real package, offline."""

    @pytest.fixture(autouse=True)
    def _offline(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
        wandb = pytest.importorskip("wandb", reason="the extra `test` installs it")
        for name in ("WANDB_PROJECT", "WANDB_NAME", "WANDB_RUN_ID", "WANDB_API_KEY"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("WANDB_MODE", "offline")
        monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
        monkeypatch.setenv("WANDB_SILENT", "true")
        # What the command line holds is not to be told.
        monkeypatch.setattr(sys, "argv", ["megaswift", "sft", "--hub_token", SECRET])
        yield
        wandb.teardown()  # its process

    def report(self, run: RunConfig, lines: list[dict[str, Any]], *, resumed_step: int = 0) -> None:
        service = WeightsAndBiases(run, Path(run.checkpoint.output_dir), resumed_step=resumed_step)
        for one in lines:
            service.report(one)
        service.close()

    def test_points_lie_at_their_steps_and_settings_go_with_them(self, tmp_path: Path) -> None:
        run = run_of(
            tmp_path / "out", learning_rate=0.25, report_to=["wandb"], wandb_project="p", wandb_exp_name="n"
        )
        self.report(run, [line(10, 0.5), {"step": 10, "eval_loss": 0.75}, line(20, 1 / 3)])
        (found,) = runs_below(tmp_path / "out")
        assert (found.project, found.name) == ("p", "n")
        assert found.points == [
            {"step": 10, "train/loss": 0.5},
            {"step": 10, "eval/eval_loss": 0.75},
            {"step": 20, "train/loss": 1 / 3},
        ]
        assert found.axes == {"step": "", "*": "step"}
        assert found.config["lr"] == 0.25 and found.config["task"] == "sft"
        assert "hub_token" not in found.config
        assert SECRET.encode() not in written_below(tmp_path)

    def test_a_resumed_run_goes_on_and_one_that_begins_anew_is_another(self, tmp_path: Path) -> None:
        run = run_of(tmp_path / "out", report_to=["wandb"])
        self.report(run, [line(1, 1.0), line(2, 2.0), line(3, 3.0)])
        self.report(run, [line(3, 3.5), line(4, 4.0)], resumed_step=2)
        self.report(run, [line(1, 1.0)])
        first, second, third = runs_below(tmp_path / "out")
        assert first.id == second.id != third.id
        assert [point["step"] for point in second.points] == [3, 4], (
            "a step that is made again is not dropped"
        )
        assert (tmp_path / "out" / "wandb_run_id").read_text() == f"{third.id}\n"
        assert (first.project, first.name) == ("megaswift", str(tmp_path / "out"))

    def test_names_may_come_from_its_own_variables(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("WANDB_PROJECT", "theirs")
        monkeypatch.setenv("WANDB_NAME", "mine")
        self.report(run_of(tmp_path / "out", report_to=["wandb"]), [line(1, 1.0)])
        (found,) = runs_below(tmp_path / "out")
        assert (found.project, found.name) == ("theirs", "mine")

    def test_who_is_not_logged_in_is_told_what_to_do(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("WANDB_MODE", "online")
        monkeypatch.setenv("WANDB_API_KEY", "no key at all")
        with pytest.raises(ConfigError, match="set WANDB_MODE=offline where there is no network"):
            self.report(run_of(tmp_path / "out", report_to=["wandb"]), [])


class WandbRun:
    """What one file of wandb says."""

    def __init__(self, file: Path) -> None:
        from wandb.proto.wandb_internal_pb2 import Record

        self.points: list[dict[str, Any]] = []
        self.axes: dict[str, str] = {}
        self.config: dict[str, Any] = {}
        for data in records(file.read_bytes()):
            record = Record.FromString(data)
            kind = record.WhichOneof("record_type")
            if kind == "run":
                self.id, self.project, self.name = (
                    record.run.run_id,
                    record.run.project,
                    record.run.display_name,
                )
                self.config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
            elif kind == "metric":
                metric = record.metric
                self.axes[metric.name or metric.glob_name] = metric.step_metric
            elif kind == "history":
                values = {
                    (item.key or item.nested_key[0]): json.loads(item.value_json)
                    for item in record.history.item
                }
                self.points.append(
                    {name: value for name, value in values.items() if not name.startswith("_")}
                )


def runs_below(folder: Path) -> list[WandbRun]:
    """Return the runs in the order in which they began."""
    files = sorted((folder / "wandb").glob("offline-run-*/*.wandb"), key=lambda file: file.stat().st_mtime_ns)
    return [WandbRun(file) for file in files]


def records(data: bytes) -> Iterator[bytes]:
    """Yield the records of a log of LevelDB: parts of (checksum, length, whether first, middle, last), none across a block."""
    place, record = HEADER, b""
    while place + HEADER <= len(data):
        left = BLOCK - place % BLOCK
        if left < HEADER:
            place += left
            continue
        length, kind = struct.unpack_from("<HB", data, place + 4)
        place += HEADER
        record += data[place : place + length]
        place += length
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


class TestSwanLab:
    """The real package, offline; it is no part of the extra `test`."""

    def test_an_experiment_is_kept_and_gone_on_with(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pytest.importorskip(
            "swanlab",
            reason="pip install 'megaswift[swanlab]'; wants another protobuf than tensorboard's newest",
        )
        monkeypatch.setenv("SWANLAB_MODE", "offline")
        run = run_of(
            tmp_path / "out",
            learning_rate=0.25,
            report_to=["swanlab"],
            swanlab_project="p",
            swanlab_exp_name="n",
        )
        for resumed_step in (0, 2, 0):
            service = SwanLab(run, tmp_path / "out", resumed_step=resumed_step)
            for step in range(resumed_step + 1, resumed_step + 4):
                service.report(line(step, 1 / step))
            service.close()
        files = sorted(
            (tmp_path / "out" / "swanlab").glob("run-*/*.swanlab"), key=lambda file: file.stat().st_mtime_ns
        )
        names = [file.stem for file in files]
        assert len(names) == 3 and names[0] == names[1] != names[2]
        assert (tmp_path / "out" / "swanlab_run_id").read_text() == f"{names[2].removeprefix('run-')}\n"
        written = written_below(tmp_path)
        assert b"train/loss" in written and b"lr:" in written and b'"command":"' not in written


@pytest.mark.parametrize("name", SERVICES)
def test_a_package_that_is_not_there_is_said_at_the_start(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run = make_run("sft", model="m", dataset=["d"], report_to=["tensorboard", name])
    message = rf"report_to={name} needs the package {name}, which is not installed. Install it \(pip install 'megaswift\[{name}\]'\)"
    monkeypatch.setattr(report_rules, "find_spec", lambda package: None)
    with pytest.raises(ConfigError, match=message):
        check_request(run)
    # A folder that wandb has left in the working directory is no package.
    (tmp_path / "a_name_of_no_package").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(report_rules, "find_spec", lambda package: find_spec("a_name_of_no_package"))
    with pytest.raises(ConfigError, match=message):
        check_request(run)
    monkeypatch.setattr(report_rules, "find_spec", lambda package: find_spec("yaml"))
    check_request(run)
