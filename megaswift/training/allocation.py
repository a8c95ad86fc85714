"""The first thing that ranks do together: look at their devices and links, and see that collectives give the right sums."""

import os
import socket
from collections.abc import Sequence
from time import perf_counter

import torch
import torch.distributed as dist

from megaswift.errors import LaunchError
from megaswift.launch.allocation import RankReport, check_reports
from megaswift.launch.environment import visible_gpus
from megaswift.launch.links import LinkTime, check_links, rounds
from megaswift.launch.nvidia import read_gpus
from megaswift.logs import get_logger
from megaswift.parallel.agreement import alike
from megaswift.platforms.platform import Platform
from megaswift.training.measure import REDUCE_BYTES, best_s, bus_bytes_s

logger = get_logger(__name__)

PRODUCT_SIZE = 4096  # of a square bf16 product on a GPU: 0.14 TFLOP, a fraction of a millisecond


def check_allocation(platform: Platform, *, local_rank: int) -> None:
    """Log slow nodes; raises LaunchError where a node is unfit for work. Every rank of the world calls it."""
    rank, world_size, on_gpus = dist.get_rank(), dist.get_world_size(), platform.name == "cuda"
    faults = _faults_of_gpu(local_rank) if on_gpus else []
    product_s, sound = timed_product(platform.device) if on_gpus else (None, True)
    if not sound:
        faults.append("a matrix product comes out wrong")
    total = torch.full((1024,), float(rank + 1), dtype=torch.float64, device=platform.device)
    dist.all_reduce(total)
    if not torch.all(total == world_size * (world_size + 1) / 2):
        faults.append("an all-reduce comes out wrong")
    host = socket.gethostname()
    hosts = [host] * world_size
    dist.all_gather_object(hosts, host)
    links = measure_links(hosts, platform.device) if on_gpus else ()
    mine = RankReport(rank=rank, host=host, faults=tuple(faults), product_s=product_s, links=links)
    reports: list[RankReport] = [mine] * world_size
    dist.all_gather_object(reports, mine)
    for warning in alike(lambda: check_reports(reports)):
        logger.warning("%s", warning)
    if on_gpus and rank == 0:
        times = list(dict.fromkeys(one for report in reports for one in report.links))
        for warning in _slow_links(times, platform.device, per_node=hosts.count(host)):
            logger.warning("%s", warning)


def measure_links(hosts: Sequence[str], device: torch.device) -> tuple[LinkTime, ...]:
    """Return the all-reduces inside this rank's node and with its neighbours; every rank of the world calls it.

    `hosts` are those of all ranks. Groups of one round measure at the same time, as they do in training; each is told by its
    first rank, the others return nothing for it.
    """
    rank, found = dist.get_rank(), []
    data = torch.zeros(REDUCE_BYTES[device.type] // 4, device=device)
    for groups in rounds(hosts):
        dist.barrier()
        mine = next((group for group in groups if hosts[rank] in group), ())
        members = [one for one, host in enumerate(hosts) if host in mine]
        if len(members) < 2:
            continue
        # Its members alone make a group: otherwise all ranks would meet for each of maybe thousands.
        whole = len(members) == dist.get_world_size()
        group = None if whole else dist.new_group(members, use_local_synchronization=True)
        seconds = best_s(lambda group=group: dist.all_reduce(data, group=group), device)  # type: ignore[misc]  # bound now
        if group is not None:
            dist.destroy_process_group(group)
        if rank == members[0]:
            bytes_s = bus_bytes_s(data.numel() * 4, len(members), seconds)
            found.append(LinkTime(hosts=mine, bytes_s=bytes_s))
    return tuple(found)


def _slow_links(times: Sequence[LinkTime], device: torch.device, *, per_node: int) -> list[str]:
    try:
        return check_links(times, gpu=torch.cuda.get_device_name(device), per_node=per_node)
    except LaunchError:  # the catalogue does not have this GPU and promises nothing
        return []


def _faults_of_gpu(local_rank: int) -> list[str]:
    """Return what the driver says against this rank's GPU."""
    visible = visible_gpus(os.environ)
    name = visible[local_rank] if visible is not None and local_rank < len(visible) else str(local_rank)
    return [
        f"GPU {gpu.index} has {gpu.uncorrected_errors} uncorrected memory errors"
        for gpu in read_gpus()
        if str(gpu.index) == name and gpu.uncorrected_errors
    ]


def timed_product(device: torch.device) -> tuple[float, bool]:
    """Return the seconds of a matrix product on a GPU, the best of three, and whether its sums are right."""
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
