"""Is every node of an allocation fit to work? Judged from what each rank says of itself; the judgement is a pure function."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from megaswift.errors import LaunchError
from megaswift.launch.links import LinkTime

SLOW = 1.5  # times the median of all ranks: more than clocks of healthy devices of one kind differ


@dataclass(frozen=True, kw_only=True)
class RankReport:
    """What one rank found on its own node."""

    rank: int
    host: str
    faults: tuple[str, ...]  # each one makes the node unfit
    product_s: float | None  # a matrix product of a fixed size; None where it was not timed
    links: tuple[LinkTime, ...] = ()  # all-reduces that this rank took part in


def check_reports(reports: Sequence[RankReport]) -> list[str]:
    """Return warnings about slow nodes; raises LaunchError that names unfit nodes as --exclude takes them."""
    unfit = {one.host: one for one in sorted(reports, key=lambda one: -one.rank) if one.faults}
    if unfit:
        hosts = sorted(unfit)
        told = "; ".join(
            f"{host} (rank {unfit[host].rank}): {', '.join(unfit[host].faults)}" for host in hosts
        )
        raise LaunchError(f"{told}. Submit the job again with --exclude {','.join(hosts)}.")
    times = [one.product_s for one in reports if one.product_s is not None]
    if len(times) < 2:
        return []
    usual = median(times)
    slow = sorted({one.host for one in reports if (one.product_s or 0.0) > SLOW * usual})
    if not slow:
        return []
    worst = max(times) / usual
    return [
        f"{', '.join(slow)}: a matrix product takes {worst:.1f} x as long as on most ranks, and every step waits for the "
        f"slowest. Consider --exclude {','.join(slow)}."
    ]
