"""The rank that this process is, with a place to meet the others."""

from collections.abc import Mapping
from dataclasses import replace

from megaswift.launch.environment import RankEnv, rank_env
from megaswift.launch.local import free_port
from megaswift.launch.mpi import broadcast_master


def this_rank(environ: Mapping[str, str]) -> RankEnv:
    """Return this process's rank: one that torchrun, srun, mpirun or launch/local.py has started, or the only one.

    Under mpirun every rank must call it: rank 0 tells the others where it listens. Raises LaunchError.
    """
    rank = rank_env(environ)
    if rank is None:
        rank = RankEnv(
            rank=0,
            local_rank=0,
            world_size=1,
            local_world_size=1,
            master_addr=None,
            master_port=None,
            source="single",
        )
    # torchrun's agent keeps the store of its ranks, also of a single one: torch would wait for another one for ever.
    if rank.world_size == 1 and rank.source != "torchrun":
        return replace(rank, master_addr="127.0.0.1", master_port=free_port())
    if rank.source == "mpi" and (rank.master_addr is None or rank.master_port is None):
        return broadcast_master(rank)
    return rank
