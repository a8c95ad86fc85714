"""The command itself, stopped and killed and started again: the log tells one uninterrupted run."""

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.harness.tiny_run import make_tiny_run

pytestmark = pytest.mark.alone

TOTAL_STEPS = 24
EXACT = ("step", "consumed_samples", "loss", "grad_norm", "lr", "sample_ids")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    make_tiny_run(folder)
    return folder


def command(folder: Path, output: str, *more: str) -> list[str]:
    return [
        sys.executable, "-m", "megaswift.cli.main", "sft", "--model", str(folder / "model"),
        "--dataset", str(folder / "rows.jsonl"), "--output_dir", str(folder / output),
        "--train_iters", str(TOTAL_STEPS), "--global_batch_size", "4", "--learning_rate", "1e-3",
        "--save_steps", "4", "--save_total_limit", "2", "--report_to", "none", "--verbose", "true", "--save_safetensors", "false",
        *more,
    ]  # fmt: skip


def lines(folder: Path, output: str) -> list[dict[str, Any]]:
    path = folder / output / "logging.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]


def finish(args: list[str], **options: Any) -> str:
    done = subprocess.run(args, capture_output=True, text=True, timeout=300, **options)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


def stop_at(args: list[str], reached: Callable[[], bool], number: signal.Signals) -> tuple[int, str]:
    """Start a run, send a signal to all of its processes once `reached`, and return exit code and log."""
    process = subprocess.Popen(args, stderr=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.monotonic() + 240
    while not reached() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    assert process.poll() is None, "the run ended before it could be stopped"
    os.killpg(process.pid, number)
    _, log = process.communicate(timeout=120)
    return process.returncode, log


@pytest.mark.slow
@pytest.mark.ranks(2)
def test_stopped_and_killed_run_has_the_log_of_an_uninterrupted_one(folder: Path) -> None:
    tp2 = ("--tensor_model_parallel_size", "2", "--packing", "true", "--max_length", "64")
    finish(command(folder, "whole", *tp2))
    args = command(folder, "broken", *tp2)
    code, log = stop_at(args, lambda: len(lines(folder, "broken")) >= 6, signal.SIGTERM)
    assert code == 0, log[-3000:]
    stopped = len(lines(folder, "broken"))
    assert 6 <= stopped < TOTAL_STEPS - 2
    assert (folder / "broken" / "latest").read_text() == f"checkpoint-{stopped}\n"
    code, _ = stop_at(args, lambda: len(lines(folder, "broken")) >= stopped + 2, signal.SIGKILL)
    assert code == -signal.SIGKILL
    log = finish(args)
    assert "resumed from" in log
    expected, found = lines(folder, "whole"), lines(folder, "broken")
    assert [line["step"] for line in found] == list(range(1, TOTAL_STEPS + 1))
    for name in EXACT:
        assert [line[name] for line in found] == [line[name] for line in expected], name
    assert sorted(path.name for path in (folder / "broken").glob("checkpoint-*")) == [
        "checkpoint-20",
        "checkpoint-24",
    ]

    # Another layout goes on from step 20 of the same run: the same samples, and the same losses but for the order of sums.
    (folder / "broken" / "checkpoint-24" / "manifest.json").unlink()
    log = finish(command(folder, "broken", "--pipeline_model_parallel_size", "2", *tp2[2:]))
    assert "checkpoint-20 at step 20" in log
    found = lines(folder, "broken")
    assert [line["sample_ids"] for line in found] == [line["sample_ids"] for line in expected]
    losses = [line["loss"] for line in found]
    assert losses == pytest.approx([line["loss"] for line in expected], rel=1e-5)
    assert losses != [line["loss"] for line in expected], "another layout sums in another order"


@pytest.mark.slow
def test_a_disk_that_fills_up_while_saving_is_one_clear_error(folder: Path) -> None:
    args = command(folder, "full", "--save_optim", "true")
    args[args.index("--train_iters") + 1] = "4"
    finish(args)
    args[args.index("--train_iters") + 1] = "8"

    def small_files() -> None:  # as a quota does, in the middle of a file
        resource.setrlimit(resource.RLIMIT_FSIZE, (64 * 1024, 64 * 1024))

    done = subprocess.run(args, capture_output=True, text=True, timeout=300, preexec_fn=small_files)
    assert done.returncode == 2, done.stderr[-3000:]
    reason = r"(File too large|a file could not be written to its end)\. Older checkpoints are intact\."
    assert re.search(rf"The checkpoint of step 8 could not be written: {reason}", done.stderr)
    assert "Traceback" not in done.stderr
    assert [path.name for path in (folder / "full").glob("checkpoint-*")] == ["checkpoint-4"]
    assert "resumed from" in finish(args)
    assert [line["step"] for line in lines(folder, "full")] == list(range(1, 9))


# Runs the command, whose second save is never written to its end.
STUCK = """
import sys, threading
from torch.distributed.checkpoint import FileSystemWriter
from megaswift.cli.main import main
write, saves = FileSystemWriter.write_data, []
def stuck(self, *args):
    saves.append(self)
    if len(saves) == 2:
        (self.path / "half.distcp").write_bytes(b"half")
        threading.Event().wait()
    return write(self, *args)
FileSystemWriter.write_data = stuck
sys.exit(main())
"""


@pytest.mark.slow
def test_a_run_killed_while_it_writes_in_the_background_goes_on_from_the_save_before(folder: Path) -> None:
    args = command(folder, "beside", "--async_save", "true")
    stuck = [sys.executable, "-c", STUCK, *args[3:]]
    code, _ = stop_at(stuck, lambda: len(lines(folder, "beside")) >= 10, signal.SIGKILL)
    assert code == -signal.SIGKILL
    output, before = folder / "beside", lines(folder, "beside")
    assert (output / "checkpoint-8.partial" / "megatron" / "half.distcp").exists()
    assert sorted(path.name for path in output.glob("checkpoint-*")) == [
        "checkpoint-4",
        "checkpoint-8.partial",
    ]
    assert (output / "latest").read_text() == "checkpoint-4\n"
    assert "checkpoint-4 at step 4" in finish(args)
    found = lines(folder, "beside")
    assert [line["step"] for line in found] == list(range(1, TOTAL_STEPS + 1))
    for name in EXACT:
        assert [line[name] for line in found[: len(before)]] == [line[name] for line in before], name
    assert sorted(path.name for path in output.glob("checkpoint-*")) == ["checkpoint-20", "checkpoint-24"]
    assert (output / "latest").read_text() == "checkpoint-24\n"
    saves = [json.loads(line) for line in (output / "ledger.jsonl").read_text().splitlines()]
    assert {event["step"] for event in saves if event["event"] == "save"} >= {4, 8, 12, 16, 20, 24}
