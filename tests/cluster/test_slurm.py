"""Training on a real Slurm of virtual nodes: both launchers, time limits, requeueing, and the death of tasks and nodes."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness.slurm import CallError, SlurmCluster, running_cluster, wait_for, why_not
from tests.harness.tiny_run import make_tiny_run

pytestmark = [pytest.mark.slow, pytest.mark.skipif(why_not() is not None, reason=f"no Slurm: {why_not()}")]

MEGASWIFT = (sys.executable, "-m", "megaswift.cli.main")
STARTING_S = 300.0  # ranks import torch and Megatron-Core: seconds, but minutes on a busy machine


@pytest.fixture(scope="module")
def cluster() -> Iterator[SlurmCluster]:
    with running_cluster(nodes=2, cpus=8, gpus=4) as one:
        yield one


@pytest.fixture(scope="module")
def sft(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The flags of a small run."""
    model, rows = make_tiny_run(tmp_path_factory.mktemp("run"))
    words = f"--model {model} --dataset {rows} --max_length 64 --global_batch_size 4 --lr 1e-4 --lr_decay_style constant"
    return [*words.split(), "--env", '{"OMP_NUM_THREADS": "1"}']


def submit(cluster: SlurmCluster, folder: Path, *words: str) -> str:
    return cluster.call(*MEGASWIFT, "submit", "sft", "--gpus_per_node", "0", *words, cwd=folder).strip()


def log_of(cluster: SlurmCluster, job: str) -> str:
    path = Path(cluster.job(job)["StdOut"])
    return path.read_text() if path.exists() else ""


def losses(folder: Path) -> dict[int, float]:
    """Return step -> loss of a run's log, in which every step must stand once."""
    lines = [json.loads(line) for line in (folder / "logging.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines]
    assert steps == sorted(set(steps)), steps
    return {line["step"]: line["loss"] for line in lines}


def finish(cluster: SlurmCluster, job: str, *, timeout: float = STARTING_S) -> None:
    state = cluster.wait(job, "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", timeout=timeout)
    assert state == "COMPLETED", log_of(cluster, job)


def test_two_nodes_of_two_ranks_train_through_srun_and_through_torchrun(
    cluster: SlurmCluster, sft: list[str], tmp_path: Path
) -> None:
    words = [*sft, "--train_iters", "4", "--tp", "2", "--nodes", "2", "--nproc_per_node", "2", "--time", "20"]
    for launcher in ("srun", "torchrun"):
        job = submit(cluster, tmp_path, *words, "--launcher", launcher, "--output_dir", launcher)
        finish(cluster, job)
        assert "dp=2 tp=2" in log_of(cluster, job)
    assert losses(tmp_path / "srun") == losses(tmp_path / "torchrun")
    assert len(losses(tmp_path / "srun")) == 4


def test_a_user_error_ends_the_job_with_one_message(
    cluster: SlurmCluster, sft: list[str], tmp_path: Path
) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    job = submit(
        cluster, tmp_path, *sft, "--val_dataset", "empty.jsonl", "--nproc_per_node", "2", "--time", "20"
    )
    assert cluster.wait(job, "COMPLETED", "FAILED", timeout=STARTING_S) == "FAILED"
    assert cluster.job(job)["ExitCode"] == "2:0"
    assert log_of(cluster, job).count("error: ") == 1


def test_a_run_longer_than_its_time_limit_finishes_in_slices_as_if_uninterrupted(
    cluster: SlurmCluster, sft: list[str], tmp_path: Path
) -> None:
    words = [*sft[:-2], "--tp", "2", "--output_dir", "whole"]
    environ = {**os.environ, "SLURM_JOB_END_TIME": str(int(time.time()) + 100), "OMP_NUM_THREADS": "1"}
    began = time.monotonic()
    subprocess.run(
        [*MEGASWIFT, "sft", *words, "--train_iters", "100000"],
        cwd=tmp_path,
        env=environ,
        check=True,
        timeout=300,
    )
    whole = losses(tmp_path / "whole")
    lines = (tmp_path / "whole" / "logging.jsonl").read_text().splitlines()
    training_s = sum(json.loads(line)["step_time_s"] for line in lines)
    starting_s = time.monotonic() - began - training_s
    if starting_s > 25:
        pytest.skip(
            f"this machine is busy: a run needs {starting_s:.0f} s to start, and a slice of one minute is too short"
        )

    sliced = [
        *sft,
        "--tp",
        "2",
        "--output_dir",
        "sliced",
        "--train_iters",
        str(len(whole)),
        "--save_steps",
        "100000",
    ]
    job = submit(cluster, tmp_path, *sliced, "--time", "1")
    finish(cluster, job, timeout=600)
    assert int(cluster.job(job)["Restarts"]) >= 1, "the run fitted into one slice"
    log = log_of(cluster, job)
    assert "the job's time ends soon" in log and "requeueing" in log and "resumed from" in log
    assert losses(tmp_path / "sliced") == whole


def test_nothing_is_lost_but_the_steps_since_the_last_checkpoint(
    cluster: SlurmCluster, sft: list[str], tmp_path: Path
) -> None:
    """A job is requeued by hand, then one of its tasks is killed, then a whole node; then it is cancelled."""
    words = [
        *sft,
        "--train_iters",
        "1000000",
        "--save_steps",
        "10",
        "--save_total_limit",
        "2",
        "--output_dir",
        "out",
    ]
    job = submit(cluster, tmp_path, *words, "--nodes", "2", "--nproc_per_node", "1", "--time", "60")
    latest = tmp_path / "out" / "latest"

    def step() -> int:
        return int(latest.read_text().split("-")[1]) if latest.exists() else 0

    def goes_on(restarts: int, since: int) -> bool:
        facts = cluster.job(job)
        assert facts["JobState"] in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING"), log_of(cluster, job)
        return int(facts["Restarts"]) == restarts and step() > since

    wait_for(lambda: goes_on(0, 0), STARTING_S, "the first checkpoint")
    cluster.call("scontrol", "requeue", job)
    before = step()
    wait_for(lambda: goes_on(1, before), STARTING_S, "a checkpoint after scontrol requeue")

    (rank,) = cluster.processes_on(2, "megaswift.cli.main")
    before = step()
    os.kill(rank, signal.SIGKILL)
    wait_for(lambda: goes_on(2, before), STARTING_S, "a checkpoint after the death of a task")

    before = step()
    cluster.kill_node(2)
    wait_for(lambda: int(cluster.job(job)["Restarts"]) == 3, 120, "Slurm to give the dead node up")
    cluster.start_node(2)
    wait_for(lambda: goes_on(3, before), STARTING_S, "a checkpoint after the death of a node")

    cluster.call(*MEGASWIFT, "submit", "cancel", job)
    assert cluster.wait(job, "CANCELLED", timeout=60) == "CANCELLED"
    found = sorted(losses(tmp_path / "out"))
    assert found == list(range(1, len(found) + 1))


def test_an_array_runs_every_row_of_a_matrix(cluster: SlurmCluster, sft: list[str], tmp_path: Path) -> None:
    (tmp_path / "matrix.yaml").write_text("seed: [1, 2]\n")
    words = [*sft, "--train_iters", "2", "--output_dir", "out", "--matrix", "matrix.yaml", "--time", "20"]
    job = submit(cluster, tmp_path, *words)
    for row in (0, 1):
        finish(cluster, f"{job}_{row}")
    assert len(losses(tmp_path / "out" / "000-1")) == len(losses(tmp_path / "out" / "001-2")) == 2


@pytest.mark.parametrize("name", ["one-node", "srun", "torchrun"])
def test_the_scripts_to_start_from_work_as_they_are(
    cluster: SlurmCluster, sft: list[str], tmp_path: Path, name: str
) -> None:
    script = Path(__file__).parents[2] / "slurm" / f"{name}.sbatch"
    ranks = "1" if name != "srun" else "2"
    smaller = ["--nodes=1", f"--ntasks-per-node={ranks}", "--gpus-per-node=2", "--cpus-per-task=2"]
    environ = {
        "MODEL": sft[1],
        "DATA": sft[3],
        "OUT": "out",
        "VENV": sys.prefix,
        "FLAGS": "--max_length 64 --global_batch_size 4 --train_iters 2 --tp 2",
        "OMP_NUM_THREADS": "1",
    }
    job = cluster.call("sbatch", "--parsable", *smaller, str(script), cwd=tmp_path, **environ).strip()
    finish(cluster, job)
    assert "tp=2" in log_of(cluster, job) and len(losses(tmp_path / "out")) == 2


def test_an_unknown_partition_is_refused_with_the_ones_there_are(
    cluster: SlurmCluster, sft: list[str], tmp_path: Path
) -> None:
    with pytest.raises(CallError) as caught:
        submit(cluster, tmp_path, *sft, "--partition", "tset")
    assert caught.value.code == 2
    assert "partition=tset is not a partition of this cluster. Did you mean test?" in caught.value.stderr
