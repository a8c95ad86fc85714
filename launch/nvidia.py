"""The GPUs of this node as NVIDIA's management library sees them; nvidia-ml-py is optional."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from megaswift.planner.machine import GIB

MOST_LINKS = 18  # NVLinks of one GPU: Hopper and Blackwell have 18


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One GPU of this node; None where the library or the GPU does not tell."""

    index: int
    name: str
    memory_gib: float
    capability: tuple[int, int] | None
    nvlinks: int  # active ones
    pcie: tuple[int, int] | None  # generation and lanes in use
    clock_mhz: int | None  # of the streaming multiprocessors, highest
    power_limit_w: float | None
    uncorrected_errors: int | None  # ECC, since the driver was loaded
    throttled: bool | None  # by temperature or power supply, now


def read_gpus(library: ModuleType | None = None) -> tuple[Gpu, ...]:
    """Return this node's GPUs; empty without a driver, or without nvidia-ml-py. `library` stands in for pynvml."""
    nvml = library or _library()
    if nvml is None:
        return ()
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        return ()
    try:
        return tuple(_gpu(nvml, index) for index in range(nvml.nvmlDeviceGetCount()))
    finally:
        nvml.nvmlShutdown()


def _library() -> ModuleType | None:
    try:
        return importlib.import_module("pynvml")  # here: optional, and 20 ms
    except ImportError:
        return None


def _gpu(nvml: Any, index: int) -> Gpu:  # Any: the library has no types
    handle = nvml.nvmlDeviceGetHandleByIndex(index)
    name = nvml.nvmlDeviceGetName(handle)

    def ask(function: Callable[..., Any], *arguments: Any) -> Any:
        """Return what a query says, or None where this GPU or driver does not support it."""
        try:
            return function(handle, *arguments)
        except nvml.NVMLError:
            return None

    links = [ask(nvml.nvmlDeviceGetNvLinkState, link) for link in range(MOST_LINKS)]
    generation, width = (
        ask(nvml.nvmlDeviceGetCurrPcieLinkGeneration),
        ask(nvml.nvmlDeviceGetCurrPcieLinkWidth),
    )
    capability = ask(nvml.nvmlDeviceGetCudaComputeCapability)
    power = ask(nvml.nvmlDeviceGetEnforcedPowerLimit)
    reasons = ask(nvml.nvmlDeviceGetCurrentClocksThrottleReasons)
    bad = nvml.nvmlClocksThrottleReasonHwSlowdown | nvml.nvmlClocksThrottleReasonHwThermalSlowdown
    return Gpu(
        index=index,
        name=name.decode() if isinstance(name, bytes) else name,
        memory_gib=nvml.nvmlDeviceGetMemoryInfo(handle).total / GIB,
        capability=tuple(capability) if capability else None,
        nvlinks=sum(1 for state in links if state),
        pcie=(generation, width) if generation and width else None,
        clock_mhz=ask(nvml.nvmlDeviceGetMaxClockInfo, nvml.NVML_CLOCK_SM),
        power_limit_w=power / 1000 if power else None,
        uncorrected_errors=ask(
            nvml.nvmlDeviceGetTotalEccErrors, nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC
        ),
        throttled=None if reasons is None else bool(reasons & bad),
    )
