"""What would work where nothing fits: more devices, shorter sequences, or adapters alone."""

import math
from dataclasses import replace

from megaswift.errors import LaunchError
from megaswift.planner.explain import does_not_fit
from megaswift.planner.job import Job
from megaswift.planner.machine import Machine
from megaswift.planner.search import Found, Space, anything_divides, anything_fits, tensor_sizes
from megaswift.planner.software import Software

MOST_DEVICES = 4096
SHORTEST = 512  # tokens; shorter sequences are not proposed


def nothing_fits(
    job: Job, machine: Machine, found: Found, *, software: Software, space: Space
) -> LaunchError:
    """Return the error that says what is missing and what would work."""
    name = job.meta.folder.name if job.meta.folder else job.meta.model_type
    where = f"{machine.num_devices} x {machine.device.name}"
    if not anything_divides(job, machine, software=software, space=space):
        return LaunchError(_no_layout(job, machine, space, name=name, where=where))
    if found.by_axis:
        nearest = min(found.by_axis.values(), key=lambda plan: plan.memory.total)
        problem = does_not_fit(nearest.memory, machine)
    else:
        problem = "does not fit: weights, gradients and optimizer state alone are too large"
    ways = _ways(job, machine, software=software, space=space)
    advice = (
        f"What would work: {', or '.join(ways)}." if ways else "Choose a smaller model or larger devices."
    )
    return LaunchError(f"model={name} with max_length={job.max_length} on {where} {problem}. {advice}")


def _no_layout(job: Job, machine: Machine, space: Space, *, name: str, where: str) -> str:
    """Say which of the sizes that were given leave nothing to choose from."""
    axes = ", ".join(f"{axis}={value}" for axis, value in space.fixed.items()) or "the number of devices"
    tp = space.fixed.get("tp")
    sizes = tensor_sizes(job, machine)
    if tp is not None and tp not in sizes:
        return f"tp={tp} does not divide {name} on {where}. Choose tp from {', '.join(map(str, sizes))}."
    return (
        f"{axes} leaves no layout of {name} on {where} with global_batch_size={job.global_batch}: tp x pp x cp must divide "
        "the devices, what remains x micro_batch the batch, and ep the experts. Leave axes out and they are chosen for you."
    )


def _ways(job: Job, machine: Machine, *, software: Software, space: Space) -> list[str]:
    """Return short descriptions of changes with which something fits; each is tried."""

    def works(changed: Job, on: Machine = machine) -> bool:
        return anything_fits(changed, on, software=software, space=space)

    ways = []
    count = machine.num_devices * 2
    while count <= MOST_DEVICES:
        once = count * int(str(space.fixed.get("micro_batch", 1)))
        wide = replace(job, global_batch=once * math.ceil(job.global_batch / once))
        bigger = replace(
            machine, num_devices=count, per_node=max(machine.per_node, min(count, machine.device.per_node))
        )
        if works(wide, bigger):
            ways.append(f"{count} devices")
            break
        count *= 2
    length = job.max_length // 2
    while length >= SHORTEST:
        if works(replace(job, seq_len=length * job.answers)):
            ways.append(f"--max_length {length}")
            break
        length //= 2
    if not job.frozen and works(replace(job, trained="lora")):
        ways.append("--train_type lora")
    return ways
