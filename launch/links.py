"""Which nodes have slow links: judged from all-reduces inside each node and between neighbouring nodes. Pure functions."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from megaswift.launch.catalogue import find_device
from megaswift.planner.calibration import TIME
from megaswift.planner.collectives import group_rate
from megaswift.planner.machine import GIGA, Device, Machine

# Times the rate that the planner reckons with, which is what collectives of healthy machines reach on average
# (planner/calibration.py); the same factor as for a slow product (allocation.py).
SLOW = 1.5
SHOWN = 8  # hosts of a list


@dataclass(frozen=True, kw_only=True)
class LinkTime:
    """One measured all-reduce: bytes a second on the bus, as nccl-tests defines it (PERFORMANCE.md)."""

    hosts: tuple[str, ...]  # one: inside a node; two: between nodes
    bytes_s: float


def rounds(hosts: Iterable[str]) -> list[list[tuple[str, ...]]]:
    """Return which nodes measure together: in each round every node is in one group at most.

    First every node alone, then the neighbours of a ring of nodes, so that each node is measured with two others.
    """
    nodes = list(dict.fromkeys(hosts))
    alone: list[tuple[str, ...]] = [(node,) for node in nodes]
    if len(nodes) == 1:
        return [alone]
    if len(nodes) == 2:
        return [alone, [(nodes[0], nodes[1])]]
    ring = [(one, nodes[(place + 1) % len(nodes)]) for place, one in enumerate(nodes)]
    even = len(ring) - len(ring) % 2
    found: list[list[tuple[str, ...]]] = [alone, list(ring[0:even:2]), list(ring[1:even:2])]
    return found + [[pair] for pair in ring[even:]]


def expected_bytes_s(device: Device, *, per_node: int, nodes: int) -> float:
    """Return the rate of an all-reduce over so many whole nodes that the planner reckons with."""
    machine = Machine(device=device, num_devices=per_node * nodes, per_node=per_node)
    return group_rate(machine, per_node * nodes, 1, TIME)


def check_links(times: Sequence[LinkTime], *, gpu: str, per_node: int) -> list[str]:
    """Return warnings about links that are slower than the catalogue promises; raises LaunchError for an unknown `gpu`.

    A node is named where its own links are slow, or where it is slow with every neighbour.
    """
    device = find_device(gpu)
    inside = {one.hosts[0]: one.bytes_s for one in times if len(one.hosts) == 1}
    pairs = [one for one in times if len(one.hosts) == 2]
    best: dict[str, float] = {}  # a healthy node is fast with its healthy neighbour
    for pair in pairs:
        for host in pair.hosts:
            best[host] = max(best.get(host, 0.0), pair.bytes_s)
    link, network = device.link_bytes_s, device.network_bytes_s
    found = _warning(
        inside,
        expected_bytes_s(device, per_node=per_node, nodes=1),
        f"inside the node, where {device.link} has {link / GIGA:.0f} GB/s",
        can_name=True,
    )
    return found + _warning(
        best,
        expected_bytes_s(device, per_node=per_node, nodes=2),
        f"to other nodes, with {per_node} x {network / GIGA:.0f} GB/s by the catalogue",
        can_name=len(pairs) > 1,
    )


def _warning(reached: Mapping[str, float], expected: float, where: str, *, can_name: bool) -> list[str]:
    """Return at most one warning about the hosts that reach too little of `expected`."""
    slow = sorted(host for host, bytes_s in reached.items() if bytes_s * SLOW < expected)
    if not slow:
        return []
    lowest = min(reached[host] for host in slow)
    shown = ", ".join(slow[:SHOWN]) + (f" and {len(slow) - SHOWN} more" if len(slow) > SHOWN else "")
    if len(slow) == len(reached) or not can_name:
        advice = (
            "All of them are alike: check the drivers and NCCL's settings, or plan with a slower network."
        )
    else:
        advice = f"Consider --exclude {','.join(slow)}."
    return [
        f"{shown}: an all-reduce reaches {lowest / GIGA:.3g} GB/s {where}; {expected / GIGA:.0f} GB/s were to be expected. "
        + advice
    ]
