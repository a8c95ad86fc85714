"""Decide how the ranks of a run come to be: joined, in this process, or started on this node."""

from collections.abc import Mapping
from dataclasses import dataclass

from megaswift.errors import LaunchError
from megaswift.launch.environment import NodeEnv, RankEnv, node_env, rank_env, slurm_node


@dataclass(frozen=True, kw_only=True)
class Start:
    """How this process takes part: as `rank`, or by starting `nproc` ranks on `node`."""

    rank: RankEnv | None
    node: NodeEnv
    nproc: int

    @property
    def world_size(self) -> int:
        """Ranks of the whole run."""
        return self.rank.world_size if self.rank else self.nproc * self.node.num_nodes


def plan_start(environ: Mapping[str, str], *, nproc_per_node: int | None, minimal_world: int) -> Start:
    """Return how this process takes part in a run of at least `minimal_world` ranks; raises LaunchError.

    Ranks that somebody has started are joined. Otherwise `nproc_per_node` (then NPROC_PER_NODE, then the smallest world
    that the layout needs) ranks are started here. A Slurm step of one task a node that is asked for several ranks a node
    starts them.
    """
    rank, on_slurm = rank_env(environ), slurm_node(environ)
    node = on_slurm or node_env(environ)
    nproc = nproc_per_node or node.nproc_per_node
    if rank is not None and rank.source == "slurm" and on_slurm is not None:
        if rank.world_size == 1 or (nproc or 1) > 1:
            rank = None  # a shell of an allocation, or one task that starts a node's ranks
    if rank is not None:
        if nproc_per_node not in (None, rank.local_world_size):
            raise LaunchError(
                f"nproc_per_node={nproc_per_node} but {rank.source} has started {rank.local_world_size} ranks on this node. "
                "Leave it out."
            )
        return Start(rank=rank, node=node, nproc=rank.local_world_size)
    if node.num_nodes > 1 and node.master_addr is None:
        raise LaunchError(
            f"NNODES={node.num_nodes} but MASTER_ADDR is not set. Set it to the address of node 0, and MASTER_PORT to a free port."
        )
    return Start(rank=None, node=node, nproc=nproc or -(-minimal_world // node.num_nodes))
