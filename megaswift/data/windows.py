"""The windows of a stream on the disk that all ranks share: one rank has them made ahead of time, and every rank reads them.

folder/12/          window 12, complete: window.json, and the arrays of its EncodedSet where it has any rows
folder/failed       why no more windows come
"""

import json
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from megaswift.data.encode import EncodedSet
from megaswift.data.report import Report
from megaswift.data.stream import Kitchen, OwnedRow, Position, Recipe, RowStream
from megaswift.errors import DataError
from megaswift.logs import get_logger

logger = get_logger(__name__)

FACTS, FAILED = "window.json", "failed"
POLL_S = 0.02  # between two looks for a window that another rank has made


@dataclass(frozen=True, kw_only=True)
class Window:
    """One window of the stream."""

    number: int
    position: Position  # before it
    encoded: EncodedSet | None  # None: no row of it can be used


class Shelf:
    """Reads windows that another process makes."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def get(self, number: int) -> Window:
        """Return a window, once it is there. Raises DataError where it never will be."""
        while str(number) not in (names := os.listdir(self._folder)):
            if FAILED in names:
                message = (self._folder / FAILED).read_text(encoding="utf-8")
                raise DataError(message or "The rank that has windows made could not, and its disk is full.")
            time.sleep(POLL_S)
        return _read(self._folder, number)

    def forget(self, before: int) -> None:
        """Windows below `before` are not needed any more: nothing to do for a reader."""

    def close(self) -> None:
        """No more windows are needed."""


class Workshop(Shelf):
    """Has windows made in processes of its own, some ahead of the one that is asked for."""

    def __init__(self, folder: Path, stream: RowStream, recipe: Recipe, *, processes: int) -> None:
        """Use so many `processes`; `folder` is emptied."""
        super().__init__(folder)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        self._stream, self._ahead = stream, processes + 1
        self._oldest = stream.position.window
        self._coming: dict[int, Future[Report]] = {}
        # spawn: a rank has threads, groups and perhaps a GPU, none of which survives a fork.
        self._pool = ProcessPoolExecutor(
            processes,
            multiprocessing.get_context("spawn"),
            initializer=_start_worker,
            initargs=(recipe, processes),
        )

    def get(self, number: int) -> Window:
        """Return a window, and let those after it be made. Raises DataError, and whatever stops the making of windows."""
        try:
            self._have_made(number)
        except Exception as error:
            _leave_word(self._folder, str(error) or type(error).__name__)  # or its readers wait for ever
            raise
        return _read(self._folder, number)

    def forget(self, before: int) -> None:
        """Remove windows below `before`."""
        for number in range(self._oldest, before):
            shutil.rmtree(self._folder / str(number), ignore_errors=True)
        self._oldest = max(self._oldest, before)

    def close(self) -> None:
        """End the processes."""
        self._pool.shutdown(cancel_futures=True)

    def _have_made(self, number: int) -> None:
        while self._stream.position.window <= number + self._ahead:
            self._order()
        coming = self._coming.pop(number, None)
        if coming is None:
            return
        try:
            report = coming.result()
        except BrokenProcessPool as error:
            raise DataError("A process that tokenises was killed, most often for want of memory.") from error
        if report.bad:
            report.log(f"window {number} of the stream")

    def _order(self) -> None:
        position, rows = self._stream.window()
        self._coming[position.window] = self._pool.submit(_make, self._folder, position, rows)


_recipe: Recipe | None = None  # set in worker processes only


def _start_worker(recipe: Recipe, processes: int) -> None:
    global _recipe  # a worker's state: it makes many windows by one recipe
    _recipe = recipe
    for number in (
        signal.SIGINT,
        signal.SIGTERM,
        signal.SIGUSR1,
    ):  # meant for the rank, which may still need windows
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_die_with_parent, daemon=True).start()
    if processes > 1:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # processes are the threads


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None, "a worker has one"
    wait([parent.sentinel])
    os._exit(1)


@cache
def _kitchen() -> Kitchen:
    assert _recipe is not None, "set by _start_worker"
    return _recipe.kitchen()


def _make(folder: Path, position: Position, rows: Sequence[OwnedRow]) -> Report:
    return make_window(_kitchen(), folder, position, rows)


def make_window(kitchen: Kitchen, folder: Path, position: Position, rows: Sequence[OwnedRow]) -> Report:
    """Write one window below `folder`; it is complete or not there."""
    encoded, report = kitchen.make(rows)
    growing = folder / f".{position.window}"
    shutil.rmtree(growing, ignore_errors=True)
    if len(encoded):
        encoded.save(growing)
    growing.mkdir(exist_ok=True)
    facts: dict[str, Any] = {"position": position.to_json(), "entries": len(encoded)}
    (growing / FACTS).write_text(json.dumps(facts), encoding="utf-8")
    os.replace(growing, folder / str(position.window))
    return report


def _read(folder: Path, number: int) -> Window:
    place = folder / str(number)
    facts = json.loads((place / FACTS).read_text(encoding="utf-8"))
    return Window(
        number=number,
        position=Position.from_json(facts["position"]),
        encoded=EncodedSet.load(place) if facts["entries"] else None,
    )


def _leave_word(folder: Path, message: str) -> None:
    """Let the readers know; on a full disk by an empty file, for which there is room."""
    growing = folder / f".{FAILED}"
    with suppress(OSError):
        growing.write_text(message, encoding="utf-8", errors="backslashreplace")
    with suppress(OSError):  # what went wrong first is what is raised
        os.replace(growing, folder / FAILED)
