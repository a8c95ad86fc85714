"""Why the others lost: for every value that an axis could have had, what its best plan costs or lacks."""

from dataclasses import dataclass, fields

from megaswift.planner.machine import GIB, Machine
from megaswift.planner.memory import Memory
from megaswift.planner.plan import Plan, memory_limit
from megaswift.planner.search import Found, axis_values
from megaswift.planner.steptime import StepTime

MEMORY_WORDS = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimizer state",
    "activations": "activations",
    "expert_tokens": "routed tokens",
    "logits": "logits",
    "buffers": "buffers",
    "slack": "allocator slack",
    "context": "CUDA and NCCL",
}
TIME_WORDS = {
    "compute": "compute",
    "tensor": "exposed tensor-parallel communication",
    "context": "exposed context-parallel communication",
    "experts": "exposed expert all-to-all",
    "pipeline": "transfers between stages",
    "bubble": "pipeline bubble",
    "data": "exposed gradient reduction",
    "optimizer": "optimizer",
    "overhead": "overhead",
}


@dataclass(frozen=True, kw_only=True)
class Reason:
    """Why the best plan with `axis` at `value` is not the one chosen."""

    axis: str
    value: object
    text: str


def reasons(found: Found, machine: Machine) -> list[Reason]:
    """Return a reason for every other value of every axis, in the order of the axes."""
    best = found.plans[0]
    chosen = axis_values(best.candidate)
    return [
        Reason(axis=axis, value=value, text=_reason(plan, best, machine))
        for (axis, value), plan in sorted(found.by_axis.items(), key=lambda item: _order(item[0], chosen))
        if value != chosen[axis]
    ]


def _order(key: tuple[str, object], chosen: dict[str, object]) -> tuple[int, float, str]:
    axis, value = key
    return list(chosen).index(axis), float(value) if isinstance(value, int) else 0.0, str(value)


def _reason(plan: Plan, best: Plan, machine: Machine) -> str:
    if not plan.fits:
        return does_not_fit(plan.memory, machine)
    slower = plan.time.total / best.time.total - 1
    if slower < 0.0005:
        return "as fast, with more axes in use"
    name, seconds = _largest_increase(plan.time, best.time)
    return f"{100 * slower:.1f} % slower: {seconds:+.3g} s of {TIME_WORDS[name]}"


def _largest_increase(time: StepTime, best: StepTime) -> tuple[str, float]:
    increases = {item.name: getattr(time, item.name) - getattr(best, item.name) for item in fields(StepTime)}
    name = max(increases, key=lambda one: increases[one])
    return name, increases[name]


def does_not_fit(memory: Memory, machine: Machine) -> str:
    """Return how much is needed, how much there is, and what takes most."""
    parts = {item.name: getattr(memory, item.name) for item in fields(Memory) if item.name != "stage"}
    most = max(parts, key=lambda one: parts[one])
    return (
        f"does not fit: {memory.total / GIB:.1f} of {memory_limit(machine) / GIB:.1f} GiB, "
        f"{parts[most] / GIB:.1f} of them {MEMORY_WORDS[most]}"
    )
