"""Settings: how ranks are started."""

from dataclasses import dataclass

from megaswift.config.field import setting


@dataclass(frozen=True, kw_only=True)
class LaunchConfig:
    """Ranks on this node; under torchrun, srun or mpirun the ranks that exist are joined."""

    nproc_per_node: int | None = setting(
        None, "ranks to start here; default: the smallest world the layout needs"
    )
    auto_layout: bool = setting(
        True, "let the planner choose the layout where no parallel flag is given; with one it is off"
    )
    platform: str = setting("auto", "device back end", choices=("auto", "cpu", "cuda"))
    hang_timeout_seconds: float | None = setting(
        None,
        "seconds without progress of any rank after which the run says where each rank is, and stops; 0: never; "
        "default: half of --ddp_timeout_minutes",
    )
