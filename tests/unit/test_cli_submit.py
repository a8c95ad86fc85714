"""`megaswift submit` with stand-ins for Slurm's commands."""

import json
import os
from pathlib import Path

import pytest

from megaswift.cli.main import main
from tests.unit.test_cli import TINY_LLAMA

SINFO = (
    "gpu*|up|16|96|gpu:h100:8(S:0-1)|2-00:00:00\ncpu|up|4|64|(null)|infinite\nold|down|2|32|gpu:4|1:00:00\n"
)
# What `srun --mpi=list` prints (slurm 22.05); older ones write to stderr, each line behind "srun: ".
MPI_KINDS = "MPI plugin types are...\n\tpmix\n\tnone\n\tpmi2\nspecific pmix plugin versions available: pmix_v4,pmix_v5\n"
OLD_KINDS = "srun: MPI types are...\nsrun: pmi2\nsrun: openmpi\n"


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model and rows, and Slurm's commands that write down how they were called."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in {"sinfo": SINFO, "srun": MPI_KINDS, "sbatch": "4711;lab\n", "scancel": ""}.items():
        (programs / f"{name}.out").write_text(text)
        (programs / name).write_text(
            f'#!/bin/sh\necho {name} "$@" >> {tmp_path}/calls\ncat {programs}/{name}.out\n'
        )
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(TINY_LLAMA))
    (tmp_path / "model" / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "rows.jsonl").write_text("{}\n")
    return tmp_path


SFT = "submit sft --model model --dataset rows.jsonl --output_dir out".split()


def test_a_run_is_written_down_and_handed_in(cluster: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SFT, "--nodes", "2", "--time", "04:00:00", "--tp", "2"]) == 0
    assert capsys.readouterr().out == "4711\n"
    script = (cluster / "out" / "slurm" / "megaswift-sft.sbatch").read_text()
    assert "#SBATCH --nodes=2\n" in script and "#SBATCH --gpus-per-node=8\n" in script
    assert "#SBATCH --ntasks-per-node=8\n" in script and "#SBATCH --cpus-per-task=12\n" in script
    assert "RUN=(sft --model model --dataset rows.jsonl --output_dir out --tp 2)" in script
    assert "sbatch --parsable out/slurm/megaswift-sft.sbatch" in (cluster / "calls").read_text()


def test_a_layout_is_chosen_for_the_partitions_gpus(
    cluster: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*SFT, "--dry_run", "--nodes", "2", "--global_batch_size", "32"]) == 0
    captured = capsys.readouterr()
    assert "on the fullest of 16 H100-80G" in captured.err
    assert "--global_batch_size 32 --tensor_model_parallel_size 1 --pipeline_model" in captured.out


def test_the_kind_of_node_is_the_one_with_the_gpus_that_are_asked_for(
    cluster: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (cluster / "bin" / "sinfo.out").write_text(
        "gpu*|up|16|96|gpu:h100:8(S:0-1)|infinite\ngpu*|up|2|64|gpu:a100:4|infinite\n"
    )
    assert main([*SFT, "--dry_run", "--gpu_type", "a100"]) == 0
    captured = capsys.readouterr()
    assert "on the fullest of 4 A100" in captured.err
    assert "#SBATCH --gpus-per-node=a100:4\n" in captured.out
    assert "#SBATCH --ntasks-per-node=4\n" in captured.out and "#SBATCH --cpus-per-task=16\n" in captured.out
    assert main([*SFT, "--nodes", "3", "--gpu_type", "a100"]) == 2
    assert "nodes=3 but partition gpu has 2 such nodes" in capsys.readouterr().err


def test_dry_run_prints_and_hands_nothing_in(cluster: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SFT, "--dry_run", "--partition", "cpu", "--nproc_per_node", "2"]) == 0
    script = capsys.readouterr().out
    assert (
        "#SBATCH --partition=cpu\n" in script
        and "gpus" not in script
        and "#SBATCH --ntasks-per-node=2\n" in script
    )
    assert not (cluster / "out").exists() and "sbatch" not in (cluster / "calls").read_text()


def test_a_container_is_run_by_torchrun(cluster: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SFT, "--dry_run", "--container", "image.sif"]) == 0
    script = capsys.readouterr().out
    assert "apptainer exec" in script and "torchrun --nnodes=1 --nproc-per-node=8" in script
    assert "#SBATCH --ntasks-per-node=1\n" in script and "#SBATCH --cpus-per-task=96\n" in script
    assert "activate" not in script


@pytest.mark.parametrize(
    ("kinds", "words", "line", "reason"),
    [
        (
            MPI_KINDS,
            "",
            "--mpi=none --ntasks-per-node=8",
            "srun: Slurm gives every GPU a task with cores of its own",
        ),
        (MPI_KINDS, "--mpi pmix_v4", "--mpi=pmix_v4 --ntasks-per-node=8", "srun: Slurm gives"),
        (OLD_KINDS, "", "--mpi=pmi2 --ntasks-per-node=8", "srun: Slurm gives"),
        (
            "",
            "",
            "--mpi=none --ntasks-per-node=1",
            "torchrun: srun --mpi=list names none of none, pmi2, pmix",
        ),
        ("", "--launcher srun", "--mpi=none --ntasks-per-node=8", "srun: as asked"),
        (MPI_KINDS, "--launcher torchrun", "--mpi=none --ntasks-per-node=1", "torchrun: as asked"),
        (
            MPI_KINDS,
            "--nproc_per_node 100",
            "--ntasks-per-node=1",
            "torchrun: nodes of partition gpu have 96 cores",
        ),
        (MPI_KINDS, "--container a.sif", "--ntasks-per-node=1", "torchrun: apptainer sets the image up once"),
    ],
)
def test_what_starts_the_ranks_follows_from_the_nodes_and_from_slurm(
    cluster: Path, capsys: pytest.CaptureFixture[str], kinds: str, words: str, line: str, reason: str
) -> None:
    stream = ">&2" if kinds == OLD_KINDS else ""
    (cluster / "bin" / "srun").write_text(f"#!/bin/sh\ncat {cluster}/bin/srun.out {stream}\n")
    (cluster / "bin" / "srun.out").write_text(kinds)
    assert main([*SFT, "--dry_run", "--tp", "1", "--global_batch_size", "800", *words.split()]) == 0
    captured = capsys.readouterr()
    assert line in captured.out and f"ranks are started by {reason}" in captured.err
    assert "--launcher overrides it" in captured.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--mpi pmixx", "mpi=pmixx is not one that srun has here. Did you mean pmix"),
        ("--partition gpus", "partition=gpus is not a partition of this cluster. Did you mean gpu?"),
        ("--partition old", "partition=old is down. Choose --partition from cpu, gpu"),
        ("--gpus_per_node 9", "gpus_per_node=9 but nodes of partition gpu have 8"),
        ("--nodes 17", "nodes=17 but partition gpu has 16 such nodes. Ask for at most 16"),
        ("--nodes 0", "nodes=0 is too small"),
        ("--time 4h", "time=4h is not a time limit"),
        ("--tp 5", "tp=5 does not divide ffn_hidden_size=96"),
        ("--pp 3", "pp=3 x vpp=1 does not divide num_layers=2"),
        ("--val_dataset nowhere/rows.jsonl", "dataset=nowhere/rows.jsonl is not there"),
        ("--lerning_rate 1", "lerning_rate is not a flag"),
        ("--launcher mpirun", "launcher=mpirun is not one of the choices"),
        ("--job_name team/run", "job_name=team/run names the script too"),
        ("--array_limit 3", "array_limit=3 is for the runs of a matrix"),
        ('--env {"B":null}', "env has no value for B"),
        ("--matrix nowhere.yaml", "matrix=nowhere.yaml cannot be read"),
    ],
)
def test_what_would_fail_later_fails_here(
    cluster: Path, capsys: pytest.CaptureFixture[str], words: str, message: str
) -> None:
    assert main([*SFT, *words.split()]) == 2
    assert message in capsys.readouterr().err
    calls = (cluster / "calls").read_text() if (cluster / "calls").exists() else ""
    assert "sbatch" not in calls and not (cluster / "out").exists()


def test_weights_that_are_not_here_fail_here(cluster: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (cluster / "model" / "model.safetensors").unlink()
    assert main(SFT) == 2
    assert "model=model has no safetensors" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_fails_here(
    cluster: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (cluster / "file").touch()
    assert main([*SFT[:-1], "file/out"]) == 2
    assert "output_dir=file/out cannot be written below" in capsys.readouterr().err


def test_without_slurm_one_is_told_what_works(
    cluster: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert main([*SFT, "--nproc_per_node", "2"]) == 2
    assert (
        "sinfo is not found on this machine. Run this on a login node of the cluster, or use --dry_run."
        in capsys.readouterr().err
    )
    assert main([*SFT, "--nproc_per_node", "2", "--dry_run"]) == 0


def test_slurms_own_words_are_passed_on(cluster: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (cluster / "bin" / "sbatch").write_text("#!/bin/sh\necho 'sbatch: error: Invalid account' >&2\nexit 1\n")
    assert main(SFT) == 2
    assert "sbatch --parsable failed: sbatch: error: Invalid account." in capsys.readouterr().err


def test_a_matrix_is_a_job_array_with_a_folder_for_each_run(
    cluster: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (cluster / "matrix.yaml").write_text(
        "task: [sft, pt]\nlr: [1e-5, 1e-4]\ndataset: [[rows.jsonl], [rows.jsonl, rows.jsonl]]\n"
    )
    assert main([*SFT, "--matrix", "matrix.yaml", "--array_limit", "3", "--dry_run"]) == 2
    assert "dataset is given twice" in capsys.readouterr().err
    words = [
        "submit",
        "sft",
        "--model",
        "model",
        "--save=out",
        "--matrix",
        "matrix.yaml",
        "--array_limit",
        "3",
        "--dry_run",
    ]
    assert main(words) == 0
    script = capsys.readouterr().out
    assert "#SBATCH --array=0-7%3\n" in script
    assert (
        "RUN=(sft --model model --lr 1e-5 --dataset rows.jsonl --output_dir out/000-sft-1e-5-rows.jsonl --tensor_model"
        in script
    )
    assert (
        "OUT=out/007-pt-1e-4-rows.jsonl+rows.jsonl\n" in script
        and "RUN=(pt --model model --lr 1e-4" in script
    )


def test_jobs_are_listed_and_cancelled(cluster: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (cluster / "bin" / "squeue").write_text(
        "#!/bin/sh\necho '12|megaswift-sft|RUNNING|1:02|4:00:00|2|/a/out/slurm/megaswift-sft.sbatch|n[1-2]'\n"
        "echo '13|other|PENDING|0:00|1:00|1|/a/other.sh|(Priority)'\n"
        "echo '14|mine|PENDING|0:00|1:00|1|/a/out/slurm/mine.sbatch|(Priority)'\n"
    )
    (cluster / "bin" / "squeue").chmod(0o755)
    assert main(["submit", "list"]) == 0
    out = capsys.readouterr().out
    assert "12   megaswift-sft  RUNNING  1:02" in out and "other" not in out
    assert "14   mine           PENDING" in out
    assert main(["submit", "cancel", "12", "14_3"]) == 0
    assert (cluster / "calls").read_text() == "scancel 12\nscancel 14_3\n"
    assert main(["submit", "cancel"]) == 2
    assert main(["submit", "cancle", "1"]) == 2
    assert "cancle is not a task. Did you mean cancel?" in capsys.readouterr().err


def test_no_more_gpus_are_asked_for_than_there_are_ranks(
    cluster: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*SFT, "--dry_run", "--nproc_per_node", "4", "--tp", "2"]) == 0
    script = capsys.readouterr().out
    assert "#SBATCH --gpus-per-node=4\n" in script and "#SBATCH --cpus-per-task=12\n" in script
    assert main([*SFT, "--dry_run", "--platform", "cpu"]) == 0
    assert "gpus" not in capsys.readouterr().out


@pytest.mark.parametrize("last", ["COMPLETED", "PREEMPTED"])
def test_a_jobs_log_is_followed_to_its_end(
    cluster: Path, capsys: pytest.CaptureFixture[str], last: str
) -> None:
    log = cluster / "log"
    (cluster / "bin" / "scontrol").write_text(
        f"#!/bin/sh\necho line >> {log}\n"
        f'[ $(wc -l < {log}) -gt 3 ] && state={last} || state=RUNNING\necho "JobId=5 JobState=$state StdOut={log} X=1"\n'
    )
    (cluster / "bin" / "scontrol").chmod(0o755)
    assert main(["submit", "follow", "5"]) == 0
    assert capsys.readouterr().out == "line\n" * 4
