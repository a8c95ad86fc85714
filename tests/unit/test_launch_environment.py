"""Which rank a process is, from what torchrun, Slurm and MPI say."""

from typing import Any

import pytest

from megaswift.errors import LaunchError
from megaswift.launch.environment import (
    NodeEnv,
    RankEnv,
    expand_counts,
    job_port,
    node_env,
    rank_env,
    set_library_defaults,
    slurm_node,
)
from megaswift.launch.join import this_rank
from megaswift.launch.start import plan_start

TORCHRUN = {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "n1", "MASTER_PORT": "29400"}  # fmt: skip
SRUN = {
    "SLURM_JOB_ID": "123",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_STEP_NUM_NODES": "3",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
    "SLURM_STEP_NODELIST": "gpu[07-09]",
}
OPEN_MPI = {"OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "0", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}  # fmt: skip
MPICH = {"PMI_RANK": "2", "MPI_LOCALRANKID": "0", "PMI_SIZE": "4", "MPI_LOCALNRANKS": "2"}


def rank(**changes: Any) -> RankEnv:
    facts: dict[str, Any] = {"rank": 2, "local_rank": 0, "world_size": 4, "local_world_size": 2, "master_addr": None, "master_port": None, "source": "mpi"}  # fmt: skip
    return RankEnv(**{**facts, **changes})


def test_nothing_is_no_rank() -> None:
    assert rank_env({}) is None


def test_torchrun_says_everything() -> None:
    expected = rank(
        rank=5, local_rank=1, world_size=8, local_world_size=4, master_addr="n1", master_port=29400
    )
    found = rank_env({**SRUN, **TORCHRUN})
    assert found == RankEnv(**{**vars(expected), "source": "torchrun"})
    assert found is not None and found.master == "n1:29400"


def test_half_of_torchruns_variables_are_an_error() -> None:
    with pytest.raises(LaunchError, match="WORLD_SIZE, MASTER_ADDR, MASTER_PORT is not"):
        rank_env({"RANK": "0"})
    with pytest.raises(LaunchError, match="RANK=zero is not a whole number"):
        rank_env({**TORCHRUN, "RANK": "zero"})


def test_srun_gives_the_rank_and_the_first_node_listens() -> None:
    found = rank_env(SRUN)
    assert found is not None
    assert (found.rank, found.local_rank, found.world_size, found.local_world_size) == (3, 1, 5, 2)
    assert found.master == f"gpu07:{15000 + 123}" and found.source == "slurm"
    last = rank_env({**SRUN, "SLURM_PROCID": "4", "SLURM_LOCALID": "0", "SLURM_NODEID": "2"})
    assert last is not None and last.local_world_size == 1


def test_a_batch_script_is_no_rank() -> None:
    batch = {name: value for name, value in SRUN.items() if "STEP" not in name}
    assert rank_env({**batch, "SLURM_PROCID": "0", "SLURM_NTASKS": "5"}) is None


@pytest.mark.parametrize("environ", [OPEN_MPI, MPICH])
def test_mpirun_gives_the_rank_without_an_address(environ: dict[str, str]) -> None:
    assert rank_env(environ) == rank()
    told = rank_env({**environ, "MASTER_ADDR": "n1", "MASTER_PORT": "1"})
    assert told == rank(master_addr="n1", master_port=1)


def test_pmi_variables_of_srun_are_not_mpirun() -> None:
    found = rank_env({**SRUN, "PMI_RANK": "3", "PMI_SIZE": "5"})
    assert found is not None and found.source == "slurm"


def test_run_lengths_expand() -> None:
    assert expand_counts("4(x2),1") == [4, 4, 1]


def test_ports_of_jobs_stay_below_the_ephemeral_range() -> None:
    assert all(1024 < job_port(job) < 32768 for job in (0, 1, 14999, 15000, 4_000_000_000))


def test_a_lone_rank_meets_itself() -> None:
    found = this_rank({})
    assert (found.rank, found.world_size, found.master_addr) == (0, 1, "127.0.0.1") and found.master_port


def test_a_lone_rank_of_torchrun_meets_at_torchruns_store() -> None:
    environ = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "node7", "MASTER_PORT": "15007"}
    assert this_rank(environ).master == "node7:15007"  # another one would be waited for, for ever


def test_the_names_of_ms_swift_describe_a_node() -> None:
    environ = {"NPROC_PER_NODE": "8", "NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "n1"}
    assert node_env(environ) == NodeEnv(
        node_rank=1, num_nodes=2, nproc_per_node=8, master_addr="n1", master_port=29500
    )


def test_ranks_that_exist_are_joined() -> None:
    start = plan_start(TORCHRUN, nproc_per_node=None, minimal_world=1)
    assert start.rank is not None and start.world_size == 8
    with pytest.raises(LaunchError, match="nproc_per_node=2 but torchrun has started 4 ranks"):
        plan_start(TORCHRUN, nproc_per_node=2, minimal_world=1)


def test_the_smallest_world_is_started_unless_more_is_asked_for() -> None:
    assert plan_start({}, nproc_per_node=None, minimal_world=4).nproc == 4
    assert plan_start({"NPROC_PER_NODE": "8"}, nproc_per_node=None, minimal_world=4).nproc == 8
    assert plan_start({"NPROC_PER_NODE": "8"}, nproc_per_node=2, minimal_world=4).nproc == 2


def test_two_nodes_need_an_address() -> None:
    with pytest.raises(LaunchError, match="NNODES=2 but MASTER_ADDR is not set"):
        plan_start({"NNODES": "2"}, nproc_per_node=2, minimal_world=1)
    start = plan_start({"NNODES": "2", "MASTER_ADDR": "n1"}, nproc_per_node=None, minimal_world=4)
    assert (start.nproc, start.world_size) == (2, 4)


def test_a_shell_of_an_allocation_starts_its_own_ranks() -> None:
    shell = {
        **SRUN,
        "SLURM_PROCID": "0",
        "SLURM_NODEID": "0",
        "SLURM_STEP_NUM_TASKS": "1",
        "SLURM_STEP_NUM_NODES": "1",
    }
    start = plan_start(shell, nproc_per_node=None, minimal_world=2)
    assert start.rank is None and start.world_size == 2


def test_one_task_a_node_starts_the_ranks_of_its_node() -> None:
    environ = {**SRUN, "SLURM_STEP_NUM_TASKS": "3", "SLURM_STEP_TASKS_PER_NODE": "1(x3)"}
    start = plan_start(environ, nproc_per_node=4, minimal_world=1)
    assert start.rank is None and start.world_size == 12
    assert (start.node.node_rank, start.node.master_addr, start.node.master_port) == (1, "gpu07", 15123)
    elsewhere = slurm_node({**environ, "MASTER_ADDR": "gpu07-ib", "MASTER_PORT": "29400"})
    assert elsewhere is not None and (elsewhere.master_addr, elsewhere.master_port) == ("gpu07-ib", 29400)
    assert slurm_node(SRUN) is None  # five tasks on three nodes are ranks


def test_one_task_a_node_without_more_is_a_rank_each() -> None:
    environ = {**SRUN, "SLURM_STEP_NUM_TASKS": "3", "SLURM_STEP_TASKS_PER_NODE": "1(x3)"}
    start = plan_start(environ, nproc_per_node=None, minimal_world=1)
    assert start.rank is not None and start.world_size == 3


def test_memory_grows_in_place_unless_the_user_or_vllm_minds() -> None:
    name, grows = "PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True"
    for given, beside_vllm, expected in (
        ({}, False, grows),
        ({name: "max_split_size_mb:64"}, False, "max_split_size_mb:64"),
        ({"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}, False, None),
        ({}, True, None),
    ):
        environ = dict(given)
        set_library_defaults(environ, beside_vllm=beside_vllm)
        assert environ.get(name) == expected
