"""What the planner knows about hardware: one device, and how many of them are joined how."""

from dataclasses import dataclass

from megaswift.errors import LaunchError

GIB = 2**30
GIGA = 1e9


@dataclass(frozen=True, kw_only=True)
class Device:
    """One accelerator, or the share of a CPU that one rank gets; the catalogue is launch/catalogue.py."""

    name: str  # e.g. "H100-80G"
    generation: str  # "cpu", "volta", "turing", "ampere", "ada", "hopper" or "blackwell"
    memory_gib: float  # what a process can fill, the driver's own part taken off
    memory_bytes_s: float
    peak_flops: dict[str, float]  # dense FLOP/s by precision: fp32 fp16 bf16 fp8 mxfp8 nvfp4
    link_bytes_s: float  # to the other devices of the node, one direction of one device
    link: str  # "nvlink", "pcie" or "memory"
    network_bytes_s: float  # between nodes, one direction of one device, in the usual reference system
    per_node: int  # devices that the link joins in the usual machine
    source: str

    def peak(self, precision: str) -> float:
        """Return the dense peak in FLOP/s; raises LaunchError for a precision that the device does not compute in."""
        if precision not in self.peak_flops:
            raise LaunchError(
                f"precision={precision} is not one that {self.name} computes in. "
                f"Choose from {', '.join(self.peak_flops)}."
            )
        return self.peak_flops[precision]


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Equal devices in equal nodes."""

    device: Device
    num_devices: int
    per_node: int  # devices joined by the fast link
    host_gib: float | None = None  # memory of one node's host; None: not known
    kept_share: float = 0.0  # of a device's memory, what others than the trainer keep

    @property
    def num_nodes(self) -> int:
        """Nodes, the last of which may be partly used."""
        return -(-self.num_devices // self.per_node)
