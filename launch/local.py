"""Start the ranks of this node as processes, and answer for them: output, the first error, signals, exit code.

Rank 0 owns the terminal. Of the other ranks one sees the log lines that carry their rank; the rest of what they write is
kept, and shown when such a rank dies without a word. A rank that fails writes its error to a file (failure.py), so the
first failure is known by its time, not by which process was seen to end first.
"""

import contextlib
import ctypes
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megaswift.launch.environment import NodeEnv, rank_environment
from megaswift.launch.failure import read_failures

GRACE_S = 5.0  # between SIGTERM and SIGKILL for ranks that outlive a failure
ROOT_CAUSE_S = 1.0  # a rank killed by the kernel is reaped within this time of its peers' connection errors
POLL_S = 0.05
TAIL_LINES = 40  # of a rank that dies without a word
RANK_LINE = re.compile(r"\d\d:\d\d:\d\d \[rank \d+\] ")  # the prefix that logs.py gives to ranks above 0
FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
PR_SET_PDEATHSIG = 1  # prctl(2)


@dataclass(frozen=True, kw_only=True)
class LocalRank:
    """A rank that was started here."""

    rank: int
    process: "subprocess.Popen[str]"
    tail: deque[str]  # what a rank above 0 wrote last


def this_program() -> list[str]:
    """Return the command that starts this program again: the installed script, or the module."""
    script = sys.argv[0]
    return (
        [sys.executable, script]
        if script.endswith("megaswift")
        else [sys.executable, "-m", "megaswift.cli.main"]
    )


def start_ranks(command: Sequence[str], *, nproc: int, node: NodeEnv) -> int:
    """Run `command` as each of this node's `nproc` ranks and return the exit code for the shell.

    0: all succeeded; 2: a user error; 130: Ctrl-C; 128 + n: killed by signal n; otherwise the first failing rank's own.
    """
    master_addr = node.master_addr or "127.0.0.1"
    master_port = node.master_port or free_port()
    signals: list[int] = []
    ranks: list[LocalRank] = []
    with tempfile.TemporaryDirectory(prefix="megaswift-") as folder, _collect_signals(signals):
        try:
            for local_rank in range(nproc):
                rank = node.node_rank * nproc + local_rank
                environ = rank_environment(
                    rank=rank,
                    local_rank=local_rank,
                    world_size=node.num_nodes * nproc,
                    local_world_size=nproc,
                    master_addr=master_addr,
                    master_port=master_port,
                    threads=threads_per_rank(nproc),
                    error_file=f"{folder}/rank-{rank}.json",
                )
                ranks.append(_start(command, rank, environ, owns_terminal=local_rank == 0))
            _wait(ranks, signals)
            died = [one for one in ranks if one.process.poll()]
            _stop(ranks)
            return _report(died, Path(folder), signals)
        finally:
            for one in ranks:
                _signal_group(one, signal.SIGKILL)


def free_port() -> int:
    """Return a TCP port of this machine on which nobody listens at this moment."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def threads_per_rank(nproc: int) -> int:
    """Return the threads of each of `nproc` ranks: the cores that this process may use, shared out."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return max(1, cores // nproc)


def die_with_parent() -> None:
    """Ask the kernel to end this rank when the process that started it is killed (Linux; elsewhere nothing is done)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _start(command: Sequence[str], rank: int, environ: dict[str, str], *, owns_terminal: bool) -> LocalRank:
    pipe = None if owns_terminal else subprocess.PIPE
    process = subprocess.Popen(
        command,
        env=environ,
        stdin=subprocess.DEVNULL,
        stdout=pipe,
        stderr=None if owns_terminal else subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # Ctrl-C reaches this process alone, which passes it on
    )
    one = LocalRank(rank=rank, process=process, tail=deque(maxlen=TAIL_LINES))
    if not owns_terminal:
        threading.Thread(target=_forward, args=(one,), daemon=True).start()
    return one


def _forward(one: LocalRank) -> None:
    """Read a rank's output to its end, passing on the lines in which it speaks as a rank."""
    assert one.process.stdout is not None
    for line in one.process.stdout:
        one.tail.append(line)
        if RANK_LINE.match(line):
            sys.stderr.write(line)
            sys.stderr.flush()


@contextlib.contextmanager
def _collect_signals(received: list[int]) -> Iterator[None]:
    """Note the signals that are meant for the ranks instead of dying of them."""
    before = {number: signal.signal(number, lambda got, frame: received.append(got)) for number in FORWARDED}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(ranks: list[LocalRank], signals: list[int]) -> None:
    """Return when all ranks have succeeded, or a moment after the first one failed; passes signals on meanwhile.

    After Ctrl-C the ranks have GRACE_S to leave, and a second one ends the waiting. After SIGTERM they may save.
    """
    passed_on = 0
    deadline = float("inf")
    while any(one.process.poll() is None for one in ranks) and time.monotonic() < deadline:
        if any(one.process.poll() for one in ranks):
            deadline = min(deadline, time.monotonic() + ROOT_CAUSE_S)
        for number in signals[passed_on:]:
            passed_on += 1
            for one in ranks:
                if one.process.poll() is None:
                    one.process.send_signal(number)
            if number == signal.SIGINT:
                deadline = time.monotonic() + (GRACE_S if signals.count(number) == 1 else 0)
        time.sleep(POLL_S)


def _stop(ranks: list[LocalRank]) -> None:
    """End the ranks that are left: SIGTERM, and SIGKILL after GRACE_S."""
    for one in ranks:
        _signal_group(one, signal.SIGTERM)
    deadline = time.monotonic() + GRACE_S
    while any(one.process.poll() is None for one in ranks) and time.monotonic() < deadline:
        time.sleep(POLL_S)
    for one in ranks:
        _signal_group(one, signal.SIGKILL)
        one.process.wait()


def _signal_group(one: LocalRank, number: int) -> None:
    """Signal a rank and all that it has started (its session), if it still lives."""
    if one.process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(one.process.pid, number)


def _report(died: list[LocalRank], folder: Path, signals: list[int]) -> int:
    """Write why the ranks ended to stderr, once, and return the exit code. `died`: those that failed by themselves."""
    if signal.SIGINT in signals:
        return 128 + signal.SIGINT
    if not died:
        return 0
    failures = read_failures(folder)
    spoke = {failure.rank for failure in failures}
    silent = [one for one in died if one.rank not in spoke]
    killed = [one for one in silent if one.process.returncode < 0]
    if failures and not killed:
        first = failures[0]
        code = next((one.process.returncode for one in died if one.rank == first.rank), 1)
        if first.user_error:
            sys.stderr.write(f"error: {first.message}\n")
        else:
            sys.stderr.write(f"rank {first.rank} failed first, the others were stopped:\n{first.traceback}")
        return code
    one = (killed or silent)[0]
    code = one.process.returncode
    if code < 0:
        if -code in signals:
            return 128 - code
        name = signal.Signals(-code).name
        hint = ", probably by the kernel because memory ran out" if -code == signal.SIGKILL else ""
        sys.stderr.write(
            f"error: rank {one.rank} was killed by {name}{hint}. Its last lines:\n{''.join(one.tail)}"
        )
        return 128 - code
    sys.stderr.write(f"error: rank {one.rank} ended with code {code}. Its last lines:\n{''.join(one.tail)}")
    return code
