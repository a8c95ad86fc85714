"""How a rank tells the one who started it why it ended: one JSON file a rank, readable by torchrun too."""

import json
import os
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

from megaswift.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Failure:
    """The error that ended one rank."""

    rank: int
    time: float  # seconds since the epoch, of the node's own clock
    user_error: bool  # the message says it all
    message: str
    traceback: str


def write_failure(path: str | Path, error: BaseException, *, rank: int) -> None:
    """Write `error` to `path`, complete or not at all.

    The field "message" has the shape that torchrun reads (torch 2.13, elastic/multiprocessing/errors/error_handler.py).
    """
    now = time.time()
    trace = "".join(traceback.format_exception(error))
    content = {
        "message": {
            "message": f"{type(error).__name__}: {error}",
            "extraInfo": {"py_callstack": trace, "timestamp": str(int(now))},
        },
        "rank": rank,
        "time": now,
        "user_error": isinstance(error, UserError),
        "text": str(error),
        "traceback": trace,
    }
    part = Path(f"{path}.part")
    part.write_text(json.dumps(content), encoding="utf-8")
    os.replace(part, path)


def claim_user_error(path: str | Path, error: UserError) -> bool:
    """Leave `error` in `path` for the batch script; false where another rank was first, which then tells the user."""
    try:
        with open(path, "x", encoding="utf-8") as file:
            file.write(f"{error}\n")
    except FileExistsError:
        return False
    return True


def read_failures(folder: Path) -> list[Failure]:
    """Return the failures that ranks wrote to `folder`, the first one first."""
    failures = []
    for path in folder.glob("rank-*.json"):
        content = json.loads(path.read_text(encoding="utf-8"))
        failures.append(
            Failure(
                rank=content["rank"],
                time=content["time"],
                user_error=content["user_error"],
                message=content["text"],
                traceback=content["traceback"],
            )
        )
    return sorted(failures, key=lambda failure: failure.time)
