"""The first thing that ranks do together: look at their devices, and see that a collective gives the right sum."""

import os
import socket
from time import perf_counter

import torch
import torch.distributed as dist

from megaswift.launch.allocation import RankReport, check_reports
from megaswift.launch.environment import visible_gpus
from megaswift.launch.nvidia import read_gpus
from megaswift.logs import get_logger
from megaswift.parallel.agreement import alike
from megaswift.platforms.platform import Platform

logger = get_logger(__name__)

PRODUCT_SIZE = 4096  # of a square bf16 product on a GPU: 0.14 TFLOP, a fraction of a millisecond


def check_allocation(platform: Platform, *, local_rank: int) -> None:
    """Log slow nodes; raises LaunchError where a node is unfit for work. Every rank of the world calls it."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    faults = _faults_of_gpu(local_rank) if platform.name == "cuda" else []
    product_s, sound = _product(platform.device) if platform.name == "cuda" else (None, True)
    if not sound:
        faults.append("a matrix product comes out wrong")
    total = torch.full((1024,), float(rank + 1), dtype=torch.float64, device=platform.device)
    dist.all_reduce(total)
    if not torch.all(total == world_size * (world_size + 1) / 2):
        faults.append("an all-reduce comes out wrong")
    mine = RankReport(rank=rank, host=socket.gethostname(), faults=tuple(faults), product_s=product_s)
    reports: list[RankReport] = [mine] * world_size
    dist.all_gather_object(reports, mine)
    for warning in alike(lambda: check_reports(reports)):
        logger.warning("%s", warning)


def _faults_of_gpu(local_rank: int) -> list[str]:
    """Return what the driver says against this rank's GPU."""
    visible = visible_gpus(os.environ)
    name = visible[local_rank] if visible is not None and local_rank < len(visible) else str(local_rank)
    return [
        f"GPU {gpu.index} has {gpu.uncorrected_errors} uncorrected memory errors"
        for gpu in read_gpus()
        if str(gpu.index) == name and gpu.uncorrected_errors
    ]


def _product(device: torch.device) -> tuple[float, bool]:
    """Return the seconds of a matrix product, the best of three, and whether its sums are right."""
    left = torch.ones(PRODUCT_SIZE, PRODUCT_SIZE, device=device, dtype=torch.bfloat16)
    right = torch.eye(PRODUCT_SIZE, device=device, dtype=torch.bfloat16)
    times = []
    for _ in range(3):
        torch.cuda.synchronize(device)
        began = perf_counter()
        result = left @ right
        torch.cuda.synchronize(device)
        times.append(perf_counter() - began)
    return min(times), bool(torch.all(result == 1))
