"""The same run through every way of starting ranks, and through the command line as a user types it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megaswift.launch.heartbeat import EXIT_STALLED
from megaswift.launch.local import free_port
from tests.harness.tiny_run import make_tiny_run

BIN = Path(sys.executable).parent
PATH = f"{BIN}:{os.environ.get('PATH', '')}"
MEGASWIFT = [sys.executable, "-m", "megaswift.cli.main"]
LIMIT_S = 400

pytestmark = [pytest.mark.slow, pytest.mark.ranks(4)]

# A rank that falls asleep in the third step, as one with a broken disk would.
SLEEPER = """
import os, sys, time
from megaswift.training.feed import TrainFeed
batch = TrainFeed.batch
def sleepy(self, consumed):
    if os.environ["RANK"] == "2" and consumed >= 8:
        time.sleep(1000)
    return batch(self, consumed)
TrainFeed.batch = sleepy
from megaswift.cli.main import main
sys.exit(main(sys.argv[1:]))
"""

START = """
import sys
from megaswift.launch.environment import NodeEnv
from megaswift.launch.local import start_ranks
sys.exit(start_ranks({words!r}, nproc=4, node=NodeEnv()))
"""


@pytest.fixture(scope="module")
def sft(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The flags of a small run."""
    model, rows = make_tiny_run(tmp_path_factory.mktemp("run"))
    words = f"--model {model} --dataset {rows} --max_length 64 --global_batch_size 4 --train_iters 4 --tp 2"
    return ["sft", *words.split()]


def run(words: list[str], folder: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run a command without what this process may have from an outer launcher."""
    kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    return subprocess.run(
        words,
        cwd=folder,
        env={**kept, "PATH": PATH, "OMP_NUM_THREADS": "1", **environ},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )


def losses(folder: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (folder / "logging.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines}


def test_every_launcher_trains_the_same(sft: list[str], tmp_path: Path) -> None:
    torchrun = ["torchrun", "--nproc-per-node=4", f"--master-port={free_port()}", "-m", "megaswift.cli.main"]
    launchers = {
        "own": [*MEGASWIFT, *sft, "--nproc_per_node", "4", "--output_dir", "own"],
        "torchrun": [*torchrun, *sft, "--output_dir", "torchrun"],
    }
    if shutil.which("mpirun", path=PATH):
        launchers["mpirun"] = ["mpirun", "-n", "4", *MEGASWIFT, *sft, "--output_dir", "mpirun"]
    for name, words in launchers.items():
        done = run(words, tmp_path)
        assert done.returncode == 0, f"{name}: {done.stderr}"
        assert losses(tmp_path / name) == losses(tmp_path / "own"), name
    assert len(losses(tmp_path / "own")) == 4


def test_two_nodes_are_named_as_ms_swift_names_them(sft: list[str], tmp_path: Path) -> None:
    words = [*MEGASWIFT, *sft, "--output_dir", "out"]
    nodes = {
        "NNODES": "2",
        "NPROC_PER_NODE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    second = subprocess.Popen(
        words,
        cwd=tmp_path,
        env={**kept, **nodes, "NODE_RANK": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    first = run(words, tmp_path, **nodes, NODE_RANK="0")
    assert first.returncode == 0, first.stderr
    assert second.wait(timeout=60) == 0
    assert len(losses(tmp_path / "out")) == 4


def test_the_settings_of_a_run_reproduce_it(sft: list[str], tmp_path: Path) -> None:
    assert run([*MEGASWIFT, *sft, "--output_dir", "first"], tmp_path).returncode == 0
    again = [*MEGASWIFT, "sft", "--config", "first/checkpoint-4/run.yaml", "--output_dir", "second"]
    done = run(again, tmp_path)
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "first") == losses(tmp_path / "second")


@pytest.mark.alone
def test_a_sleeping_rank_is_named_within_20_seconds(sft: list[str], tmp_path: Path) -> None:
    (tmp_path / "sleeper.py").write_text(SLEEPER)
    words = [sys.executable, "sleeper.py", *sft, "--hang_timeout_seconds", "8", "--output_dir", "out"]
    words[words.index("--train_iters") + 1] = "100"
    done = run([sys.executable, "-c", START.format(words=words)], tmp_path)
    assert done.returncode == EXIT_STALLED, done.stderr
    assert "rank 2 on" in done.stderr and "step 3, reading its batch, in sleepy" in done.stderr
    assert "waiting: " in done.stderr and done.stderr.count("error: ") == 1
    report = (tmp_path / "out" / "heartbeat" / "report.txt").stat().st_mtime
    last_line = (tmp_path / "out" / "logging.jsonl").stat().st_mtime
    assert report - last_line < 20
