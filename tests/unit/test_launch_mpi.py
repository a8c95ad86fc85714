"""Meeting under mpirun: a real one with four ranks, and a pair that does not fit."""

import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest

from megaswift.errors import LaunchError
from megaswift.launch.environment import RankEnv
from megaswift.launch.mpi import address_for_others, broadcast_master

MPIRUN = shutil.which("mpirun", path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}")
RANK = RankEnv(
    rank=1, local_rank=1, world_size=4, local_world_size=4, master_addr=None, master_port=None, source="mpi"
)
MEET = """
import os
from megaswift.launch.join import this_rank
rank = this_rank(os.environ)
os.write(1, f"{rank.rank} {rank.world_size} {rank.local_rank} {rank.master}\\n".encode())
"""
FAIL = """
import os, sys, time
from megaswift.cli import main
from megaswift.errors import ConfigError
from megaswift.launch.join import this_rank
def work(argv):
    if this_rank(os.environ).rank == 2:
        raise ConfigError("no.")
    time.sleep(100)
main._run = work
sys.exit(main.main([]))
"""


@pytest.mark.skipif(MPIRUN is None, reason="mpirun is not installed (pip install mpich mpi4py)")
def test_four_ranks_of_mpirun_agree_on_a_master() -> None:
    done = subprocess.run(
        [str(MPIRUN), "-n", "4", sys.executable, "-c", MEET], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    ranks = sorted(line.split() for line in done.stdout.splitlines())
    assert [line[:3] for line in ranks] == [[str(rank), "4", str(rank)] for rank in range(4)]
    assert len({line[3] for line in ranks}) == 1 and ranks[0][3].startswith("127.0.0.1:")


@pytest.mark.skipif(MPIRUN is None, reason="mpirun is not installed (pip install mpich mpi4py)")
def test_a_rank_that_fails_after_meeting_ends_the_others() -> None:
    done = subprocess.run(
        [str(MPIRUN), "-n", "4", sys.executable, "-c", FAIL], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2, done.stderr
    assert "[rank 2] error: no." in done.stderr and "Traceback" not in done.stderr


def test_the_wrong_mpi_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = types.SimpleNamespace(Get_size=lambda: 1)
    fake = types.ModuleType("mpi4py")
    fake.MPI = types.SimpleNamespace(COMM_WORLD=alone, Get_library_version=lambda: "MPICH 5\nmore")  # type: ignore[attr-defined]  # a stand-in
    monkeypatch.setitem(sys.modules, "mpi4py", fake)
    with pytest.raises(
        LaunchError, match=r"started 4 ranks but mpi4py sees 1: it was built for another MPI \(MPICH 5\)"
    ):
        broadcast_master(RANK)


def test_without_mpi4py_one_is_told_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(LaunchError, match=r"mpi4py cannot be imported .*MASTER_ADDR"):
        broadcast_master(RANK)


def test_the_address_for_others_is_not_empty() -> None:
    assert address_for_others()
