"""The pipeline's timeline: when every stage works on which micro batch, by the order of the 1F1B schedules."""

from dataclasses import dataclass

from megaswift.planner.costs import Costs
from megaswift.planner.job import Candidate
from megaswift.planner.stages import Stage

BACKWARD_SHARE = 2 / 3  # of both passes, without recomputation; half as much again is repeated by it


@dataclass(frozen=True, kw_only=True)
class Slot:
    """One pass of one chunk of one micro batch on one stage."""

    stage: int
    chunk: int
    micro_batch: int
    forward: bool
    start_s: float
    end_s: float


def timeline(costs: Costs, candidate: Candidate, stages: tuple[Stage, ...], *, most: int) -> list[Slot]:
    """Return the slots of the first `most` micro batches, transfers left out.

    Every stage runs its list of passes in order; a pass waits for the one before it in the model.
    """
    layout = candidate.layout
    count = min(most, candidate.micro_batches(costs.job))
    count -= count % layout.pp if layout.vpp > 1 else 0
    orders = [_order(layout.pp, layout.vpp, stage.index, count) for stage in stages]
    lengths = [_lengths(costs, candidate, stage, layout.vpp) for stage in stages]
    ends: dict[tuple[bool, int, int], float] = {}  # (forward, global chunk, micro batch) -> end
    free = [0.0] * layout.pp
    position = [0] * layout.pp
    slots: list[Slot] = []
    chunks = layout.pp * layout.vpp
    while any(at < len(order) for at, order in zip(position, orders, strict=True)):
        progressed = False
        for stage in range(layout.pp):
            while position[stage] < len(orders[stage]):
                forward, chunk, micro_batch = orders[stage][position[stage]]
                place = chunk * layout.pp + stage
                ready = _ready(ends, forward=forward, place=place, chunks=chunks, micro_batch=micro_batch)
                if ready is None:
                    break
                start = max(ready, free[stage])
                end = start + lengths[stage][0 if forward else 1]
                ends[(forward, place, micro_batch)] = free[stage] = end
                slots.append(
                    Slot(
                        stage=stage,
                        chunk=chunk,
                        micro_batch=micro_batch,
                        forward=forward,
                        start_s=start,
                        end_s=end,
                    )
                )
                position[stage] += 1
                progressed = True
        assert progressed, f"the schedule of {layout} waits for itself"
    return slots


def _ready(
    ends: dict[tuple[bool, int, int], float], *, forward: bool, place: int, chunks: int, micro_batch: int
) -> float | None:
    """Return when the input of a pass is there; None before that is known."""
    if forward:
        return 0.0 if place == 0 else ends.get((True, place - 1, micro_batch))
    before = (True, place, micro_batch) if place == chunks - 1 else (False, place + 1, micro_batch)
    return ends.get(before)


def _order(pp: int, vpp: int, stage: int, count: int) -> list[tuple[bool, int, int]]:
    """Return a stage's passes (forward, chunk, micro batch): warm-up, one forward one backward, the rest.

    Megatron-Core 0.16.1, pipeline_parallel/schedules.py.
    """
    total = count * vpp
    warm_up = pp - stage - 1 if vpp == 1 else 2 * (pp - stage - 1) + (vpp - 1) * pp
    warm_up = min(warm_up, total)
    forwards = [_chunk_pass(pp, vpp, step, forward=True) for step in range(total)]
    backwards = [_chunk_pass(pp, vpp, step, forward=False) for step in range(total)]
    order = forwards[:warm_up]
    for one, other in zip(forwards[warm_up:], backwards, strict=False):
        order += [one, other]
    return order + backwards[total - warm_up :]


def _chunk_pass(pp: int, vpp: int, step: int, *, forward: bool) -> tuple[bool, int, int]:
    """Return the pass of a step: rounds of pp micro batches go through the chunks one after the other."""
    round_of, within = divmod(step, pp * vpp)
    chunk, offset = divmod(within, pp)
    return forward, chunk if forward else vpp - 1 - chunk, round_of * pp + offset


def _lengths(costs: Costs, candidate: Candidate, stage: Stage, vpp: int) -> tuple[float, float]:
    """Return the seconds of a chunk's forward and backward pass."""
    layers = costs.layers(candidate)
    total = sum(count * layers[kind].total for kind, count in stage.kinds)
    total += costs.head(candidate) if stage.last else 0.0
    repeated = 1.0 if candidate.recompute == "full" else 0.0
    backward = (BACKWARD_SHARE * 3 + repeated) / (3 + repeated)
    return total * (1 - backward) / vpp, total * backward / vpp
