"""Batch scripts of six kinds of cluster, word for word; `python -m tests.unit.test_launch_sbatch` writes them anew."""

import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megaswift.config.submit import RuntimeConfig, SlurmConfig
from megaswift.errors import ConfigError
from megaswift.launch.sbatch import Job, parse_time_limit, sbatch_script

GOLDEN = Path(__file__).parent.parent / "golden" / "sbatch"
SFT = ("sft", "--model", "Qwen/Qwen2.5-7B-Instruct", "--dataset", "rows.jsonl#500", "--output_dir", "runs/a")


def job(*, slurm: dict[str, Any], runtime: dict[str, Any], **changes: Any) -> Job:
    facts: dict[str, Any] = {
        "name": "megaswift-sft",
        "commands": (SFT,),
        "output_dirs": ("runs/a",),
        "log_dir": "runs/a/slurm",
        "ranks_per_node": 8,
        "gpus_per_node": 8,
        "cpus_per_task": 12,
        "launcher": "srun",
        "mpi": "none",
        "container_runtime": None,
        "slurm": SlurmConfig(**slurm),
        "runtime": RuntimeConfig(**runtime),
    }
    return Job(**{**facts, **changes})


CLUSTERS = {
    "venv-gpus-per-node": job(
        slurm={"nodes": 2, "partition": "h100", "time": "04:00:00", "exclusive": True},
        runtime={"venv": "/home/ada/megaswift/.venv", "env": {"NCCL_DEBUG": "WARN"}},
    ),
    "conda-modules-gres": job(
        slurm={
            "nodes": 4,
            "partition": "gpu",
            "account": "proj42",
            "qos": "long",
            "time": "2-00:00:00",
            "gpu_request": "gres",
            "gpu_type": "a100",
            "constraint": "a100_80&ib",
            "exclude": "gpu[07,12]",
            "mem": "0",
            "sbatch_args": ["--mail-type=END", "--mail-user=ada@example.org"],
        },
        runtime={"modules": ["cuda/12.4", "nccl"], "conda": "mega swift", "setup": ["ulimit -l unlimited"]},
        ranks_per_node=4,
        gpus_per_node=4,
    ),
    "apptainer-torchrun": job(
        slurm={"nodes": 2, "partition": "gpu", "time": "08:00:00"},
        runtime={"container": "/images/megaswift 0.1.sif", "container_mounts": ["/data:/data", "/scratch:/scratch"]},
        launcher="torchrun",
        container_runtime="apptainer",
        cpus_per_task=96,
    ),
    "pyxis-torchrun": job(
        slurm={"nodes": 16, "partition": "batch", "time": "04:00:00", "reservation": "week 12"},
        runtime={"container": "nvcr.io#nvidia/pytorch:26.01-py3", "container_mounts": ["/lustre:/lustre"]},
        launcher="torchrun",
        container_runtime="pyxis",
        cpus_per_task=None,
    ),
    "cpu": job(
        slurm={"nodes": 1, "time": "30", "requeue": False, "signal_seconds": 0},
        runtime={"venv": "/opt/venv"},
        ranks_per_node=2,
        gpus_per_node=0,
        cpus_per_task=None,
    ),
    "array": job(
        slurm={"nodes": 1, "partition": "l40s", "time": "01:00:00", "array_limit": 2, "dependency": "afterok:17"},
        runtime={"venv": "/opt/venv"},
        mpi="pmi2",
        commands=tuple((*SFT[:-1], f"runs/a/{row:03d}-{lr}", "--lr", lr) for row, lr in enumerate(["1e-5", "3e-5", "1e-4"])),
        output_dirs=("runs/a/000-1e-5", "runs/a/001-3e-5", "runs/a/002-1e-4"),
        ranks_per_node=4,
        gpus_per_node=4,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CLUSTERS)
def test_the_script_is_the_golden_one_and_bash_reads_it(name: str) -> None:
    script = sbatch_script(CLUSTERS[name])
    assert script == (GOLDEN / f"{name}.sbatch").read_text()
    done = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr


def test_what_the_user_wrote_reaches_the_program_unchanged() -> None:
    words = ("sft", "--system", 'it\'s "$HOME" & `ls`; #1', "--columns", '{"a b": "c"}')
    script = sbatch_script(replace(CLUSTERS["cpu"], commands=(words,)))
    start = script.index("RUN=(")
    shell = script[start : script.index("\nmkdir", start)] + '\nprintf "%s\\n" "${RUN[@]}"'
    done = subprocess.run(["bash", "-c", shell], text=True, capture_output=True, check=True)
    assert done.stdout.splitlines() == list(words)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("30", 1800), ("1:30", 90), ("04:00:00", 14400), ("2-0", 172800), ("1-02:03", 93780), ("1-02:03:04", 93784), ("UNLIMITED", None)],
)  # fmt: skip
def test_time_limits_are_read_as_sbatch_reads_them(text: str, seconds: int | None) -> None:
    assert parse_time_limit(text) == seconds


@pytest.mark.parametrize("text", ["4h", "1:2:3:4", "", "-5", "1-"])
def test_other_time_limits_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="is not a time limit"):
        parse_time_limit(text)


def test_the_warning_comes_within_the_last_fifth() -> None:
    short = replace(CLUSTERS["cpu"], slurm=SlurmConfig(time="5", signal_seconds=120))
    assert "#SBATCH --signal=USR1@60\n" in sbatch_script(short)


# Stand-ins for Slurm's commands: what the script does with the end of a slice is decided by bash alone.
FAKES = {
    "srun": '#!/bin/bash\n[ -z "$NEW" ] || echo "$NEW" > "$OUT_DIR/latest"\n[ -z "$MARK" ] || touch "$OUT_DIR/unfinished"\n[ -z "$ERROR" ] || touch "$MEGASWIFT_USER_ERROR"\nexit "$CODE"\n',
    "scontrol": '#!/bin/bash\n[ "$1" != show ] || { echo n1; exit; }\necho "$@" >> "$OUT_DIR/calls"\nkill "$PPID"\n',
    "squeue": '#!/bin/bash\necho "$@" >> "$OUT_DIR/asked"\necho NONE\n',
    "sleep": '#!/bin/bash\n[ "$1" = 60 ] || exec /bin/sleep "$1"\n',
}


def _slice(tmp_path: Path, *, of: str = "cpu", requeue: bool = True, **environ: str) -> tuple[int, str, str]:
    """Run a script with stand-ins; returns its code, what it said, and the calls to scontrol."""
    fakes, out = tmp_path / "bin", tmp_path / "out"
    fakes.mkdir()
    out.mkdir()
    (out / "latest").write_text("checkpoint-1\n")
    for name, text in FAKES.items():
        (fakes / name).write_text(text)
        (fakes / name).chmod(0o755)
    folders = (str(out),) * len(CLUSTERS[of].commands)
    one = replace(
        CLUSTERS[of],
        output_dirs=folders,
        slurm=SlurmConfig(requeue=requeue),
        runtime=RuntimeConfig(),
        cpus_per_task=None,
    )
    defaults = {
        "NEW": "",
        "MARK": "",
        "CODE": "0",
        "ERROR": "",
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "n1",
        "OUT_DIR": str(out),
    }
    done = subprocess.run(
        ["bash"],
        input=sbatch_script(one),
        env={"PATH": f"{fakes}:/usr/bin:/bin", **defaults, **environ},
        text=True,
        capture_output=True,
        timeout=60,
    )
    calls = (out / "calls").read_text() if (out / "calls").exists() else ""
    return done.returncode, done.stdout + done.stderr, calls


def test_a_finished_run_is_over(tmp_path: Path) -> None:
    code, _, calls = _slice(tmp_path, NEW="checkpoint-9")
    assert code == 0 and not calls


def test_a_slice_with_something_new_goes_on(tmp_path: Path) -> None:
    _, said, calls = _slice(tmp_path, NEW="checkpoint-9", MARK="1")
    assert calls == "requeue 7\n" and "with checkpoint-9: requeueing" in said


def test_a_task_of_an_array_asks_about_itself_and_requeues_itself(tmp_path: Path) -> None:
    # One task's SLURM_JOB_ID is the array's: Slurm would take it for all of the tasks.
    array = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "2"}
    _, _, calls = _slice(tmp_path, of="array", NEW="checkpoint-9", MARK="1", **array)
    assert calls == "requeue 7_2\n"
    assert (tmp_path / "out" / "asked").read_text() == "-h -j 7_2 -o %e\n"


def test_a_crash_after_a_checkpoint_goes_on(tmp_path: Path) -> None:
    assert _slice(tmp_path, NEW="checkpoint-9", CODE="137")[2] == "requeue 7\n"


@pytest.mark.parametrize(("mark", "code", "expected"), [("1", "0", 1), ("", "137", 137)])
def test_a_slice_without_a_new_checkpoint_ends_the_chain_and_says_so(
    tmp_path: Path, mark: str, code: str, expected: int
) -> None:
    found, said, calls = _slice(tmp_path, MARK=mark, CODE=code)
    assert found == expected and not calls and "without a new checkpoint: not requeued" in said


def test_a_user_error_is_not_tried_again(tmp_path: Path) -> None:
    code, _, calls = _slice(tmp_path, NEW="checkpoint-9", CODE="143", ERROR="1")
    assert code == 2 and not calls


def test_without_requeue_the_end_is_told(tmp_path: Path) -> None:
    code, said, calls = _slice(tmp_path, requeue=False, NEW="checkpoint-9", MARK="1")
    assert code == 1 and not calls and "not finished (code 0), newest checkpoint: checkpoint-9" in said


if __name__ == "__main__":
    GOLDEN.mkdir(parents=True, exist_ok=True)
    for cluster, facts in CLUSTERS.items():
        (GOLDEN / f"{cluster}.sbatch").write_text(sbatch_script(facts))
