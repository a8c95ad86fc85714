"""Who is slower than the ranks that do the same work: judged from each rank's own times. Pure functions and one memory."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median_low

# Times the median of its peers. The NVIDIA Resiliency Extension calls a rank a straggler below 0.7 of its peers' speed
# (Megatron-Bridge, NVRxStragglerDetectionConfig.gpu_relative_perf_threshold).
SLOW = 1 / 0.7
IN_A_ROW = 3  # windows: a neighbour on the node, a garbage collection or a long document is over by then
LEAST_S = 1e-3  # of work a step; less is taken for as much, because it is known from looks now and then


@dataclass(frozen=True, kw_only=True)
class Pace:
    """How one rank worked in one window of steps, by its own clock."""

    rank: int
    peers: int  # ranks with the same number do the same work: a pipeline stage
    work_s: float  # of a step, without waiting for other ranks
    product_s: float | None = None  # a matrix product of a fixed size on its GPU


@dataclass(frozen=True, kw_only=True)
class Straggler:
    """A rank that was slow in IN_A_ROW windows, with the figures of the last of them."""

    rank: int
    what: str  # "work_s" or "product_s"
    seconds: float
    usual_s: float  # the median of its peers

    @property
    def factor(self) -> float:
        """How many times longer than usual it takes."""
        return self.seconds / self.usual_s

    def told(self, place: str) -> str:
        """Return one sentence for the log."""
        work = "a matrix product" if self.what == "product_s" else "its own work of a step"
        return (
            f"rank {self.rank} on {place} keeps the others waiting: {work} takes {1000 * self.seconds:.3g} ms, and "
            f"{1000 * self.usual_s:.3g} ms on ranks that do the same ({self.factor:.1f} x, {IN_A_ROW} windows in a row)"
        )


class Watch:
    """Remembers who was slow, so that each rank is named once."""

    def __init__(self) -> None:
        self._slow: dict[tuple[int, str], int] = {}  # windows in a row
        self._named: set[int] = set()

    def see(self, paces: Sequence[Pace]) -> list[Straggler]:
        """Return who has become a straggler with this window, which has the paces of all ranks."""
        groups: dict[int, list[Pace]] = {}
        for one in paces:
            groups.setdefault(one.peers, []).append(one)
        work = {one.rank: one.work_s for one in paces}
        usual = {
            peers: max(LEAST_S, median_low(one.work_s for one in group)) for peers, group in groups.items()
        }
        found = self._judge("work_s", work, {one.rank: usual[one.peers] for one in paces})
        products = {one.rank: one.product_s for one in paces if one.product_s is not None}
        if products:  # the same one on every rank
            found += self._judge(
                "product_s", products, dict.fromkeys(products, median_low(products.values()))
            )
        return found

    def _judge(self, what: str, seconds: Mapping[int, float], usual: Mapping[int, float]) -> list[Straggler]:
        found = []
        for rank, one in seconds.items():
            slow = one > SLOW * usual[rank]
            windows = self._slow.get((rank, what), 0) + 1 if slow else 0
            self._slow[rank, what] = windows
            if windows == IN_A_ROW and rank not in self._named:
                self._named.add(rank)
                found.append(Straggler(rank=rank, what=what, seconds=one, usual_s=usual[rank]))
        return found
