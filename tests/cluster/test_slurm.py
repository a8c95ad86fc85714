"""Training on a real Slurm of virtual nodes: both launchers, time limits, requeueing, and the death of tasks and nodes.

All jobs are handed in at once, so that the waiting of some (for a time limit, for a dead node) is the work of others: one
that outlives its time limit on node3, one that dies again and again on two of node4 to node6, the rest on node1 and node2.
"""

import json
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from megaswift.config.submit import RuntimeConfig, SlurmConfig
from megaswift.launch.sbatch import Job, sbatch_script
from tests.harness.slurm import CallError, SlurmCluster, running_cluster, wait_for, why_not
from tests.harness.tiny_run import make_tiny_run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.alone,
    pytest.mark.skipif(why_not() is not None, reason=f"no Slurm: {why_not()}"),
]

MEGASWIFT = (sys.executable, "-m", "megaswift.cli.main")
STARTING_S = 600.0  # ranks import torch and Megatron-Core: seconds, but minutes on a busy machine
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
SCRIPTS = Path(__file__).parents[2] / "slurm"

# Stands in for a longer run: every step begins with a pause, which costs no processor.
SLOW_STEPS = """
import os, sys, time
from megaswift.training.feed import TrainFeed
batch = TrainFeed.batch
def slow(self, consumed):
    time.sleep(float(os.environ["PAUSE_S"]))
    return batch(self, consumed)
TrainFeed.batch = slow
from megaswift.cli.main import main
sys.exit(main(sys.argv[1:]))
"""
BUSY = 6  # processes a core that want to run: more than these jobs have themselves
LONG_STEPS, LONG_PAUSE_S = (
    90,
    0.5,
)  # 45 s of pauses: more than a slice of one minute has left beside start and save


@dataclass(frozen=True, kw_only=True)
class Jobs:
    """The jobs of this file by name, the folder they were handed in from, and the one that is driven through deaths."""

    ids: dict[str, str]
    folder: Path
    deaths: "Future[None]"


@pytest.fixture(scope="module")
def cluster() -> Iterator[SlurmCluster]:
    with running_cluster(nodes=6, cpus=8, gpus=4) as one:
        yield one


@pytest.fixture(scope="module")
def sft(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The flags of a small run."""
    model, rows = make_tiny_run(tmp_path_factory.mktemp("run"))
    words = f"--model {model} --dataset {rows} --max_length 64 --global_batch_size 4 --lr 1e-4 --lr_decay_style constant"
    return [*words.split(), "--env", '{"OMP_NUM_THREADS": "1"}']


@pytest.fixture(scope="module")
def jobs(cluster: SlurmCluster, sft: list[str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Jobs]:
    """Hand all jobs in; the one with the short time limit gets the machine to itself until it trains."""
    folder = tmp_path_factory.mktemp("jobs")
    shutil.copy(sft[3], folder / "emptied.jsonl")
    (folder / "matrix.yaml").write_text("seed: [1, 2]\n")
    ids = {}
    long = ["--tp", "2", "--output_dir", "long", "--train_iters", str(LONG_STEPS), "--save_steps", "100000"]
    pause = slow_steps(folder, LONG_PAUSE_S)
    short_slices = ["--time", "1", "--signal_seconds", "0", "--exclude", "node[1-2,4-6]"]
    ids["long"] = submit(cluster, folder, *sft, *long, *pause, *short_slices)
    deadline = time.monotonic() + 45
    while not (folder / "long" / "logging.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.2)

    deaths = [
        "--train_iters",
        "1000000",
        "--save_steps",
        "5",
        "--save_total_limit",
        "2",
        "--save_safetensors",
        "false",
    ]
    two_ranks = ["--nodes", "2", "--nproc_per_node", "1", "--time", "60", "--exclude", "node[1-3]"]
    ids["deaths"] = submit(
        cluster, folder, *sft, *deaths, *two_ranks, *slow_steps(folder, 0.2), "--output_dir", "deaths"
    )
    rest = ["--exclude", "node[3-6]", "--time", "20"]
    four_ranks = ["--train_iters", "4", "--tp", "2", "--nodes", "2", "--nproc_per_node", "2"]
    for launcher in ("srun", "torchrun"):
        words = [*four_ranks, "--launcher", launcher, "--output_dir", launcher]
        ids[launcher] = submit(cluster, folder, *sft, *rest, *words)
    scripts = {"one-node": (1, 2), "srun": (2, LONG_STEPS), "torchrun": (1, 2)}
    for name, (ranks, steps) in scripts.items():
        ids[f"{name}.sbatch"] = submit_script(cluster, sft, folder, name, ranks=ranks, steps=steps)
    # An error that only the job can meet: submit has looked into the set before.
    words = ["--val_dataset", "emptied.jsonl", "--nproc_per_node", "2", "--output_dir", "wrong"]
    ids["wrong"] = submit(cluster, folder, *sft, *rest, *words, "--setup", ": > emptied.jsonl")
    words = ["--train_iters", "2", "--output_dir", "array", "--matrix", "matrix.yaml"]
    ids["array"] = submit(cluster, folder, *sft, *rest, *words)
    with ThreadPoolExecutor(1) as pool:
        yield Jobs(
            ids=ids,
            folder=folder,
            deaths=pool.submit(go_through_deaths, cluster, ids["deaths"], folder / "deaths"),
        )


def slow_steps(folder: Path, pause_s: float) -> list[str]:
    """Return flags of `megaswift submit` that put a `python` with slow steps in front of the real one."""
    programs = folder / "slow"
    programs.mkdir(exist_ok=True)
    (programs / "steps.py").write_text(SLOW_STEPS)
    python = programs / "python"
    python.write_text(
        f'#!/bin/sh\nshift 2  # -m megaswift.cli.main\nexec {sys.executable} {programs}/steps.py "$@"\n'
    )
    python.chmod(0o755)
    return ["--setup", f"export PATH={programs}:$PATH PAUSE_S={pause_s}"]


def submit(cluster: SlurmCluster, folder: Path, *words: str) -> str:
    return cluster.call(*MEGASWIFT, "submit", "sft", "--gpus_per_node", "0", *words, cwd=folder).strip()


def submit_script(
    cluster: SlurmCluster, sft: list[str], folder: Path, name: str, *, ranks: int, steps: int
) -> str:
    """Hand in one of the scripts to start from as it is, but smaller."""
    tasks = ranks if name == "srun" else 1
    smaller = ["--nodes=1", f"--ntasks-per-node={tasks}", f"--gpus-per-node={ranks}", "--cpus-per-task=2"]
    environ = {
        "MODEL": sft[1],
        "DATA": sft[3],
        "OUT": f"{name}.sbatch",
        "VENV": sys.prefix,
        "FLAGS": f"{' '.join(sft[4:-2])} --train_iters {steps} --tp {ranks}",
        "OMP_NUM_THREADS": "1",
    }
    words = ["--exclude=node[3-6]", *smaller, str(SCRIPTS / f"{name}.sbatch")]
    return cluster.call("sbatch", "--parsable", *words, cwd=folder, **environ).strip()


def go_through_deaths(cluster: SlurmCluster, job: str, output_dir: Path) -> None:
    """Requeue a job by hand, kill one of its tasks, then its second node; each time it must come further than before.

    The last slice runs on a node that was idle: one that comes back would end what it remembers of the job's id.
    """
    latest = output_dir / "latest"

    def step() -> int:
        return int(latest.read_text().split("-")[1]) if latest.exists() else 0

    def goes_on(restarts: int) -> None:
        """Return when the slice after so many restarts has left a checkpoint of its own."""

        def runs() -> bool:
            facts = cluster.job(job)
            assert facts["JobState"] not in ENDED, log_of(cluster, job)
            return int(facts["Restarts"]) == restarts and facts["JobState"] == "RUNNING"

        wait_for(runs, STARTING_S, f"slice {restarts} to start")
        before = step()
        wait_for(
            lambda: runs() and step() > before, STARTING_S, f"a checkpoint of slice {restarts}", poll_s=0.5
        )

    goes_on(0)
    cluster.call("scontrol", "requeue", job)
    goes_on(1)
    (rank,) = cluster.processes_on(5, "slow/steps.py")
    os.kill(rank, signal.SIGKILL)
    goes_on(2)
    cluster.kill_node(5)
    wait_for(lambda: int(cluster.job(job)["Restarts"]) == 3, 120, "Slurm to give the dead node up")
    goes_on(3)


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
    state = cluster.wait(job, *ENDED, timeout=timeout)
    assert state == "COMPLETED", log_of(cluster, job)


def test_two_nodes_of_two_ranks_train_through_srun_and_through_torchrun(
    cluster: SlurmCluster, jobs: Jobs
) -> None:
    for launcher in ("srun", "torchrun"):
        finish(cluster, jobs.ids[launcher])
        assert "dp=2 tp=2" in log_of(cluster, jobs.ids[launcher])
    assert losses(jobs.folder / "srun") == losses(jobs.folder / "torchrun")
    assert len(losses(jobs.folder / "srun")) == 4


@pytest.mark.parametrize("name", ["srun", "one-node", "torchrun"])
def test_the_scripts_to_start_from_work_as_they_are(cluster: SlurmCluster, jobs: Jobs, name: str) -> None:
    finish(cluster, jobs.ids[f"{name}.sbatch"])
    assert ("tp=2" if name == "srun" else "one rank") in log_of(cluster, jobs.ids[f"{name}.sbatch"])
    assert len(losses(jobs.folder / f"{name}.sbatch")) == (LONG_STEPS if name == "srun" else 2)


def test_a_user_error_ends_the_job_with_one_message(cluster: SlurmCluster, jobs: Jobs) -> None:
    assert cluster.wait(jobs.ids["wrong"], *ENDED, timeout=STARTING_S) == "FAILED"
    assert cluster.job(jobs.ids["wrong"])["ExitCode"] == "2:0"
    log = log_of(
        cluster, jobs.ids["wrong"]
    )  # in which srun tells of the tasks that it ended, as "srun: error: ..."
    assert len(re.findall(r"^(?:\[rank \d+\] )?error: ", log, re.MULTILINE)) == 1, log


# Stands in for the program: the task that has the array's own id needs two slices, the others one, which lasts longer.
TWO_SLICES = """#!/bin/sh
echo "$SLURM_JOB_END_TIME" >> starts-$SLURM_ARRAY_TASK_ID
[ "$SLURM_JOB_ID" = "$SLURM_ARRAY_JOB_ID" ] || exec sleep 8
[ -e row-$SLURM_ARRAY_TASK_ID/unfinished ] && rm row-$SLURM_ARRAY_TASK_ID/unfinished && exit 0
sleep 3
touch row-$SLURM_ARRAY_TASK_ID/unfinished
echo checkpoint-1 > row-$SLURM_ARRAY_TASK_ID/latest
"""


def test_a_task_of_an_array_is_requeued_alone_and_knows_its_end(
    cluster: SlurmCluster, tmp_path: Path
) -> None:
    python = tmp_path / "python"
    python.write_text(TWO_SLICES)
    python.chmod(0o755)
    job = Job(
        name="array",
        commands=(("sft",),) * 3,
        output_dirs=("row-0", "row-1", "row-2"),
        log_dir=str(tmp_path),
        ranks_per_node=1,
        gpus_per_node=0,
        cpus_per_task=1,
        launcher="srun",
        mpi="none",
        container_runtime=None,
        slurm=SlurmConfig(time="20", exclude="node[3-6]"),
        runtime=RuntimeConfig(setup=[f"export PATH={tmp_path}:$PATH"]),
    )
    (tmp_path / "array.sbatch").write_text(sbatch_script(job))
    array = cluster.call("sbatch", "--parsable", "array.sbatch", cwd=tmp_path).strip()
    for row in range(3):
        assert cluster.wait(f"{array}_{row}", *ENDED, timeout=STARTING_S) == "COMPLETED"
    starts = [(tmp_path / f"starts-{row}").read_text().splitlines() for row in range(3)]
    assert sorted(map(len, starts)) == [1, 1, 2]
    assert all(float(end) > time.time() for slices in starts for end in slices)


def test_an_array_runs_every_row_of_a_matrix(cluster: SlurmCluster, jobs: Jobs) -> None:
    for row in (0, 1):
        finish(cluster, f"{jobs.ids['array']}_{row}")
    assert len(losses(jobs.folder / "array" / "000-1")) == len(losses(jobs.folder / "array" / "001-2")) == 2


def test_an_unknown_partition_is_refused_with_the_ones_there_are(
    cluster: SlurmCluster, sft: list[str], tmp_path: Path
) -> None:
    with pytest.raises(CallError) as caught:
        submit(cluster, tmp_path, *sft, "--partition", "tset")
    assert caught.value.code == 2
    assert "partition=tset is not a partition of this cluster. Did you mean test?" in caught.value.stderr


def test_a_run_longer_than_its_time_limit_finishes_in_slices_as_if_uninterrupted(
    cluster: SlurmCluster, jobs: Jobs
) -> None:
    state = cluster.wait(jobs.ids["long"], *ENDED, timeout=600)
    log = log_of(cluster, jobs.ids["long"])
    if "without a new checkpoint" in log and os.getloadavg()[0] > BUSY * (os.cpu_count() or 1):
        pytest.skip("this machine is busy: a slice of one minute was over before its ranks had started")
    assert state == "COMPLETED", log
    assert int(cluster.job(jobs.ids["long"])["Restarts"]) >= 1, "the run fitted into one slice"
    assert "the job's time ends soon" in log and "requeueing" in log and "resumed from" in log
    finish(cluster, jobs.ids["srun.sbatch"])
    assert losses(jobs.folder / "long") == losses(jobs.folder / "srun.sbatch")


def test_nothing_is_lost_but_the_steps_since_the_last_checkpoint(cluster: SlurmCluster, jobs: Jobs) -> None:
    """A job was requeued by hand, then one of its tasks was killed, then a whole node; now it is cancelled."""
    jobs.deaths.result(timeout=4 * STARTING_S)
    cluster.call(*MEGASWIFT, "submit", "cancel", jobs.ids["deaths"])
    assert cluster.wait(jobs.ids["deaths"], "CANCELLED", timeout=60) == "CANCELLED"
    found = sorted(losses(jobs.folder / "deaths"))
    assert found == list(range(1, len(found) + 1))
