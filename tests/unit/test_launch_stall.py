"""Who is to blame for a stalled run, and how a process finds out."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from megaswift.launch.heartbeat import EXIT_STALLED
from megaswift.launch.stall import Beat, all_still, blame


def beat(rank: int, **changes: Any) -> Beat:
    facts: dict[str, Any] = {
        "rank": rank,
        "host": f"n{rank // 2}",
        "step": 7,
        "number": 2,
        "phase": "training",
        "patient": False,
        "still_s": 30.0,
        "waits": True,
        "where": "all_reduce (distributed_c10d.py:1)",
        "written": 100.0,
    }
    return Beat(**{**facts, **changes})


def test_the_rank_that_does_not_wait_is_to_blame() -> None:
    sleeping = beat(2, waits=False, number=1, phase="reading its batch", where="batch (feed.py:9)")
    text = blame([beat(0), beat(1), sleeping, beat(3)], world_size=4)
    assert text.startswith(
        "no rank has moved for 30 s. rank 2 on n1: step 7, reading its batch, in batch (feed.py:9)."
    )
    assert "waiting: ranks 0, 1, 3 on n0, n1: step 7, training, in all_reduce" in text


def test_a_rank_that_does_not_write_any_more_is_to_blame() -> None:
    text = blame([beat(0), beat(1, written=80.0), beat(2)], world_size=3)
    assert (
        "rank 1 on n0: step 7, training, in all_reduce (distributed_c10d.py:1) and does not write any more."
        in text
    )


def test_a_rank_that_never_wrote_is_named() -> None:
    assert "rank 2 never said where" in blame([beat(0), beat(1)], world_size=3)


def test_where_all_wait_the_furthest_behind_is_to_blame() -> None:
    text = blame([beat(0), beat(1, number=1), beat(2)], world_size=3)
    assert "30 s. rank 1 on n0" in text and "waiting: ranks 0, 2" in text


def test_of_many_ranks_some_are_shown() -> None:
    beats = [beat(rank) for rank in range(100)] + [beat(100, waits=False)]
    assert "ranks 0, 1, 2, 3, 4, 5, 6, 7 and 92 more" in blame(beats, world_size=101)


def test_a_run_stalls_when_every_writing_rank_stands_still() -> None:
    assert all_still([beat(0), beat(1)], patience_s=20)
    assert not all_still([beat(0), beat(1, still_s=1.0)], patience_s=20)
    assert not all_still([beat(0), beat(1, patient=True)], patience_s=20)
    assert all_still([beat(0), beat(1, still_s=1.0, written=80.0)], patience_s=20)  # it was killed
    assert not all_still([], patience_s=20)


RANK = """
import sys, time
from pathlib import Path
from megaswift.launch.heartbeat import Heartbeat
from megaswift.logs import setup_logging
setup_logging(rank=0)
rank, moves = int(sys.argv[2]), float(sys.argv[3])
end = time.monotonic() + moves
with Heartbeat(Path(sys.argv[1]), rank=rank, world_size=2, patience_s=3) as heartbeat:
    work = heartbeat.during("work", lambda: time.sleep(0.1))
    heartbeat.move(1, "begin")
    while time.monotonic() < end:
        work()
    if rank == 1:
        heartbeat.move(2, "sleeping")
        time.sleep(1000 if moves < 6 else 0)
    elif moves < 6:
        heartbeat.move(3, "waiting")
        time.sleep(1000)
"""


def _ranks(folder: Path, *moves: float) -> list["subprocess.Popen[str]"]:
    environ = {name: value for name, value in os.environ.items() if name != "MEGASWIFT_ERROR_FILE"}
    return [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(folder), str(rank), str(seconds)],
            stderr=subprocess.PIPE,
            text=True,
            env=environ,
        )
        for rank, seconds in enumerate(moves)
    ]


def test_two_processes_that_stand_still_say_who_and_leave(tmp_path: Path) -> None:
    ranks = _ranks(tmp_path, 0.5, 0.5)
    said = [rank.communicate(timeout=300)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [EXIT_STALLED, EXIT_STALLED]
    assert "rank 1 on" in said[0] and "step 2, sleeping" in said[0] and not said[1]
    assert "rank 0 on" in (tmp_path / "report.txt").read_text()
    assert "in <module>" in (tmp_path / "rank-1.stacks").read_text()


def test_a_disk_that_takes_no_stacks_keeps_nobody_from_leaving(tmp_path: Path) -> None:
    for name in ("rank-0.stacks", "rank-1.stacks", "report.txt"):
        (tmp_path / name).mkdir()  # opened for writing: an OSError, as on a full disk
    ranks = _ranks(tmp_path, 0.5, 0.5)
    try:
        said = [rank.communicate(timeout=60)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [EXIT_STALLED, EXIT_STALLED]
    assert "rank 1 on" in said[0]


def test_a_rank_that_moves_keeps_all_alive(tmp_path: Path) -> None:
    ranks = _ranks(tmp_path, 6, 6)
    assert [rank.wait(timeout=60) for rank in ranks] == [0, 0]
    assert not (tmp_path / "report.txt").exists()
