"""What this machine's devices reach: matrix products, copies in memory, all-reduces between ranks."""

import multiprocessing
import os
from collections.abc import Callable
from datetime import timedelta
from time import perf_counter

import torch
import torch.distributed as dist

from megaswift.launch.local import free_port
from megaswift.launch.profile import profile_here

GEMM_SIZE = {"cuda": 8192, "cpu": 1024}  # large enough that launching does not count
COPY_BYTES = {"cuda": 2**30, "cpu": 2**27}  # more than the caches hold
REDUCE_BYTES = {"cuda": 2**28, "cpu": 2**24}  # gradients of a bucket
REPEATS = 5  # the best one counts: a measurement on a shared machine is never too fast
TIMEOUT_S = 300


def measure() -> str:
    """Return lines for a person: what was reached, and what share of the profile's figure that is."""
    on_gpus = torch.cuda.is_available()
    ranks = torch.cuda.device_count() if on_gpus else 2
    device = profile_here(ranks=None if on_gpus else 1, gpus=None if on_gpus else ()).device
    here = torch.device("cuda", 0) if on_gpus else torch.device("cpu")
    name, dtype = (
        ("bf16", torch.bfloat16) if "bf16" in device.peak_flops and on_gpus else ("fp32", torch.float32)
    )
    flops, copied = gemm_flops(here, dtype), copy_bytes_s(here)
    lines = [
        _line(f"GEMM {name}", flops / 1e12, device.peak(name) / 1e12, "TFLOP/s"),
        _line("memory copy", copied / 1e9, device.memory_bytes_s / 1e9, "GB/s read and written"),
    ]
    if ranks > 1:
        reduced = all_reduce_bytes_s(ranks, "nccl" if on_gpus else "gloo")
        lines.append(
            _line(f"all-reduce of {ranks} ranks", reduced / 1e9, device.link_bytes_s / 1e9, "GB/s on the bus")
        )
    return "".join(lines)


def gemm_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Return the FLOP/s of a square matrix product."""
    size = GEMM_SIZE[device.type]
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / best_s(lambda: torch.mm(left, right), device)


def copy_bytes_s(device: torch.device) -> float:
    """Return the bytes read and written in a second by a copy."""
    source = torch.zeros(COPY_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / best_s(lambda: target.copy_(source), device)


def all_reduce_bytes_s(ranks: int, backend: str) -> float:
    """Return the bus bandwidth of an all-reduce between processes that are started for it."""
    context = multiprocessing.get_context("spawn")
    results, port = context.SimpleQueue(), free_port()
    started = [
        context.Process(target=_reduce, args=(rank, ranks, backend, port, results)) for rank in range(ranks)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join(TIMEOUT_S)
        if process.exitcode is None:
            process.kill()
    seconds: float = results.get() if all(process.exitcode == 0 for process in started) else float("inf")
    return bus_bytes_s(REDUCE_BYTES["cuda" if backend == "nccl" else "cpu"], ranks, seconds)


def bus_bytes_s(size: int, ranks: int, seconds: float) -> float:
    """Return the bus bandwidth of an all-reduce of `size` bytes: 2 (n-1)/n of them over the time (nccl-tests, PERFORMANCE.md)."""
    return 2 * (ranks - 1) / ranks * size / seconds


def _reduce(
    rank: int, ranks: int, backend: str, port: int, results: "multiprocessing.SimpleQueue[float]"
) -> None:
    if backend == "gloo":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # the host's own name may not resolve
        torch.set_num_threads(1)
    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    if backend == "nccl":
        torch.cuda.set_device(device)
    dist.init_process_group(
        backend,
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=TIMEOUT_S),
    )
    data = torch.zeros(REDUCE_BYTES[device.type] // 4, device=device)
    seconds = best_s(lambda: dist.all_reduce(data), device)
    if rank == 0:
        results.put(seconds)
    dist.destroy_process_group()


def best_s(work: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of the fastest of several runs; the device's own work included."""
    times = []
    for _ in range(REPEATS + 1):  # the first one warms up
        began = perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(perf_counter() - began)
    return min(times[1:])


def _line(name: str, reached: float, expected: float, unit: str) -> str:
    return f"{name}: {reached:.3g} {unit}, {100 * reached / expected:.0f} % of {expected:.3g}\n"
