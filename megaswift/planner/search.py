"""The search: which layouts a job can have on a machine, which of them fit, and which is fastest."""

import heapq
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from megaswift.parallel.layout import Layout, padded_kv_heads
from megaswift.planner.costs import Costs
from megaswift.planner.job import Candidate, Job, recompute_modules
from megaswift.planner.machine import Machine
from megaswift.planner.memory import FOUR_BITS, MASTER, WIDE
from megaswift.planner.plan import Plan, cost_of, memory_limit
from megaswift.planner.software import Software
from megaswift.planner.splits import pipeline_splits
from megaswift.planner.stages import Stage
from megaswift.planner.steptime import step_time

MICRO_BATCHES = (1, 2, 4, 8)  # that are tried where none is fixed
MOST_TENSOR = 16  # ranks of tp, also where a link domain is larger: GEMMs become too narrow
# Tokens of a sequence that one cp rank has at least: usually, and where nothing else is left.
SHORT_PIECE, SHORTEST_PIECE = 4096, 512


@dataclass(frozen=True, kw_only=True)
class Space:
    """What may be chosen; an axis with a value in `fixed` has that one."""

    precisions: tuple[str, ...] = ("bf16",)
    context_parallel: bool = True
    last_resort: bool = (
        True  # where nothing fits: optimizer state in host memory, or the frozen base in four bits
    )
    fixed: dict[str, object] = field(default_factory=dict)

    def allows(self, axis: str, value: object) -> bool:
        """Say whether an axis may have a value."""
        return axis not in self.fixed or self.fixed[axis] == value


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a search found: plans that fit, best first, and for every value of every axis the best plan that has it."""

    plans: tuple[Plan, ...]
    by_axis: dict[tuple[str, object], Plan]
    tried: int


def axis_values(candidate: Candidate) -> dict[str, object]:
    """Return the value of every axis of a candidate."""
    layout = candidate.layout
    return {
        "tp": layout.tp,
        "pp": layout.pp,
        "vpp": layout.vpp,
        "cp": layout.cp,
        "cp_comm": candidate.cp_comm,
        "ep": layout.ep,
        "etp": layout.etp,
        "dp": layout.dp,
        "micro_batch": candidate.micro_batch,
        "recompute": candidate.recompute,
        "precision": candidate.precision,
        "offload": candidate.offload_optimizer,
        "four_bits": candidate.four_bits,
    }


def search(job: Job, machine: Machine, *, software: Software, space: Space, keep: int = 20) -> Found:
    """Return the best plans that fit; `plans` is empty where nothing does.

    Shorter pieces of sequences, then the last resort (optimizer state in host memory, or a frozen base in four bits), are
    tried only where nothing fits without them.
    """
    costs = Costs(job, machine, software)
    found = _search(costs, space, piece=SHORT_PIECE, last_resort=False, keep=keep)
    if not found.plans and space.context_parallel and job.seq_len > SHORTEST_PIECE:
        found = _search(costs, space, piece=SHORTEST_PIECE, last_resort=False, keep=keep)
    if not found.plans and space.last_resort and not job.four_bits:
        smaller = _search(costs, space, piece=SHORT_PIECE, last_resort=True, keep=keep)
        found = smaller if smaller.plans else found
    return found


def anything_fits(job: Job, machine: Machine, *, software: Software, space: Space) -> bool:
    """Say whether a search would find a plan; stops at the first."""
    costs = Costs(job, machine, software)
    limit = memory_limit(machine)
    least = space.fixed.get("recompute", "full")
    for piece in (SHORT_PIECE, SHORTEST_PIECE) if space.context_parallel else (SHORT_PIECE,):
        for last_resort in (False, True) if space.last_resort and not job.four_bits else (False,):
            for candidate in _candidates(costs, space, piece, last_resort, limit=limit):
                stages = costs.stages(candidate.layout)
                if costs.memory(replace(candidate, recompute=str(least)), stages).total <= limit:
                    return True
    return False


def _search(costs: Costs, space: Space, *, piece: int, last_resort: bool, keep: int) -> Found:
    """Look at candidates in the order of what they cost at least: most then need no second look."""
    modules, limit = recompute_modules(costs.job), memory_limit(costs.machine)
    kinds = [
        kind
        for kind in ("none", "selective", "full")
        if space.allows("recompute", kind) and (kind != "selective" or modules)
    ]
    candidates = [
        (cost_of(one, step_time(costs, one, costs.stages(one.layout))), number, one)
        for number, one in enumerate(_candidates(costs, space, piece, last_resort, limit=limit))
    ]
    chosen = _Chosen(keep)
    for least, _, candidate in sorted(candidates, key=lambda entry: entry[:2]):
        _try_recomputations(costs, candidate, kinds, chosen, least=least)
    return Found(plans=chosen.plans(), by_axis=chosen.by_axis, tried=len(candidates))


class _Chosen:
    """The best plans so far, and the best for every value of every axis."""

    def __init__(self, keep: int) -> None:
        self.by_axis: dict[tuple[str, object], Plan] = {}
        self._keep = keep
        self._best: list[tuple[float, int, Plan]] = []
        self._added = 0

    def add(self, plan: Plan) -> None:
        """Keep a plan where it is better than what is there."""
        self._added += 1
        for item in axis_values(plan.candidate).items():
            if item not in self.by_axis or _better(plan, self.by_axis[item]):
                self.by_axis[item] = plan
        if plan.fits:
            heapq.heappush(self._best, (-plan.cost, -self._added, plan))
            if len(self._best) > self._keep:
                heapq.heappop(self._best)

    def wants(self, candidate: Candidate, kinds: list[str], *, least: float) -> bool:
        """Say whether a candidate that costs `least` or more, recomputed in one of these ways, might be kept."""
        if len(self._best) < self._keep or least < -self._best[0][0]:
            return True
        values = axis_values(candidate) | {"recompute": kinds[0]}
        items = [*values.items(), *(("recompute", kind) for kind in kinds[1:])]
        known = [self.by_axis.get(item) for item in items]
        return any(plan is None or not plan.fits or plan.cost > least for plan in known)

    def plans(self) -> tuple[Plan, ...]:
        """Return the best, the best first."""
        return tuple(plan for _, _, plan in sorted(self._best, key=lambda entry: entry[:2], reverse=True))


def _better(one: Plan, other: Plan) -> bool:
    """A plan that fits is better than one that does not; of two that fit the cheaper, otherwise the smaller."""
    if one.fits != other.fits:
        return one.fits
    return one.cost < other.cost if one.fits else one.memory.total < other.memory.total


def _try_recomputations(
    costs: Costs, candidate: Candidate, kinds: list[str], chosen: _Chosen, *, least: float
) -> None:
    """Add the plan with the least recomputation that fits, and those with less that do not, while they might be kept."""
    limit, stages = memory_limit(costs.machine), costs.stages(candidate.layout)
    for number, kind in enumerate(kinds):
        if not chosen.wants(candidate, kinds[number:], least=least):
            return
        one = replace(candidate, recompute=kind)
        memory = costs.memory(one, stages)
        fits = memory.total <= limit
        if fits and kind == "full" and candidate.layout.vpp == 1:
            one = _fewest_layers(costs, one, stages, limit)
            memory = costs.memory(one, stages)
        chosen.add(Plan(candidate=one, memory=memory, fits=fits, costs=costs))
        if fits:
            return


def _fewest_layers(costs: Costs, candidate: Candidate, stages: tuple[Stage, ...], limit: float) -> Candidate:
    """Return full recomputation of as few layers of a stage as fit (Megatron's recompute_method "block")."""

    def total(layers: int) -> float:
        return costs.memory(replace(candidate, recompute_layers=layers), stages).total

    low, high = 0, max(stage.layers for stage in stages)  # low does not fit, high does
    most, least = total(low), total(high)
    while high - low > 1:  # interpolated: memory falls in a line while one stage is the fullest
        middle = low + math.ceil((most - limit) / (most - least) * (high - low))
        middle = min(max(middle, low + 1), high - 1)
        if (found := total(middle)) <= limit:
            high, least = middle, found
        else:
            low, most = middle, found
    return replace(candidate, recompute_layers=high)


def anything_divides(job: Job, machine: Machine, *, software: Software, space: Space) -> bool:
    """Say whether the devices, the model and the batch divide at all, whatever memory that takes."""
    costs = Costs(job, machine, software)
    return any(True for _ in _candidates(costs, space, SHORTEST_PIECE, last_resort=False, limit=math.inf))


def _candidates(
    costs: Costs, space: Space, piece: int, last_resort: bool, *, limit: float
) -> Iterator[Candidate]:
    """Yield every candidate without recomputation whose weights alone leave room in `limit` bytes."""
    job = costs.job
    offload, four_bits = last_resort and not job.frozen, last_resort and job.frozen
    for layout in layouts(job, costs.machine, space, piece):
        if _least_bytes(job, layout, costs.software, last_resort) > limit:
            continue
        per_rank = job.global_batch // layout.dp
        for split in pipeline_splits(job.meta.num_layers, layout):
            if not space.allows("vpp", split.vpp):
                continue
            for size in _micro_batches(per_rank, split, space):
                for precision in space.precisions:
                    for cp_comm in _context_kinds(job, layout, space):
                        yield Candidate(
                            layout=split,
                            micro_batch=size,
                            precision=precision,
                            cp_comm=cp_comm,
                            offload_optimizer=offload,
                            four_bits=four_bits,
                        )


def _micro_batches(per_rank: int, layout: Layout, space: Space) -> list[int]:
    """Return the sizes that divide a rank's rows; the interleaved schedule works in rounds of pp of them (megatron-core, schedules.py)."""
    fixed = space.fixed.get("micro_batch")
    return [
        size
        for size in (MICRO_BATCHES if fixed is None else (int(str(fixed)),))
        if per_rank % size == 0 and (layout.vpp == 1 or per_rank // size % layout.pp == 0)
    ]


def layouts(job: Job, machine: Machine, space: Space, piece: int = SHORT_PIECE) -> Iterator[Layout]:
    """Yield the axes that divide the devices, the model and the batch; pipelines not yet split."""
    world = machine.num_devices
    for tp in tensor_sizes(job, machine):
        for cp in _context_sizes(job, world // tp, space, piece):
            for pp in _divisors(world // (tp * cp)):
                dp = world // (tp * cp * pp)
                axes = {"tp": tp, "cp": cp, "pp": pp, "dp": dp}
                if pp > job.meta.num_layers or job.global_batch % dp:
                    continue
                if not all(space.allows(axis, size) for axis, size in axes.items()):
                    continue
                for ep, etp in _expert_sizes(job, world // pp, tp):
                    if space.allows("ep", ep) and space.allows("etp", etp):
                        yield Layout(
                            world=world, tp=tp, pp=pp, cp=cp, ep=ep, etp=etp, sequence_parallel=tp > 1
                        )


def tensor_sizes(job: Job, machine: Machine) -> list[int]:
    """Return the sizes of tp inside a node that divide heads and feed-forward parts without padding."""
    meta = job.meta
    widths = [meta.ffn_hidden_size] if any(kind.mlp for kind in job.parts.kinds) else []
    if meta.moe is not None and meta.moe.shared_ffn_hidden_size:
        widths.append(meta.moe.shared_ffn_hidden_size)
    return [
        tp
        for tp in _divisors(math.gcd(machine.num_devices, machine.per_node))
        if tp <= min(MOST_TENSOR, meta.num_heads)
        and meta.num_heads % tp == 0
        and all(padded_kv_heads(meta.num_heads, heads, tp=tp) == heads for heads in meta.kv_head_counts)
        and all(width % tp == 0 for width in widths)
    ]


def _context_sizes(job: Job, ranks: int, space: Space, piece: int) -> list[int]:
    """Powers of two: every rank has two pieces of a sequence, one from either end."""
    fixed = space.fixed.get("cp")
    longest = max(1, job.seq_len // piece) if space.context_parallel and fixed is None else job.seq_len
    powers = [cp for cp in _divisors(ranks) if cp & (cp - 1) == 0]
    fitting = [cp for cp in powers if cp == 1 or (cp <= longest and job.seq_len % (2 * cp) == 0)]
    return [cp for cp in fitting if cp == fixed or (fixed is None and (space.context_parallel or cp == 1))]


def _context_kinds(job: Job, layout: Layout, space: Space) -> list[str]:
    """A ring; or heads exchanged, where every rank keeps at least one of keys and values."""
    if layout.cp == 1:
        return ["p2p"]
    heads = job.meta.num_heads if job.meta.mla else job.meta.kv_head_counts[0]
    kinds = ["p2p", "a2a"] if heads % (layout.tp * layout.cp) == 0 else ["p2p"]
    return [kind for kind in kinds if space.allows("cp_comm", kind)]


def _expert_sizes(job: Job, stage_ranks: int, tp: int) -> list[tuple[int, int]]:
    """Return sizes of ep and etp; an expert is not split where linears have biases (megatron-core's own rule)."""
    meta, moe = job.meta, job.meta.moe
    if moe is None:
        return [(1, 1)]
    biased = meta.mlp_bias or meta.attention_out_bias or moe.expert_bias
    return [
        (ep, etp)
        for etp in ((1,) if biased else sorted({1, tp}))
        for ep in _divisors(moe.num_experts)
        if moe.ffn_hidden_size % etp == 0 and stage_ranks % (ep * etp) == 0
    ]


def _least_bytes(job: Job, layout: Layout, software: Software, last_resort: bool) -> float:
    """Return weights, gradients and optimizer state of an average stage: the fullest rank needs more."""
    parts = job.parts
    all_experts = sum(parts.kinds[kind].experts for kind in parts.layers)
    all_dense = sum(parts.kinds[kind].total for kind in parts.layers) - all_experts
    cut, expert_cut = layout.tp * layout.pp, layout.etp * layout.ep * layout.pp
    weights = all_dense / cut + all_experts / expert_cut
    if job.frozen:
        return (FOUR_BITS if last_resort or job.four_bits else 2.0) * weights
    dense, experts = (
        job.drawn_share * share
        for share in (sum(parts.trained.layers) / cut, sum(parts.trained.experts) / expert_cut)
    )
    total = 2.0 * weights + software.gradient_bytes * (dense + experts)
    own = dense / (layout.dp * layout.cp) + experts / max(1, layout.edp)
    if job.is_muon:
        total += WIDE * (dense + experts) + WIDE * own
    elif not last_resort:
        total += MASTER * own
    return total


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]
