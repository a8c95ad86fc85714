"""Names ranks that are slower than others at the same work: every step waits for them."""

import socket
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from megaswift.launch.stragglers import Pace, Straggler, Watch
from megaswift.logs import get_logger
from megaswift.training.allocation import timed_product
from megaswift.training.loop import Step
from megaswift.training.reporters import Reporter

logger = get_logger(__name__)

WINDOW_S = 10.0  # the least that is judged: a rank's work is known to some 4 % then (launch/heartbeat.py)


def places_of_ranks(device: torch.device) -> list[str]:
    """Return the host, and where there is one the GPU, of every rank; every rank of the world calls it."""
    place = socket.gethostname()
    if device.type == "cuda":
        place += f", GPU {device.index or 0} ({torch.cuda.get_device_name(device)})"
    places = [place] * dist.get_world_size()
    dist.all_gather_object(places, place)
    return places


class Stragglers:
    """Compares the ranks' own work every `every` steps, and names each rank once that is slow in several windows.

    The work is the time in which a rank did not wait for others. On GPUs, where a rank launches work and waits elsewhere, a
    matrix product of a fixed size is timed and compared too.
    """

    def __init__(
        self,
        work_s: Callable[[], float],
        reporters: Sequence[Reporter],
        *,
        peers: int,
        places: Sequence[str],
        every: int,
        device: torch.device,
        window_s: float = WINDOW_S,
    ) -> None:
        """`work_s` tells the seconds that this rank has worked so far, and `places` where each rank is.

        Ranks with the same number `peers` do the same work: its pipeline stage. `reporters` are rank 0's.
        """
        self._work_s, self._reporters, self._peers, self._places = work_s, reporters, peers, places
        self._every, self._device, self._window_s = every, device, window_s
        self._watch = Watch()
        self._steps, self._time_s = 0, 0.0  # of this window
        self._before = [0.0] * len(places)  # what every rank had worked when this window began

    def after_step(self, step: Step) -> bool:
        """Gather the ranks' figures where they are due, one all-reduce of three float64 a rank; rank 0 judges them."""
        self._steps, self._time_s = self._steps + 1, self._time_s + step.time_s
        if step.progress.step % self._every:
            return False
        gathered = self._gather()
        if dist.get_rank() == 0 and self._time_s >= self._window_s:
            for one in self._watch.see(self._paces(gathered)):
                self._tell(one, step.progress.step)
            self._before = [work for work, _, _ in gathered]
            self._steps, self._time_s = 0, 0.0
        return False

    def _gather(self) -> list[list[float]]:
        """Return [work so far, product or nan, peers] of every rank; every rank of the world calls it."""
        product_s = timed_product(self._device)[0] if self._device.type == "cuda" else float("nan")
        mine = torch.tensor([self._work_s(), product_s, float(self._peers)], dtype=torch.float64)
        table = torch.zeros(dist.get_world_size(), len(mine), dtype=torch.float64, device=self._device)
        table[dist.get_rank()] = mine
        dist.all_reduce(table)
        rows: list[list[float]] = table.tolist()
        return rows

    def _paces(self, gathered: list[list[float]]) -> list[Pace]:
        return [
            Pace(
                rank=rank,
                peers=int(peers),
                work_s=(work - self._before[rank]) / self._steps,
                product_s=product if product == product else None,  # nan: not timed
            )
            for rank, (work, product, peers) in enumerate(gathered)
        ]

    def _tell(self, one: Straggler, step: int) -> None:
        place = self._places[one.rank]
        logger.warning("%s", one.told(place))
        line = {
            "step": step,
            "straggler": one.rank,
            "place": place,
            one.what: one.seconds,
            f"usual_{one.what}": one.usual_s,
        }
        for reporter in self._reporters:
            reporter.report(line)
