"""Settings of `megaswift submit`: what is asked of Slurm, and how the program is found on the nodes."""

from dataclasses import dataclass, field
from typing import Any

from megaswift.config.field import setting


@dataclass(frozen=True, kw_only=True)
class SlurmConfig:
    """What the job asks of Slurm."""

    nodes: int = setting(1, "nodes of the job")
    gpus_per_node: int | None = setting(
        None, "GPUs of each node; default: all that the partition's nodes have"
    )
    partition: str | None = setting(None, "partition; default: the cluster's own default")
    account: str | None = setting(None, "account to charge")
    qos: str | None = setting(None, "quality of service")
    time: str | None = setting(
        None, "time limit (minutes, HH:MM:SS or D-HH:MM:SS); a longer run goes on by itself"
    )
    constraint: str | None = setting(None, "features that the nodes must have")
    exclude: str | None = setting(None, "nodes to avoid, as a host list")
    reservation: str | None = setting(None, "reservation to run in")
    mem: str | None = setting(None, "memory of a node, as Slurm writes it; 0: all")
    cpus_per_task: int | None = setting(None, "cores of a task; default: an even share of the node")
    exclusive: bool = setting(False, "have the nodes alone")
    gpu_request: str = setting("gpus", "how GPUs are asked for", choices=("gpus", "gres"))
    gpu_type: str | None = setting(None, "type in the request for GPUs, such as h100")
    job_name: str | None = setting(None, "name of the job; default: megaswift-TASK")
    dependency: str | None = setting(None, "jobs to wait for, such as afterok:123")
    matrix: str | None = setting(
        None, "YAML file of `flag: [value, ...]`: a job array with one run for every combination"
    )
    array_limit: int | None = setting(None, "runs of --matrix that may run at the same time")
    requeue: bool = setting(
        True,
        "go on in a new slice after the time limit, a crash or a preemption, if there is a new checkpoint",
    )
    signal_seconds: int = setting(120, "seconds before the limit at which Slurm warns the ranks; 0: never")
    sbatch_args: list[str] = setting([], "further #SBATCH lines, such as --mail-type=END")


@dataclass(frozen=True, kw_only=True)
class RuntimeConfig:
    """How ranks are started, and in which surroundings."""

    launcher: str = setting(
        "auto",
        "srun starts every rank, or torchrun those of each node; auto: srun, but torchrun in containers, where a node has "
        "fewer cores than ranks, and where srun --mpi=list has nothing to start ranks with",
        choices=("auto", "srun", "torchrun"),
    )
    mpi: str = setting(
        "auto", "value of srun --mpi; auto: none where Slurm has it, as ranks meet over TCP and need no MPI"
    )
    modules: list[str] = setting([], "environment modules to load")
    venv: str | None = setting(
        None, "virtual environment to activate; default: the one that runs this command"
    )
    conda: str | None = setting(None, "conda environment to activate (name or folder)")
    container: str | None = setting(
        None, "image: a .sif file for Apptainer, an image or .sqsh file for Pyxis"
    )
    container_runtime: str = setting(
        "auto", "what runs the image; auto: apptainer for a .sif", choices=("auto", "apptainer", "pyxis")
    )
    container_mounts: list[str] = setting(
        [], "folders that the image sees, as HOST:CONTAINER; the working folder always is"
    )
    env: dict[str, Any] = setting({}, 'environment variables of the ranks: {"NCCL_DEBUG": "WARN"}')
    setup: list[str] = setting([], "shell lines to run before the ranks start")


@dataclass(frozen=True, kw_only=True)
class SubmitConfig:
    """A request to `megaswift submit`, beside the task's own flags."""

    slurm: SlurmConfig = field(default_factory=SlurmConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
