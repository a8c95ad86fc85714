"""Ranks as processes: what one sees, what fails first, what is left behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megaswift.launch import local
from megaswift.launch.environment import NodeEnv
from megaswift.launch.local import free_port, start_ranks, threads_per_rank

# A rank as the command line runs one: errors go to the launcher's file.
RANK = """
import os, signal, sys, time
from megaswift.cli import main
from megaswift.errors import ConfigError
rank = int(os.environ["RANK"])
def work(argv):
{body}
main._run = work
sys.exit(main.main([]))
"""


def rank_program(body: str) -> list[str]:
    return [
        sys.executable,
        "-c",
        RANK.format(body="\n".join("    " + line for line in body.strip().splitlines())),
    ]


def run(body: str, *, nproc: int = 3, node: NodeEnv | None = None) -> int:
    return start_ranks(rank_program(body), nproc=nproc, node=node or NodeEnv())


def test_every_rank_knows_its_place(tmp_path: Path) -> None:
    body = f"""
names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR")
open(f"{tmp_path}/{{rank}}", "w").write(" ".join(os.environ[name] for name in names))
return 0
"""
    node = NodeEnv(node_rank=1, num_nodes=2, master_addr="n1", master_port=1)
    assert run(body, nproc=2, node=node) == 0
    assert (tmp_path / "2").read_text() == "2 0 4 2 n1" and (tmp_path / "3").read_text() == "3 1 4 2 n1"


def test_a_user_error_of_all_ranks_is_told_once(capfd: pytest.CaptureFixture[str]) -> None:
    assert run('raise ConfigError("tp=3 is wrong.")') == 2
    assert capfd.readouterr().err == "error: tp=3 is wrong.\n"


def test_the_first_failure_is_told_and_the_others_are_stopped(capfd: pytest.CaptureFixture[str]) -> None:
    body = """
from pathlib import Path
from megaswift.launch.environment import own_error_file
if rank == 2:
    raise ValueError("the cause")
while rank == 1 or not Path(own_error_file()).with_name("rank-2.json").exists():
    time.sleep(0.05)
raise OSError("connection reset")
"""
    assert run(body) == 1
    err = capfd.readouterr().err
    assert "rank 2 failed first" in err and "ValueError: the cause" in err and "connection reset" not in err


def test_a_rank_killed_by_the_kernel_is_the_cause(capfd: pytest.CaptureFixture[str]) -> None:
    body = """
if rank == 1:
    print("allocating", flush=True)
    time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGKILL)
time.sleep(0.1)
raise OSError("connection reset")
"""
    assert run(body, nproc=2) == 128 + signal.SIGKILL
    err = capfd.readouterr().err
    assert "rank 1 was killed by SIGKILL, probably by the kernel because memory ran out" in err
    assert "allocating" in err and "connection reset" not in err


def test_only_rank_0_and_lines_that_name_a_rank_are_seen(capfd: pytest.CaptureFixture[str]) -> None:
    body = """
print(f"chatter of {rank}", flush=True)
sys.stderr.write(f"12:00:00 [rank {rank}] a fact\\n")
return 0
"""
    assert run(body, nproc=2) == 0
    seen = capfd.readouterr()
    assert "chatter of 0" in seen.out and "chatter of 1" not in seen.out + seen.err
    assert "12:00:00 [rank 1] a fact" in seen.err


def test_what_ignores_sigterm_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "GRACE_S", 0.5)
    body = """
signal.signal(signal.SIGTERM, signal.SIG_IGN)
open(f"FOLDER/{rank}", "w").close()
while rank == 1 or not os.path.exists("FOLDER/1"):
    time.sleep(0.05)
raise ConfigError("no.")
"""
    # Rank 1 never ends by itself.
    assert run(body.replace("FOLDER", str(tmp_path)), nproc=2) == 2


def test_children_of_a_rank_are_ended_too(tmp_path: Path) -> None:
    body = f"""
import subprocess
if rank == 1:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    open("{tmp_path}/part", "w").write(str(child.pid))
    os.rename("{tmp_path}/part", "{tmp_path}/child")
    time.sleep(60)
while not os.path.exists("{tmp_path}/child"):
    time.sleep(0.05)
raise ConfigError("no.")
"""
    assert run(body, nproc=2) == 2
    _wait_for_end([int((tmp_path / "child").read_text())])


PARENT = """
import sys
from megaswift.launch.environment import NodeEnv
from megaswift.launch.local import start_ranks
sys.exit(start_ranks({command!r}, nproc=2, node=NodeEnv()))
"""


def _launcher(body: str) -> subprocess.Popen[str]:
    command = rank_program(body)
    return subprocess.Popen(
        [sys.executable, "-c", PARENT.format(command=command)],
        text=True,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def _wait_for(path: Path) -> None:
    deadline = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.05)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 0), (signal.SIGUSR1, 0)])
def test_signals_reach_every_rank_once(tmp_path: Path, number: signal.Signals, code: int) -> None:
    body = f"""
got = []
signal.signal({int(number)}, lambda n, frame: got.append(n))
open(f"{tmp_path}/ready{{rank}}", "w").close()
while not got:
    time.sleep(0.05)
time.sleep(0.3)
open(f"{tmp_path}/got{{rank}}", "w").write(str(len(got)))
return 0
"""
    launcher = _launcher(body)
    for rank in (0, 1):
        _wait_for(tmp_path / f"ready{rank}")
    launcher.send_signal(number)
    assert launcher.wait(timeout=30) == code
    assert [(tmp_path / f"got{rank}").read_text() for rank in (0, 1)] == ["1", "1"]


def test_ranks_die_with_a_killed_launcher(tmp_path: Path) -> None:
    body = f"""
from megaswift.launch.local import die_with_parent
die_with_parent()
open(f"{tmp_path}/part{{rank}}", "w").write(str(os.getpid()))
os.rename(f"{tmp_path}/part{{rank}}", f"{tmp_path}/pid{{rank}}")
time.sleep(60)
"""
    launcher = _launcher(body)
    for rank in (0, 1):
        _wait_for(tmp_path / f"pid{rank}")
    launcher.kill()
    launcher.wait(timeout=10)
    pids = [int((tmp_path / f"pid{rank}").read_text()) for rank in (0, 1)]
    _wait_for_end(pids)


def test_free_ports_and_threads() -> None:
    assert 1024 <= free_port() <= 65535
    assert threads_per_rank(10_000) == 1 <= threads_per_rank(1)


def _wait_for_end(pids: list[int]) -> None:
    """A killed process takes a moment to end."""
    deadline = time.monotonic() + 10
    while any(_runs(pid) for pid in pids):
        assert time.monotonic() < deadline, "it outlived what started it"
        time.sleep(0.05)


def _runs(pid: int) -> bool:
    """A zombie that its new parent has not reaped yet does not run."""
    try:
        os.kill(pid, 0)
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (ProcessLookupError, FileNotFoundError):
        return False
