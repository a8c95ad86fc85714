"""Heartbeats: every rank says where it is, and when nobody moves any more, who keeps the others waiting is found out.

Each rank writes one small file in a folder that all ranks share, about once a second, from a thread of its own: the
training thread only sets an attribute. The same thread looks a few times a second whether the training thread works or
waits for other ranks, so that slow ranks can be told from those that wait for them (stragglers.py). When this rank has not moved for the patience given, and no other rank has either,
every rank writes down its stacks; the lowest rank that still writes names the ranks to blame, and all leave with an exit
code after which a job may be requeued.
"""

import contextlib
import faulthandler
import json
import os
import random
import shutil
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ParamSpec, TypeVar

from megaswift.errors import UserError
from megaswift.launch.environment import own_error_file
from megaswift.launch.failure import write_failure
from megaswift.launch.stall import Beat, all_still, blame, is_silent
from megaswift.logs import get_logger

log = get_logger("heartbeat")

P = ParamSpec("P")
R = TypeVar("R")

EXIT_STALLED = 75  # EX_TEMPFAIL of sysexits.h: try again
EVERY_S = 1.0  # between two writes
LOOK_S = 0.05  # between two looks at the training thread on average, each of which takes some 10 microseconds
# Files in which a thread waits for other ranks, with the function where the file has others. `_totals` is where a rank that
# launches work on a GPU first waits for what all ranks have launched.
COMMUNICATION = (
    "torch/distributed/",
    "megatron/core/pipeline_parallel/p2p_communication",
    "training/engine.py:_totals",
)


class StalledError(UserError):
    """No rank has moved for too long."""

    exit_code = EXIT_STALLED


@dataclass(frozen=True, kw_only=True)
class _Place:
    step: int
    number: int  # counts up within a step
    phase: str
    patient: bool
    since: float  # of time.monotonic()


def empty_folder(folder: Path) -> None:
    """Make `folder` for the heartbeats of a new run, without those of an earlier one; rank 0 calls it."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


class Heartbeat:
    """This rank's pulse. `move` belongs to the thread that makes the Heartbeat; the rest happens in a thread of its own."""

    def __init__(self, folder: Path, *, rank: int, world_size: int, patience_s: float) -> None:
        """`folder` is shared by all ranks; rank 0 has emptied it before any other rank comes here (`empty_folder`).

        A patience of 0 means: for ever.
        """
        self._folder, self._rank, self._world_size = folder, rank, world_size
        self._patience_s = patience_s or float("inf")
        self._host = socket.gethostname()
        self._watched = threading.get_ident()
        self._place = _Place(step=0, number=0, phase="start", patient=False, since=time.monotonic())
        self._work_s = 0.0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def __enter__(self) -> "Heartbeat":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()

    def move(self, step: int, phase: str, *, patient: bool = False) -> None:
        """Say that this rank begins `phase` of `step`. A `patient` phase, such as a save, may take as long as it takes."""
        number = self._place.number + 1 if step == self._place.step else 0
        self._place = _Place(step=step, number=number, phase=phase, patient=patient, since=time.monotonic())

    @property
    def work_s(self) -> float:
        """Seconds so far in which the training thread did not wait for other ranks, patient phases left out.

        An estimate from looks every LOOK_S: of a second, half of it waiting, the standard deviation is 0.1 s.
        """
        return self._work_s

    def during(self, phase: str, work: Callable[P, R]) -> Callable[P, R]:
        """Return `work`, every call of which is a move within the step that this rank is in."""

        def told(*args: P.args, **kwargs: P.kwargs) -> R:
            self.move(self._place.step, phase, patient=self._place.patient)
            return work(*args, **kwargs)

        return told

    def patiently(self, phase: str, work: Callable[P, R]) -> Callable[P, R]:
        """Return `work`, which may take as long as it takes, as a phase of its own within the one that this rank is in."""

        def told(*args: P.args, **kwargs: P.kwargs) -> R:
            before = self._place
            self.move(before.step, phase, patient=True)
            result = work(*args, **kwargs)
            self.move(before.step, before.phase, patient=before.patient)
            return result

        return told

    def _run(self) -> None:
        looked = written = time.monotonic()
        irregular = random.Random(
            self._rank
        )  # looks in step with the training would always see the same part of it
        while not self._over.wait(LOOK_S * irregular.uniform(0.5, 1.5)):
            now = time.monotonic()
            if not self._place.patient and not self._waits():
                self._work_s += now - looked
            looked = now
            if now - written < EVERY_S:
                continue
            written = now
            self._write()
            if time.monotonic() - self._place.since < self._patience_s:
                continue
            if all_still(self._beats(), patience_s=self._patience_s - 2 * EVERY_S):
                self._leave()

    def _write(self) -> None:
        place = self._place
        still_s = time.monotonic() - place.since
        waits, where = self._whereabouts() if still_s > 2 * EVERY_S else (False, "")
        beat = Beat(
            rank=self._rank,
            host=self._host,
            step=place.step,
            number=place.number,
            phase=place.phase,
            patient=place.patient,
            still_s=still_s,
            waits=waits,
            where=where,
        )
        part = self._folder / f"rank-{self._rank}.part"
        with contextlib.suppress(OSError):  # a full disk must not end a run that could go on
            part.write_text(json.dumps(asdict(beat)))
            os.replace(part, self._folder / f"rank-{self._rank}.json")

    def _waits(self) -> bool:
        """Return whether the training thread is inside a communication call."""
        frame = sys._current_frames().get(self._watched)
        while frame is not None:
            code = frame.f_code
            if _communicates(code.co_filename, code.co_name):
                return True
            frame = frame.f_back
        return False

    def _whereabouts(self) -> tuple[bool, str]:
        """Return whether the training thread waits for other ranks, and the innermost line of it that tells where."""
        frame = sys._current_frames().get(self._watched)
        frames = traceback.extract_stack(frame) if frame else []
        talks = [one for one in frames if _communicates(one.filename, one.name)]
        told = talks[-1] if talks else frames[-1] if frames else None
        if told is None:
            return False, "an unknown place"
        return bool(talks), f"{told.name} ({Path(told.filename).name}:{told.lineno})"

    def _beats(self) -> list[Beat]:
        beats = []
        for rank in range(self._world_size):
            path = self._folder / f"rank-{rank}.json"
            with contextlib.suppress(OSError, ValueError):  # not there yet, or just being replaced
                beats.append(Beat(**{**json.loads(path.read_text()), "written": path.stat().st_mtime}))
        return beats

    def _leave(self) -> None:
        """Write this rank's stacks, let the lowest living rank report, and end the process, whatever goes wrong."""
        try:
            with (
                contextlib.suppress(OSError),  # a full disk may be why nobody moves
                (self._folder / f"rank-{self._rank}.stacks").open("w") as file,
            ):
                faulthandler.dump_traceback(file, all_threads=True)
            time.sleep(2 * EVERY_S)  # for the stacks of the others
            beats = self._beats()
            if self._rank == min(
                (one.rank for one in beats if not is_silent(one, beats)), default=self._rank
            ):
                told = blame(beats, world_size=self._world_size)
                self._report(f"{told} Stacks: {self._folder}/rank-*.stacks")
            else:
                time.sleep(2 * EVERY_S)  # the one who reports leaves first
        finally:
            os._exit(EXIT_STALLED)

    def _report(self, text: str) -> None:
        with contextlib.suppress(OSError):
            (self._folder / "report.txt").write_text(text + "\n")
        path = own_error_file()
        if path:
            write_failure(path, StalledError(text), rank=self._rank)
        else:
            log.error(text)


def _communicates(filename: str, function: str) -> bool:
    return any(part in f"{filename}:{function}" for part in COMMUNICATION)
