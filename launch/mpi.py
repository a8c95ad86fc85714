"""Rendezvous under mpirun: rank 0 chooses an address and a port, and mpi4py tells the others. MPI does nothing else here."""

import contextlib
import socket
import sys
import time
from dataclasses import replace

from megaswift.errors import LaunchError
from megaswift.launch.environment import RankEnv
from megaswift.launch.local import free_port

# Routed nowhere: connecting a UDP socket to it sends nothing, and tells which interface leads out of this host.
ELSEWHERE = ("10.255.255.255", 1)
PASS_ON_S = 0.5  # in which mpirun reads what a rank has said last


def broadcast_master(rank: RankEnv) -> RankEnv:
    """Return `rank` with the address and port of rank 0; every rank of the MPI world calls it, once.

    Raises LaunchError without mpi4py, and where mpi4py's MPI is not the one that started the ranks: each process then
    believes that it is alone.
    """
    try:
        from mpi4py import MPI  # importing it initialises MPI, which only ranks of mpirun may do
    except ImportError as error:
        raise LaunchError(
            f"this rank was started by mpirun, and mpi4py cannot be imported ({error}). Install it (pip install "
            "'megaswift[mpi]'), or set MASTER_ADDR and MASTER_PORT."
        ) from None
    world = MPI.COMM_WORLD
    if world.Get_size() != rank.world_size:
        library = MPI.Get_library_version().splitlines()[0].strip()
        raise LaunchError(
            f"mpirun started {rank.world_size} ranks but mpi4py sees {world.Get_size()}: it was built for another MPI "
            f"({library}). Use that MPI's mpirun, or srun."
        )
    one_host = rank.local_world_size == rank.world_size
    mine = ("127.0.0.1" if one_host else address_for_others(), free_port()) if rank.rank == 0 else None
    addr, port = world.bcast(mine, root=0)
    return replace(rank, master_addr=addr, master_port=port)


def abort(code: int) -> None:
    """End all ranks of the MPI world that this process has joined: leaving alone, it would wait for them in MPI_Finalize."""
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi is not None and mpi.Is_initialized() and not mpi.Is_finalized():
        # mpirun ends without what it has not read yet from its ranks: on a busy machine, why this one ends.
        sys.stderr.flush()
        time.sleep(PASS_ON_S)
        mpi.COMM_WORLD.Abort(code)


def address_for_others() -> str:
    """Return an address of this host that other hosts can reach."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one, contextlib.suppress(OSError):
        one.connect(ELSEWHERE)
        return str(one.getsockname()[0])
    return socket.gethostname()
