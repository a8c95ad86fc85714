"""The hardware profile: names, this node's processor and GPUs, and what they switch."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megaswift.errors import LaunchError
from megaswift.launch.catalogue import DEVICES, find_device
from megaswift.launch.host import cpu_rank, read_host
from megaswift.launch.nvidia import Gpu, read_gpus
from megaswift.launch.profile import (
    choices_of,
    describe,
    profile_here,
    profile_of_name,
    profile_of_partition,
    warnings_of,
)
from megaswift.launch.slurm import parse_partitions
from megaswift.planner.machine import GIB

NAMES = {
    "H100": "H100-80G",
    "h100-80g": "H100-80G",
    "NVIDIA H100 80GB HBM3": "H100-80G",
    "NVIDIA H100 PCIe": "H100-PCIe-80G",
    "NVIDIA H200": "H200-141G",
    "NVIDIA A100-SXM4-40GB": "A100-40G",
    "NVIDIA A100-SXM4-80GB": "A100-80G",
    "NVIDIA A100 80GB PCIe": "A100-PCIe-80G",
    "NVIDIA A10": "A10-24G",
    "NVIDIA B200": "B200",
    "NVIDIA GB200": "GB200",
    "NVIDIA GeForce RTX 4090": "RTX4090-24G",
    "RTX 3090": "RTX3090-24G",
    "NVIDIA RTX A6000": "A6000-48G",
    "NVIDIA L4": "L4-24G",
    "NVIDIA L40S": "L40S-48G",
    "Tesla V100-SXM2-32GB": "V100-32G",
    "Tesla T4": "T4-16G",
}


@pytest.mark.parametrize(("name", "expected"), NAMES.items())
def test_a_name_means_one_device(name: str, expected: str) -> None:
    assert find_device(name).name == expected


@pytest.mark.parametrize("name", DEVICES)
def test_every_entry_is_found_by_its_own_name_and_makes_sense(name: str) -> None:
    device = find_device(name)
    assert device.name == name
    assert device.source
    assert 10 < device.memory_gib < 300
    assert 1e11 < device.memory_bytes_s < 1e13
    assert device.network_bytes_s < device.link_bytes_s
    peaks = device.peak_flops
    assert peaks["fp32"] < peaks["fp16"]
    assert ("bf16" in peaks) == (device.generation not in ("volta", "turing"))
    assert ("fp8" in peaks) == (device.generation in ("ada", "hopper", "blackwell"))
    assert (device.link == "nvlink") == (device.link_bytes_s > 100e9)


def test_an_unknown_name_lists_what_is_known() -> None:
    with pytest.raises(LaunchError, match=r"gpu=X1000 is not in the catalogue\..*H100-80G"):
        find_device("X1000")


def test_a_precision_that_a_device_lacks_is_refused_with_those_it_has() -> None:
    with pytest.raises(LaunchError, match=r"precision=fp8 is not one that A100-80G computes in.*bf16"):
        find_device("A100").peak("fp8")


def test_devices_are_counted_by_gpus_or_by_nodes() -> None:
    assert profile_of_name("H100", num_gpus=64).machine.num_nodes == 8
    assert profile_of_name("H100", nodes=8).machine.num_devices == 64
    assert profile_of_name("H100", num_gpus=4).machine.per_node == 4
    assert profile_of_name("H100", num_gpus=16, nodes=4).machine.per_node == 4
    assert profile_of_name("GB200", nodes=1).machine.num_devices == 72
    assert profile_of_name("H100", num_gpus=12, per_node=4).machine.num_nodes == 3


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"num_gpus": 0}, "num_gpus=0 is too small"),
        ({"nodes": -1}, "nodes=-1 is too small"),
        ({"num_gpus": 12}, "num_gpus=12 is not a multiple of 8"),
        ({"num_gpus": 10, "nodes": 4}, "num_gpus=10 does not divide over nodes=4"),
    ],
)
def test_impossible_numbers_are_refused(asked: dict[str, int], message: str) -> None:
    with pytest.raises(LaunchError, match=message):
        profile_of_name("H100", **asked)


def test_a_partition_names_its_gpus() -> None:
    partition, other = parse_partitions(
        "gpu*|up|16|96|gpu:h100:8(S:0-1)|2-00:00:00\nold|up|4|32|gpu:4|infinite\n"
    )
    profile = profile_of_partition(partition, nodes=2)
    assert (profile.device.name, profile.machine.num_devices, profile.machine.per_node) == ("H100-80G", 16, 8)
    assert profile_of_partition(partition).machine.num_devices == 128
    with pytest.raises(LaunchError, match=r"partition=old does not say which GPUs.*--gpu"):
        profile_of_partition(other)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A machine with two packages of two cores, InfiniBand and a shared file system."""
    blocks = [
        f"processor\t: {n}\nmodel name\t: Xeon\ncpu MHz\t\t: 2000.000\nphysical id\t: {n // 4}\n"
        f"core id\t\t: {n % 2}\nflags\t\t: fpu avx2 avx512f\n"
        for n in range(8)
    ]
    files = {
        "proc/cpuinfo": "\n".join(blocks),
        "proc/meminfo": f"MemTotal:       {64 * GIB // 1024} kB\nMemFree: 1 kB\n",
        "proc/mounts": "/dev/sda1 / ext4 rw 0 0\nstore:/home /home nfs4 rw 0 0\nmds:/scratch /scratch lustre rw 0 0\n",
        "sys/devices/system/node/node0/cpulist": "0-3",
        "sys/devices/system/node/node1/cpulist": "4-7",
        "sys/class/infiniband/mlx5_0/ports/1/rate": "400 Gb/sec (4X NDR)\n",
        "sys/class/infiniband/mlx5_0/ports/1/state": "4: ACTIVE\n",
        "sys/class/infiniband/mlx5_1/ports/1/rate": "400 Gb/sec (4X NDR)\n",
        "sys/class/infiniband/mlx5_1/ports/1/state": "1: DOWN\n",
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return tmp_path


def test_the_processor_is_read_from_proc_and_sys(root: Path) -> None:
    host = read_host(root)
    assert (host.cpu, host.cores, host.flops_per_cycle, host.ghz) == ("Xeon", 4, 64, 2.0)
    assert host.memory_gib == pytest.approx(64)
    assert host.numa_nodes == 2
    assert host.adapters == ("mlx5_0 400 Gb/sec (4X NDR)",)
    assert host.shared_file_systems == ("/home", "/scratch")
    rank = cpu_rank(host, 2)
    assert rank.peak("fp32") == 2 * 2e9 * 64
    assert rank.memory_gib == pytest.approx(32)


def test_a_machine_that_tells_nothing_still_has_a_profile(tmp_path: Path) -> None:
    host = read_host(tmp_path)
    assert (host.cores, host.memory_gib, host.adapters) == (1, 0, ())


def test_a_node_without_gpus_shares_its_processor() -> None:
    profile = profile_here(ranks=2, gpus=())
    assert profile.device.generation == "cpu"
    assert profile.machine.num_devices == 2
    assert {choice.setting: choice.value for choice in choices_of(profile)}["platform"] == "cpu"
    assert "gloo" in describe(profile)


class FakeNvml(SimpleNamespace):
    """pynvml with so many GPUs; queries in `missing` are not supported."""

    NVML_CLOCK_SM = 1
    NVML_MEMORY_ERROR_TYPE_UNCORRECTED = 1
    NVML_VOLATILE_ECC = 0
    nvmlClocksThrottleReasonHwSlowdown = 8
    nvmlClocksThrottleReasonHwThermalSlowdown = 64

    class NVMLError(Exception):
        """What the library raises."""

    def __init__(self, count: int, *, missing: tuple[str, ...] = (), works: bool = True) -> None:
        super().__init__(count=count, missing=missing, works=works, shut_down=False)

    def nvmlInit(self) -> None:
        if not self.works:
            raise self.NVMLError

    def nvmlShutdown(self) -> None:
        self.shut_down = True

    def nvmlDeviceGetCount(self) -> int:
        return int(self.count)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        answers: dict[str, Any] = {
            "nvmlDeviceGetHandleByIndex": lambda index: index,
            "nvmlDeviceGetName": lambda handle: b"NVIDIA H100 80GB HBM3",
            "nvmlDeviceGetMemoryInfo": lambda handle: SimpleNamespace(total=int(79.6 * GIB)),
            "nvmlDeviceGetCudaComputeCapability": lambda handle: (9, 0),
            "nvmlDeviceGetNvLinkState": lambda handle, link: 1,
            "nvmlDeviceGetCurrPcieLinkGeneration": lambda handle: 5,
            "nvmlDeviceGetCurrPcieLinkWidth": lambda handle: 16,
            "nvmlDeviceGetMaxClockInfo": lambda handle, clock: 1980,
            "nvmlDeviceGetEnforcedPowerLimit": lambda handle: 700000,
            "nvmlDeviceGetTotalEccErrors": lambda handle, kind, counter: 3 if handle == 1 else 0,
            "nvmlDeviceGetCurrentClocksThrottleReasons": lambda handle: 64 if handle == 2 else 0,
        }
        if name not in answers:
            raise AttributeError(name)

        def answer(*arguments: Any) -> Any:
            if name in self.missing:
                raise self.NVMLError
            return answers[name](*arguments)

        return answer


def test_gpus_are_read_from_the_management_library() -> None:
    library = FakeNvml(4)
    gpus = read_gpus(library)  # type: ignore[arg-type] # stands in for the module
    assert library.shut_down
    assert len(gpus) == 4
    assert gpus[0].capability == (9, 0) and gpus[0].nvlinks == 18 and gpus[0].pcie == (5, 16)
    profile = profile_here(nodes=2, gpus=gpus)
    assert (profile.device.name, profile.machine.num_devices, profile.machine.per_node) == ("H100-80G", 8, 4)
    warnings = " ".join(warnings_of(profile))
    assert "GPU 1 has 3 uncorrected" in warnings and "GPU 2 is slowed down" in warnings


def test_what_a_gpu_does_not_tell_is_none() -> None:
    library = FakeNvml(
        1,
        missing=(
            "nvmlDeviceGetTotalEccErrors",
            "nvmlDeviceGetEnforcedPowerLimit",
            "nvmlDeviceGetNvLinkState",
        ),
    )
    (gpu,) = read_gpus(library)  # type: ignore[arg-type] # stands in for the module
    assert gpu.uncorrected_errors is None and gpu.power_limit_w is None and gpu.nvlinks == 0


def test_no_driver_is_no_gpu() -> None:
    assert read_gpus(FakeNvml(4, works=False)) == ()  # type: ignore[arg-type] # stands in for the module


def test_a_gpu_without_its_nvlinks_is_planned_for_pcie() -> None:
    gpus = tuple(
        Gpu(
            index=index,
            name="NVIDIA A100-SXM4-80GB",
            memory_gib=80.0,
            capability=(8, 0),
            nvlinks=12 if index else 0,
            pcie=(4, 16),
            clock_mhz=1410,
            power_limit_w=400.0,
            uncorrected_errors=0,
            throttled=False,
        )
        for index in range(2)
    )
    profile = profile_here(gpus=gpus)
    assert profile.device.link == "pcie"
    assert any("NVLinks differ" in warning for warning in warnings_of(profile))


@pytest.mark.parametrize(
    ("gpu", "setting", "value"),
    [
        ("H100", "attention_backend", "FlashAttention-3 or cuDNN"),
        ("A100", "attention_backend", "FlashAttention-2"),
        ("T4", "attention_backend", "unfused"),
        ("T4", "torch_dtype", "float16"),
        ("A100", "torch_dtype", "bfloat16"),
        ("H100", "fp8_format", "worth a trial"),
        ("RTX4090", "train_type", "lora"),
        ("RTX4090", "cp_comm_type", "avoid"),
        ("H100", "cp_comm_type", "p2p or a2a"),
    ],
)
def test_hardware_switches_settings_with_a_reason(gpu: str, setting: str, value: str) -> None:
    found = {choice.setting: choice for choice in choices_of(profile_of_name(gpu))}
    assert found[setting].value == value
    assert len(found[setting].reason) > 10


def test_an_a100_is_not_told_of_fp8() -> None:
    assert "fp8_format" not in {choice.setting for choice in choices_of(profile_of_name("A100"))}
