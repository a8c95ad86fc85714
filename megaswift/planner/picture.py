"""A picture of a plan: memory of every stage by component, and the pipeline's timeline."""

from dataclasses import fields
from importlib import import_module
from pathlib import Path
from typing import Any

from megaswift.errors import ConfigError
from megaswift.planner.costs import Costs
from megaswift.planner.explain import MEMORY_WORDS
from megaswift.planner.job import Job
from megaswift.planner.machine import GIB, Machine
from megaswift.planner.memory import Memory, memory_of
from megaswift.planner.plan import Plan, memory_limit
from megaswift.planner.software import Software
from megaswift.planner.timeline import Slot, timeline

SUFFIXES = (".png", ".svg", ".pdf")
MOST_MICRO_BATCHES = 16  # drawn; more only repeat the steady state


def draw(plan: Plan, job: Job, machine: Machine, software: Software, path: Path) -> None:
    """Write the picture to `path`; raises ConfigError without matplotlib or for an unknown suffix."""
    if path.suffix not in SUFFIXES:
        raise ConfigError(f"plot={path} is not a picture. Choose a name that ends in {', '.join(SUFFIXES)}.")
    try:
        figures = import_module("matplotlib.figure")  # optional, and half a second
    except ImportError:
        raise ConfigError(
            f"plot={path} needs matplotlib. pip install matplotlib, or leave --plot out."
        ) from None
    costs = Costs(job, machine, software)
    stages = costs.stages(plan.candidate.layout)
    memories = [memory_of(job, plan.candidate, stage, software=software) for stage in stages]
    figure = figures.Figure(figsize=(11, 7), layout="constrained")
    upper, lower = figure.subplots(2, 1)
    _draw_memory(upper, memories, memory_limit(machine) / GIB)
    _draw_timeline(lower, timeline(costs, plan.candidate, stages, most=MOST_MICRO_BATCHES))
    try:
        figure.savefig(path, dpi=120)
    except OSError as error:
        raise ConfigError(f"plot={path} cannot be written: {error}.") from None


def _draw_memory(axes: Any, memories: list[Memory], limit_gib: float) -> None:  # Any: matplotlib is optional
    names = [item.name for item in fields(Memory) if item.name != "stage"]
    positions = list(range(len(memories)))
    below = [0.0] * len(memories)
    for name in names:
        sizes = [getattr(memory, name) / GIB for memory in memories]
        if any(sizes):
            axes.barh(positions, sizes, left=below, label=MEMORY_WORDS[name])
        below = [start + size for start, size in zip(below, sizes, strict=True)]
    axes.axvline(limit_gib, color="black", linestyle="--", linewidth=1)
    axes.set_yticks(positions, [f"stage {position}" for position in positions])
    axes.invert_yaxis()
    axes.set_xlabel("GiB on the fullest rank (dashed: what a plan may fill)")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.2), ncols=5, fontsize="small")


def _draw_timeline(axes: Any, slots: list[Slot]) -> None:  # Any: matplotlib is optional
    for slot in slots:
        color = "tab:blue" if slot.forward else "tab:green"
        axes.barh(
            slot.stage,
            slot.end_s - slot.start_s,
            left=slot.start_s,
            color=color,
            edgecolor="white",
            linewidth=0.4,
        )
    last = max(slot.stage for slot in slots)
    axes.set_yticks(range(last + 1), [f"stage {stage}" for stage in range(last + 1)])
    axes.invert_yaxis()
    axes.set_xlabel("seconds of the first micro batches (blue: forward, green: backward, white: waiting)")
