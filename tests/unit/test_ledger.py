"""The efficiency ledger: what is written down, and what it sums up to."""

import json
from pathlib import Path
from typing import Any

import pytest

from megaswift.cli.main import main
from megaswift.launch.ledger import FILE, beginning, process_age_s, read_slices, sum_up


def event(kind: str, time: float, **fields: Any) -> str:
    return json.dumps({"event": kind, "time": time, **fields}) + "\n"


def start(time: float, *, step: int, queued_s: float) -> str:
    facts = {"queued_s": queued_s, "job": "7", "world_size": 4, "device": "H100-80G", "peak_flops": 1000.0}
    return event("start", time, launched=time - 10, step=step, **facts)


@pytest.fixture
def chain(tmp_path: Path) -> Path:
    """Two slices: one killed three steps after its save, one that makes them again and finishes."""
    (tmp_path / FILE).write_text(
        start(110, step=0, queued_s=60)
        + event("steps", 140, step=2, steps=2, tokens=200, flop=20000.0, seconds=20.0)
        + event("save", 145, step=2, seconds=5.0)
        + event("steps", 175, step=5, steps=3, tokens=300, flop=30000.0, seconds=30.0)
        + '{"event": "st'
        + "\n"
        + start(210, step=2, queued_s=6)
        + event("steps", 260, step=6, steps=4, tokens=400, flop=40000.0, seconds=40.0)
        + event("save", 270, step=6, seconds=10.0)
        + event("end", 275, step=6, finished=True)
    )
    return tmp_path


def test_a_chain_of_slices_sums_up(chain: Path) -> None:
    ledger = sum_up(read_slices(chain))
    assert (ledger.slices, ledger.steps, ledger.redone_steps, ledger.tokens) == (2, 6, 3, 600)
    assert (ledger.stepping_s, ledger.redone_s, ledger.saving_s, ledger.queued_s) == (60, 30, 15, 66)
    assert ledger.starting_s == 20 + 20
    assert ledger.device_hours == pytest.approx(4 * (75 + 75) / 3600)
    assert ledger.other_s == pytest.approx(150 - 60 - 30 - 15 - 40)
    assert ledger.mfu_of_steps == pytest.approx(60000 / (60 * 4000))
    assert ledger.mfu_of_all == pytest.approx(60000 / (150 * 4000))


def test_steps_are_made_again_by_any_later_slice(tmp_path: Path) -> None:
    lines = ""
    for first, last in ((0, 100), (100, 120), (50, 150)):
        number = last - first
        lines += start(110, step=first, queued_s=0) + event(
            "steps", 200, step=last, steps=number, tokens=number, flop=1.0, seconds=float(number)
        )
    (tmp_path / FILE).write_text(lines)
    ledger = sum_up(read_slices(tmp_path))
    assert (ledger.steps, ledger.redone_steps, ledger.tokens) == (150, 70, 150)


def test_the_command_shows_it(chain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ledger", str(chain)]) == 0
    out = capsys.readouterr().out
    assert "steps           6  (and 3 made again)" in out and "causal attention" in out
    assert "training again  30 s  (20.0 %)" in out
    assert main(["ledger", str(chain), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["queued_s"] == 66


def test_a_folder_without_a_ledger_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ledger", str(tmp_path)]) == 2
    assert "has no ledger.jsonl" in capsys.readouterr().err


def test_a_slice_knows_its_devices_and_its_age() -> None:
    facts = beginning({}, dtype="float32", on_gpus=False, world_size=2)
    assert facts["device"] == "CPU" and facts["peak_flops"] > 1e9 and facts["queued_s"] is None
    assert 0 <= process_age_s() < 1e6
