"""Work on many pieces in processes that are forked from this one and see what it has read."""

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from megaswift.errors import DataError

Piece = TypeVar("Piece")
Result = TypeVar("Result")

_work: Callable[[Any], Any] | None = None  # set in worker processes only


def forked_map(
    work: Callable[[Piece], Result], pieces: Sequence[Piece], *, processes: int
) -> Iterator[Result]:
    """Yield what `work` makes of every piece, in order; `work` may hold anything, as it is inherited and never pickled.

    Raises DataError where a process was killed, and whatever `work` raises.
    """
    if processes <= 1:
        yield from map(work, pieces)
        return
    # fork: the samples and the template are in the children at once; they run the tokenizer and numpy only.
    context = multiprocessing.get_context("fork")
    pool = ProcessPoolExecutor(processes, context, initializer=_start_worker, initargs=(work,))
    try:
        yield from pool.map(_inherited, pieces)
    except BrokenProcessPool as error:
        raise DataError(
            f"One of dataset_num_proc={processes} processes was killed, most often for want of memory. Lower it."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)  # waits: a thread of the pool alive while this process forks again hangs the children


def _start_worker(work: Callable[[Any], Any]) -> None:
    global _work  # a worker's state: sending it with every piece would pickle it
    _work = work
    os.environ["TOKENIZERS_PARALLELISM"] = (
        "false"  # tokenizers asks for it after a fork; processes are the threads
    )


def _inherited(piece: Any) -> Any:
    assert _work is not None
    return _work(piece)
