"""Where this process stands among the ranks. Environment variables are read here (and in logs.py), nowhere else.

| variable | set by | why it is read |
|---|---|---|
| RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE | torchrun, launch/local.py | the rank itself; they win over all others |
| MASTER_ADDR, MASTER_PORT | torchrun, launch/local.py, the user | where rank 0 listens |
| MEGASWIFT_ERROR_FILE, TORCHELASTIC_ERROR_FILE | launch/local.py, torchrun | where a failing rank writes its error |
| MEGASWIFT_USER_ERROR | our batch scripts | the file in which the first rank of all leaves a user error: told once, not tried again |
| NPROC_PER_NODE, NNODES, NODE_RANK | the user (ms-swift's names) | ranks to start on this node, and which node it is |
| SLURM_STEP_ID, SLURM_PROCID, SLURM_LOCALID, SLURM_STEP_NUM_TASKS, SLURM_STEP_TASKS_PER_NODE, SLURM_NODEID | srun | the rank, when srun started it |
| SLURM_STEP_NUM_NODES, SLURM_STEP_NODELIST, SLURM_JOB_NODELIST | srun, sbatch | the nodes; the first one is rank 0's |
| SLURM_JOB_ID | sbatch | a port that no other job derives |
| SLURM_JOB_END_TIME | Slurm 23.02, our batch scripts | when the job's time is over |
| OMPI_COMM_WORLD_RANK, _SIZE, _LOCAL_RANK, _LOCAL_SIZE | Open MPI's mpirun | the rank, when mpirun started it |
| PMI_RANK, PMI_SIZE, MPI_LOCALRANKID, MPI_LOCALNRANKS | MPICH's and Intel's mpirun | the same |
| CUDA_VISIBLE_DEVICES | the user, Slurm | GPUs that this process may use |
| LD_LIBRARY_PATH | the user, modules of a cluster | handed to programs that start without an environment: Python may need it to start |
| VLLM_LOGGING_LEVEL | the user | how much vLLM says in the ranks of a trainer |

Set for ranks where the user has not: OMP_NUM_THREADS (a share of the cores, not all of them for each rank) and
CUDA_DEVICE_MAX_CONNECTIONS=1 (Megatron-Core overlaps communication with computation only in the order in which they were
launched).
"""

import os
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

from megaswift.errors import LaunchError
from megaswift.launch.hostlist import expand_hostlist

# Ports that a Slurm job derives from its id; below the usual ephemeral range, which starts at 32768.
FIRST_PORT, NUM_PORTS = 15000, 15000
TORCHRUN_PORT = 29500  # torchrun's default master port


@dataclass(frozen=True, kw_only=True)
class RankEnv:
    """One rank of a world that somebody has started."""

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    master_addr: str | None  # None: rank 0 has to tell the others (launch/mpi.py)
    master_port: int | None
    source: str  # "torchrun", "slurm", "mpi" or "single"

    @property
    def master(self) -> str:
        """host:port of rank 0's store."""
        assert self.master_addr is not None and self.master_port is not None, self
        return f"{self.master_addr}:{self.master_port}"


@dataclass(frozen=True, kw_only=True)
class NodeEnv:
    """One node on which the ranks are still to be started."""

    node_rank: int = 0
    num_nodes: int = 1
    nproc_per_node: int | None = None  # None: not said
    master_addr: str | None = None
    master_port: int | None = None


def rank_env(environ: Mapping[str, str] = os.environ) -> RankEnv | None:
    """Return this process's rank, or None where nobody has started ranks; raises LaunchError for half a set of variables."""
    if "RANK" in environ or "WORLD_SIZE" in environ:
        return _torchrun(environ)
    if "OMPI_COMM_WORLD_RANK" in environ:
        names = [f"OMPI_COMM_WORLD_{name}" for name in ("RANK", "LOCAL_RANK", "SIZE", "LOCAL_SIZE")]
        return _mpi(environ, *names)
    if "PMI_RANK" in environ and "MPI_LOCALRANKID" in environ:
        return _mpi(environ, "PMI_RANK", "MPI_LOCALRANKID", "PMI_SIZE", "MPI_LOCALNRANKS")
    if "SLURM_STEP_ID" in environ and "SLURM_PROCID" in environ:
        return _slurm(environ)
    return None


def node_env(environ: Mapping[str, str] = os.environ) -> NodeEnv:
    """Return what the environment says about starting ranks on this node; raises LaunchError."""
    num_nodes = _number(environ, "NNODES", 1)
    return NodeEnv(
        node_rank=_number(environ, "NODE_RANK", 0),
        num_nodes=num_nodes,
        nproc_per_node=_number(environ, "NPROC_PER_NODE", 0) or None,
        master_addr=environ.get("MASTER_ADDR"),
        master_port=_number(environ, "MASTER_PORT", 0 if num_nodes == 1 else TORCHRUN_PORT) or None,
    )


def slurm_node(environ: Mapping[str, str] = os.environ) -> NodeEnv | None:
    """Return the node for `srun --ntasks-per-node=1`, one task that starts a node's ranks; None outside such a step."""
    if "SLURM_STEP_ID" not in environ or environ.get("SLURM_STEP_NUM_TASKS") != environ.get(
        "SLURM_STEP_NUM_NODES"
    ):
        return None
    return NodeEnv(
        node_rank=_number(environ, "SLURM_NODEID", 0),
        num_nodes=_number(environ, "SLURM_STEP_NUM_NODES", 1),
        nproc_per_node=node_env(environ).nproc_per_node,
        master_addr=environ.get("MASTER_ADDR") or _slurm_master(environ),
        master_port=_slurm_port(environ),
    )


def slurm_job_id(environ: Mapping[str, str] = os.environ) -> str | None:
    """Return the id of the Slurm job that this process belongs to."""
    return environ.get("SLURM_JOB_ID")


def slurm_job_end(environ: Mapping[str, str] = os.environ) -> float | None:
    """Return when the job ends, in seconds since the epoch, where the environment says so."""
    return float(_number(environ, "SLURM_JOB_END_TIME", 0)) or None


def job_port(job_id: int) -> int:
    """Return the port that every node of Slurm job `job_id` derives for itself."""
    return FIRST_PORT + job_id % NUM_PORTS


def rank_environment(
    *,
    rank: int,
    local_rank: int,
    world_size: int,
    local_world_size: int,
    master_addr: str,
    master_port: int,
    threads: int,
    error_file: str,
    environ: Mapping[str, str] = os.environ,
) -> dict[str, str]:
    """Return the environment of a rank that is about to be started; torchrun's names, so that every library knows them."""
    return {
        "OMP_NUM_THREADS": str(threads),
        **environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(local_rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(local_world_size),
        "MASTER_ADDR": master_addr,
        "MASTER_PORT": str(master_port),
        "MEGASWIFT_ERROR_FILE": error_file,
    }


def set_library_defaults(
    environ: MutableMapping[str, str] = os.environ, *, beside_vllm: bool = False
) -> None:
    """Set what Megatron-Core and torch expect before a GPU is touched, unless the user has.

    `beside_vllm` says that vLLM is in this process, whose sleep mode does not go with blocks that grow (its device_allocator/cumem.py).
    """
    environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    if not beside_vllm and "PYTORCH_ALLOC_CONF" not in environ:  # the newer name of the same
        # Packs differ in length: memory that grows in place is not left in pieces. The planner counts on it.
        environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")


def own_error_file(environ: Mapping[str, str] = os.environ) -> str | None:
    """Return where launch/local.py, having started this rank, wants to read its error; it prints it."""
    return environ.get("MEGASWIFT_ERROR_FILE")


def user_error_file(environ: Mapping[str, str] = os.environ) -> str | None:
    """Return where the batch script that started this rank wants to find a user error."""
    return environ.get("MEGASWIFT_USER_ERROR")


def torchrun_error_file(environ: Mapping[str, str] = os.environ) -> str | None:
    """Return where torchrun, having started this rank, wants to read its error."""
    return environ.get("TORCHELASTIC_ERROR_FILE")


def visible_gpus(environ: Mapping[str, str] = os.environ) -> list[str] | None:
    """Return the GPUs that CUDA_VISIBLE_DEVICES names, or None where it is not set."""
    value = environ.get("CUDA_VISIBLE_DEVICES")
    return None if value is None else [one for one in value.split(",") if one.strip() not in ("", "-1")]


def vllm_logging_level(environ: Mapping[str, str] = os.environ) -> str:
    """Return how much vLLM may say beside a trainer's own lines: errors, unless asked for more."""
    return environ.get("VLLM_LOGGING_LEVEL", "ERROR")


def library_path(environ: Mapping[str, str] = os.environ) -> str | None:
    """Return where this process finds shared libraries beside the system's."""
    return environ.get("LD_LIBRARY_PATH")


def _torchrun(environ: Mapping[str, str]) -> RankEnv:
    missing = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in environ]
    if missing:
        raise LaunchError(
            f"RANK or WORLD_SIZE is set but {', '.join(missing)} is not. torchrun sets all of them; unset them to start "
            "ranks with --nproc_per_node."
        )
    rank, world_size = _number(environ, "RANK", 0), _number(environ, "WORLD_SIZE", 1)
    return RankEnv(
        rank=rank,
        local_rank=_number(environ, "LOCAL_RANK", rank),
        world_size=world_size,
        local_world_size=_number(environ, "LOCAL_WORLD_SIZE", world_size),
        master_addr=environ["MASTER_ADDR"],
        master_port=_number(environ, "MASTER_PORT", 0),
        source="torchrun",
    )


def _slurm(environ: Mapping[str, str]) -> RankEnv:
    world_size = _number(environ, "SLURM_STEP_NUM_TASKS", _number(environ, "SLURM_NTASKS", 1))
    counts = expand_counts(environ.get("SLURM_STEP_TASKS_PER_NODE", str(world_size)))
    node = _number(environ, "SLURM_NODEID", 0)
    return RankEnv(
        rank=_number(environ, "SLURM_PROCID", 0),
        local_rank=_number(environ, "SLURM_LOCALID", 0),
        world_size=world_size,
        local_world_size=counts[node] if node < len(counts) else counts[-1],
        master_addr=environ.get("MASTER_ADDR") or _slurm_master(environ),
        master_port=_slurm_port(environ),
        source="slurm",
    )


def _mpi(environ: Mapping[str, str], rank: str, local_rank: str, size: str, local_size: str) -> RankEnv:
    return RankEnv(
        rank=_number(environ, rank, 0),
        local_rank=_number(environ, local_rank, 0),
        world_size=_number(environ, size, 1),
        local_world_size=_number(environ, local_size, 1),
        master_addr=environ.get("MASTER_ADDR"),
        master_port=_number(environ, "MASTER_PORT", 0) or None,
        source="mpi",
    )


def expand_counts(text: str) -> list[int]:
    """Return Slurm's run-length list as numbers: `4(x2),1` -> [4, 4, 1]."""
    counts: list[int] = []
    for part in text.split(","):
        count, _, times = part.partition("(x")
        counts += [int(count)] * int(times.rstrip(")") or 1)
    return counts


def _slurm_master(environ: Mapping[str, str]) -> str:
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST")
    return expand_hostlist(nodes)[0] if nodes else "127.0.0.1"


def _slurm_port(environ: Mapping[str, str]) -> int:
    return _number(environ, "MASTER_PORT", 0) or job_port(_number(environ, "SLURM_JOB_ID", 0))


def _number(environ: Mapping[str, str], name: str, default: int) -> int:
    value = environ.get(name, "")
    if not value:
        return default
    try:
        return int(value)
    except ValueError:
        raise LaunchError(
            f"environment variable {name}={value} is not a whole number. Unset it, or correct it."
        ) from None
