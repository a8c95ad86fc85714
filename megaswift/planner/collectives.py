"""How long collectives take: bytes over the slowest link that the group crosses, and a latency."""

from megaswift.planner.calibration import TimeConstants
from megaswift.planner.machine import Machine


def inside_node(machine: Machine, size: int, stride: int) -> bool:
    """Say whether a group of `size` ranks that lie `stride` apart stays within one node."""
    return size * stride <= machine.per_node


def group_rate(machine: Machine, size: int, stride: int, constants: TimeConstants) -> float:
    """Return the bytes per second that one rank of a group moves through a ring.

    Across nodes every member inside a node brings its own network port, so a ring has that many ports' bandwidth, and
    at most the link's.
    """
    device = machine.device
    link = device.link_bytes_s * constants.link
    if inside_node(machine, size, stride):
        return link
    ports = max(1, machine.per_node // stride)
    return min(link, ports * device.network_bytes_s * constants.network)


def latency(machine: Machine, size: int, stride: int, constants: TimeConstants) -> float:
    """Return the start-up time of one collective."""
    return constants.link_latency_s if inside_node(machine, size, stride) else constants.network_latency_s


def gather(machine: Machine, whole: float, *, size: int, stride: int, constants: TimeConstants) -> float:
    """Return the time of an all-gather that ends with `whole` bytes, or of the reduce-scatter that begins with them."""
    if size == 1:
        return 0.0
    moved = whole * (size - 1) / size
    return moved / group_rate(machine, size, stride, constants) + latency(machine, size, stride, constants)


def exchange(
    machine: Machine,
    sent: float,
    *,
    size: int,
    stride: int,
    link_copies: float = 1.0,
    network_copies: float = 1.0,
    constants: TimeConstants,
) -> float:
    """Return the time of an all-to-all in which every rank sends `sent` bytes, 1/size of them to each.

    What leaves the node goes through the rank's own port. `link_copies` and `network_copies` are the shares that travel
    when a row that several receivers share is sent once.
    """
    if size == 1:
        return 0.0
    inside = min(size, max(1, machine.per_node // stride))
    link = sent * link_copies * (inside - 1) / size / (machine.device.link_bytes_s * constants.link)
    network = (
        sent * network_copies * (size - inside) / size / (machine.device.network_bytes_s * constants.network)
    )
    return max(link, network) + latency(machine, size, stride, constants)
