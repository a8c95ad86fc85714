"""How the ranks of a job are started: one task of Slurm for every rank, or one a node in which torchrun starts them."""

from collections.abc import Sequence
from dataclasses import dataclass

from megaswift.errors import LaunchError, nearest
from megaswift.launch.slurm import Partition

PREFERRED = ("none", "pmi2", "pmix")  # ranks meet over TCP: the less a plugin does, the better


@dataclass(frozen=True, kw_only=True)
class Launcher:
    """What starts the ranks, and why."""

    name: str  # "srun" or "torchrun"
    mpi: str  # value of srun --mpi
    reason: str


def choose_launcher(
    asked: str,
    *,
    mpi: str,
    mpi_kinds: Sequence[str] | None,
    container_runtime: str | None,
    partition: Partition | None,
    ranks_per_node: int,
) -> Launcher:
    """Return what starts the ranks; `asked` and `mpi` are the user's, "auto" where it is left to us.

    `mpi_kinds` is what `srun --mpi=list` names; None: there is no srun here to ask. Raises LaunchError for an `mpi` that
    this Slurm does not have.
    """
    if mpi != "auto" and mpi_kinds and mpi not in mpi_kinds:
        raise LaunchError(f"mpi={mpi} is not one that srun has here.{nearest(mpi, mpi_kinds)}")
    usable = [kind for kind in PREFERRED if mpi_kinds is None or kind in mpi_kinds]
    kind = mpi if mpi != "auto" else usable[0] if usable else "none"
    name, reason = _choose(
        usable=bool(usable) or mpi != "auto",
        container_runtime=container_runtime,
        partition=partition,
        ranks_per_node=ranks_per_node,
    )
    if asked != "auto":
        name, reason = asked, "as asked"
    return Launcher(name=name, mpi=kind, reason=reason)


def _choose(
    *, usable: bool, container_runtime: str | None, partition: Partition | None, ranks_per_node: int
) -> tuple[str, str]:
    if container_runtime is not None:
        return "torchrun", f"{container_runtime} sets the image up once a node, not once a rank"
    if not usable:
        return (
            "torchrun",
            f"srun --mpi=list names none of {', '.join(PREFERRED)}: it starts no ranks of its own",
        )
    if partition is not None and partition.cpus < ranks_per_node:
        return (
            "torchrun",
            f"nodes of partition {partition.name} have {partition.cpus} cores for {ranks_per_node} ranks, and Slurm gives every "
            "task one of its own",
        )
    what = "GPU" if partition is not None and partition.gpus else "rank"
    return "srun", f"Slurm gives every {what} a task with cores of its own, and sees each one end"
