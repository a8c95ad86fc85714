"""What the operating system says about this machine: processor, memory, network adapters, file systems. Linux only."""

import re
from dataclasses import dataclass
from pathlib import Path

from megaswift.planner.machine import GIB, Device

# fp32 operations a cycle of one core: vector lanes x fused multiply-add x units. Intel Optimization Reference Manual,
# chapter 2 (two 512-bit or 256-bit units); scalar multiply-add where no vectors are listed.
FLOPS_PER_CYCLE = (("avx512f", 64), ("avx2", 32), ("asimd", 16))
SCALAR_FLOPS_PER_CYCLE = 4
MEMORY_CHANNEL_BYTES_S = (
    20e9  # of one core's share at most: DDR4-2666 by its specification moves 21 GB/s a channel
)
USUAL_GHZ = 2.5  # where /proc/cpuinfo names no clock
SHARED = (
    "nfs",
    "nfs4",
    "lustre",
    "gpfs",
    "beegfs",
    "ceph",
    "fuse.ceph",
    "panfs",
    "wekafs",
    "fuse.sshfs",
    "9p",
)


@dataclass(frozen=True, kw_only=True)
class Host:
    """The processor side of one node."""

    cpu: str
    cores: int  # physical, as far as they are listed
    flops_per_cycle: int  # of one core, fp32
    ghz: float
    memory_gib: float
    numa_nodes: int
    adapters: tuple[str, ...]  # InfiniBand and RoCE ports: "mlx5_0 400 Gb/sec (4X NDR)"
    shared_file_systems: tuple[str, ...]  # mount points


def read_host(root: Path = Path("/")) -> Host:
    """Return what /proc and /sys below `root` say; what is missing there is 0 or empty."""
    cpuinfo = _text(root / "proc/cpuinfo")
    flags = set(_first(cpuinfo, r"^(?:flags|Features)\s*:\s*(.*)$", "").split())
    nodes = list((root / "sys/devices/system/node").glob("node[0-9]*"))
    return Host(
        cpu=_first(cpuinfo, r"^model name\s*:\s*(.*)$", "unknown processor"),
        cores=_cores(cpuinfo),
        flops_per_cycle=next((n for flag, n in FLOPS_PER_CYCLE if flag in flags), SCALAR_FLOPS_PER_CYCLE),
        ghz=float(_first(cpuinfo, r"^cpu MHz\s*:\s*([\d.]+)$", str(1000 * USUAL_GHZ))) / 1000,
        memory_gib=int(_first(_text(root / "proc/meminfo"), r"^MemTotal:\s*(\d+) kB$", "0")) * 1024 / GIB,
        numa_nodes=max(1, len(nodes)),
        adapters=_adapters(root / "sys/class/infiniband"),
        shared_file_systems=_shared(_text(root / "proc/mounts")),
    )


def cpu_rank(host: Host, ranks: int) -> Device:
    """Return the share of a host that one of `ranks` ranks has, as a device."""
    cores = host.cores / ranks
    peak = cores * host.ghz * 1e9 * host.flops_per_cycle
    return Device(
        name="CPU",
        generation="cpu",
        memory_gib=host.memory_gib / ranks,
        memory_bytes_s=max(1.0, cores) * MEMORY_CHANNEL_BYTES_S / 2,
        peak_flops={"fp32": peak, "bf16": peak / 2},  # bf16 is converted to fp32 and back
        link_bytes_s=MEMORY_CHANNEL_BYTES_S / 4,  # gloo copies through shared memory
        link="memory",
        network_bytes_s=10e9 / 8,  # 10 Gbit/s Ethernet
        per_node=ranks,
        source=f"/proc: {host.cpu}, {host.cores} cores",
    )


def _cores(cpuinfo: str) -> int:
    """Return the physical cores: distinct (package, core) pairs, or processors where those are not listed."""
    pairs = set()
    for block in cpuinfo.split("\n\n"):
        package, core = (_first(block, rf"^{name}\s*:\s*(\d+)$", "") for name in ("physical id", "core id"))
        if package and core:
            pairs.add((package, core))
    return len(pairs) or len(re.findall(r"^processor\s*:", cpuinfo, re.MULTILINE)) or 1


def _adapters(folder: Path) -> tuple[str, ...]:
    found = []
    for rate in sorted(folder.glob("*/ports/*/rate")):
        state = _text(rate.parent / "state")
        if "ACTIVE" in state:
            found.append(f"{rate.parts[-4]} {_text(rate).strip()}")
    return tuple(found)


def _shared(mounts: str) -> tuple[str, ...]:
    """Return the mount points of file systems that other nodes see too."""
    fields = [line.split() for line in mounts.splitlines()]
    return tuple(entry[1] for entry in fields if len(entry) > 2 and entry[2] in SHARED)


def _first(text: str, pattern: str, default: str) -> str:
    found = re.search(pattern, text, re.MULTILINE)
    return found.group(1).strip() if found else default


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
