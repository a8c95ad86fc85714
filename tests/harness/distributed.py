"""Run a function on several gloo ranks; the processes stay warm between tests."""

import atexit
import gc
import multiprocessing as mp
import os
import socket
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

# Each gloo group that something still refers to polls a hundred times a second, in three threads.
MOST_THREADS = 150
PATIENCE_S = 900.0  # many runs in one set of processes, on a machine that may be busy

_workers: list[tuple[Any, Connection]] = []


def run_distributed(
    func: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = PATIENCE_S
) -> list[Any]:
    """Call func(rank, world_size, *args) on every rank of a gloo world and return the results by rank.

    `func` is a top-level function of an importable module; results travel by pickle. The first traceback of any rank is
    raised as AssertionError; a rank that dies or exceeds `timeout_s` ends the test and the processes.
    """
    _grow(world_size)
    port = free_port()
    for rank, (_, pipe) in enumerate(_workers[:world_size]):
        pipe.send((func, rank, world_size, port, args))
    deadline = time.monotonic() + timeout_s
    results: list[Any] = [None] * world_size
    most_threads = 0
    waiting = set(range(world_size))
    while waiting:
        for rank in sorted(waiting):
            process, pipe = _workers[rank]
            if pipe.poll(0.02):
                try:
                    kind, value, threads = pipe.recv()
                except EOFError:
                    kind, value, threads = "error", f"rank {rank} died with exit code {process.exitcode}", 0
                if kind == "error":
                    _stop()
                    raise AssertionError(f"rank {rank} of {world_size}:\n{value}")
                results[rank], most_threads = value, max(most_threads, threads)
                waiting.discard(rank)
        if waiting and time.monotonic() > deadline:
            _stop()
            raise AssertionError(
                f"ranks {sorted(waiting)} of {world_size} did not finish in {timeout_s:.0f} s"
            )
    if most_threads > MOST_THREADS:
        _stop()  # new processes cost seconds, thousands of polling threads the whole machine
    return results


def free_port() -> int:
    """Return a TCP port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _grow(world_size: int) -> None:
    context = mp.get_context("spawn")  # fork would copy torch's thread pools in an undefined state
    while len(_workers) < world_size:
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs,), daemon=True)
        process.start()
        theirs.close()
        _workers.append((process, ours))


@atexit.register
def _stop() -> None:
    for process, pipe in _workers:
        process.kill()
        process.join()
        pipe.close()
    _workers.clear()


def _serve(pipe: Connection) -> None:
    import torch

    from megaswift.platforms.cpu import skip_compilation

    skip_compilation()
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

    from megaswift.mcore.process_groups import destroy
    from megaswift.platforms.platform import init_distributed, select_platform

    torch.set_num_threads(1)
    platform = select_platform("cpu")
    while True:
        try:
            func, rank, world_size, port, args = pipe.recv()
        except EOFError:
            return
        try:
            init_distributed(
                platform, rank=rank, world_size=world_size, master=f"127.0.0.1:{port}", timeout_min=3
            )
            result = func(rank, world_size, *args)
            torch.distributed.barrier()
        except BaseException:  # noqa: BLE001  # everything a rank raises is the test's to report
            pipe.send(("error", traceback.format_exc(), 0))
            continue  # the parent ends all ranks
        destroy()
        torch.distributed.destroy_process_group()
        # A gloo group polls in threads of its own until the last reference to it is gone: those of old models, which
        # are cycles, and of Megatron's cache of rotary tables, would slow every later test down.
        RotaryEmbedding.forward.cache_clear()
        gc.collect()
        pipe.send(("ok", result, _num_threads()))


def _num_threads() -> int:
    """Return the threads of this process, 0 where the system does not tell."""
    folder = "/proc/self/task"
    return len(os.listdir(folder)) if os.path.isdir(folder) else 0
