"""The hardware profile: what a run has, from this node, from a name or from a Slurm partition; and what it switches."""

from dataclasses import dataclass, replace

from megaswift.errors import LaunchError
from megaswift.launch.catalogue import PCIE4, find_device
from megaswift.launch.host import Host, cpu_rank, read_host
from megaswift.launch.nvidia import Gpu, read_gpus
from megaswift.launch.slurm import Partition
from megaswift.planner.machine import GIGA, Device, Machine

SMALL_GIB = 48.0  # cards up to this size: consumer and workstation cards


@dataclass(frozen=True, kw_only=True)
class HardwareProfile:
    """The devices of a run and how they are joined."""

    machine: Machine
    origin: str  # "this node", "a name", "partition gpu"
    gpus: tuple[Gpu, ...] = ()  # of this node, where they were asked
    host: Host | None = None  # of this node

    @property
    def device(self) -> Device:
        """The device that every rank has."""
        return self.machine.device


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One thing that the profile switches."""

    setting: str
    value: str
    reason: str


def profile_here(
    *, nodes: int = 1, ranks: int | None = None, gpus: tuple[Gpu, ...] | None = None
) -> HardwareProfile:
    """Return the profile of this node, `nodes` times; on a node without GPUs `ranks` ranks share the processor.

    Raises LaunchError for a GPU that the catalogue does not have.
    """
    host = read_host()
    found = read_gpus() if gpus is None else gpus
    if not found:
        device = cpu_rank(host, ranks or 1)
        machine = Machine(device=device, num_devices=nodes * device.per_node, per_node=device.per_node)
        return HardwareProfile(
            machine=replace(machine, host_gib=host.memory_gib), origin="this node", host=host
        )
    device = find_device(found[0].name, memory_gib=found[0].memory_gib)
    device = replace(device, memory_gib=min(device.memory_gib, *(gpu.memory_gib for gpu in found)))
    if device.link == "nvlink" and len(found) > 1 and not all(gpu.nvlinks for gpu in found):
        device = replace(device, link="pcie", link_bytes_s=PCIE4 * GIGA)
    count = len(found) if ranks is None else min(ranks, len(found))
    machine = Machine(device=device, num_devices=nodes * count, per_node=count, host_gib=host.memory_gib)
    return HardwareProfile(machine=machine, origin="this node", gpus=found, host=host)


def profile_of_name(
    name: str, *, num_gpus: int | None = None, nodes: int | None = None, per_node: int | None = None
) -> HardwareProfile:
    """Return the profile of so many GPUs, or nodes of GPUs, of a kind; raises LaunchError.

    Without `per_node` a node has as many GPUs as the catalogue says, or all of them where they are fewer.
    """
    device = find_device(name)
    for label, value in (("num_gpus", num_gpus), ("nodes", nodes), ("gpus_per_node", per_node)):
        if value is not None and value < 1:
            raise LaunchError(f"{label}={value} is too small. Give 1 or more.")
    usual = per_node or device.per_node
    count = num_gpus if num_gpus is not None else (nodes or 1) * usual
    if nodes is not None and num_gpus is not None:
        if num_gpus % nodes:
            raise LaunchError(f"num_gpus={num_gpus} does not divide over nodes={nodes}. Give one of the two.")
        usual = num_gpus // nodes
    if count > usual and count % usual:
        raise LaunchError(
            f"num_gpus={count} is not a multiple of {usual} GPUs a node. Give --gpus_per_node, or whole nodes."
        )
    machine = Machine(device=device, num_devices=count, per_node=min(count, usual))
    return HardwareProfile(machine=machine, origin="a name")


def profile_of_partition(partition: Partition, *, nodes: int | None = None) -> HardwareProfile:
    """Return the profile of so many nodes (or all) of a Slurm partition; raises LaunchError without typed GPUs."""
    if not partition.gpus or partition.gpu_type is None:
        raise LaunchError(
            f"partition={partition.name} does not say which GPUs it has (GRES). Give --gpu, such as --gpu H100-80G."
        )
    count = partition.nodes if nodes is None else nodes
    named = profile_of_name(partition.gpu_type, nodes=count, per_node=partition.gpus)
    return replace(named, origin=f"partition {partition.name}")


def choices_of(profile: HardwareProfile) -> list[Choice]:
    """Return what the hardware switches and why; every one can be overridden by its flag."""
    device, machine = profile.device, profile.machine
    if device.generation == "cpu":
        return [
            Choice(
                setting="platform", value="cpu", reason="no GPU: ranks talk through gloo and shared memory"
            ),
            Choice(setting="torch_dtype", value="float32", reason="a CPU computes bf16 by converting it"),
        ]
    found = [_dtype(device), _attention(device), _tensor_parallel(machine), _sharing(device)]
    if "fp8" in device.peak_flops:
        gain = device.peak("fp8") / device.peak("bf16")
        found.append(
            Choice(
                setting="fp8_format",
                value="worth a trial",
                reason=f"{device.name} multiplies {gain:.0f} x faster in FP8; it pays where GEMMs are large (hidden >= 4096)",
            )
        )
    if device.memory_gib <= SMALL_GIB:
        found.append(
            Choice(
                setting="train_type",
                value="lora",
                reason=f"{device.memory_gib:.0f} GiB hold 16 bytes a parameter of {device.memory_gib / 16:.1f}e9 at most",
            )
        )
    return found


def warnings_of(profile: HardwareProfile) -> list[str]:
    """Return what is wrong with this node's GPUs: different kinds, memory errors, throttling, missing NVLinks."""
    found = []
    names = sorted({gpu.name for gpu in profile.gpus})
    if len(names) > 1:
        found.append(f"GPUs differ ({', '.join(names)}): every step waits for the slowest")
    for gpu in profile.gpus:
        if gpu.uncorrected_errors:
            found.append(
                f"GPU {gpu.index} has {gpu.uncorrected_errors} uncorrected memory errors: take the node out"
            )
        if gpu.throttled:
            found.append(f"GPU {gpu.index} is slowed down by heat or power")
    links = {gpu.nvlinks for gpu in profile.gpus}
    if len(links) > 1:
        found.append(
            f"NVLinks differ between GPUs ({', '.join(map(str, sorted(links)))} active): one may be broken"
        )
    return found


def _dtype(device: Device) -> Choice:
    if "bf16" in device.peak_flops:
        return Choice(setting="torch_dtype", value="bfloat16", reason="needs no loss scaling")
    return Choice(setting="torch_dtype", value="float16", reason=f"{device.generation} has no bfloat16")


def _attention(device: Device) -> Choice:
    """Kernels as Transformer Engine chooses them: transformer_engine/pytorch/attention, get_attention_backend."""
    kernels = {
        "hopper": ("FlashAttention-3 or cuDNN", "asynchronous copies and FP8 need Hopper"),
        "blackwell": ("cuDNN", "FlashAttention-3 is for Hopper only"),
        "ampere": ("FlashAttention-2", "the newest that Ampere runs"),
        "ada": ("FlashAttention-2", "the newest that Ada runs"),
    }
    value, reason = kernels.get(
        device.generation, ("unfused", f"{device.generation} is older than FlashAttention-2")
    )
    return Choice(setting="attention_backend", value=value, reason=reason)


def _tensor_parallel(machine: Machine) -> Choice:
    return Choice(
        setting="tensor_model_parallel_size",
        value=f"up to {machine.per_node}",
        reason=f"inside a node {machine.device.link_bytes_s / GIGA:.0f} GB/s, across nodes "
        f"{machine.device.network_bytes_s / GIGA:.0f} GB/s a GPU",
    )


def _sharing(device: Device) -> Choice:
    if device.link == "nvlink":
        return Choice(
            setting="cp_comm_type", value="p2p or a2a", reason="NVLink hides a ring behind attention"
        )
    return Choice(
        setting="cp_comm_type",
        value="avoid",
        reason="a ring across PCIe takes longer than the attention that hides it",
    )


def describe(profile: HardwareProfile) -> str:
    """Return the profile as lines for a person."""
    device, machine = profile.device, profile.machine
    lines = [
        f"devices: {machine.num_devices} x {device.name} ({device.generation}), {machine.per_node} a node, from {profile.origin}",
        f"memory: {device.memory_gib:.1f} GiB a device, {device.memory_bytes_s / 1e12:.3g} TB/s",
        "peaks: "
        + ", ".join(f"{name} {value / 1e12:.3g}" for name, value in device.peak_flops.items())
        + " TFLOP/s",
        f"links: {device.link} {device.link_bytes_s / GIGA:.0f} GB/s, network {device.network_bytes_s / GIGA:.1f} GB/s a device",
        f"source: {device.source}",
    ]
    if profile.host is not None:
        host = profile.host
        lines.append(
            f"host: {host.cpu}, {host.cores} cores, {host.memory_gib:.0f} GiB, {host.numa_nodes} NUMA nodes; adapters: "
            f"{', '.join(host.adapters) or 'none'}; shared file systems: {', '.join(host.shared_file_systems) or 'none'}"
        )
    lines += [f"{choice.setting}: {choice.value} ({choice.reason})" for choice in choices_of(profile)]
    lines += [f"warning: {warning}" for warning in warnings_of(profile)]
    return "\n".join(lines) + "\n"
