"""Logging: one line is one fact; rank 0 speaks unless the fact is about a rank."""

import logging
import os
import sys


def get_logger(name: str) -> logging.Logger:
    """Return the logger of a module, below the project's own root logger."""
    return logging.getLogger(name if name.startswith("megaswift") else f"megaswift.{name}")


def setup_logging(*, rank: int | None = None, verbose: bool = False) -> None:
    """Send facts to stderr: INFO and above on rank 0, WARNING and above elsewhere.

    `rank` defaults to RANK, which torchrun, srun wrappers and our launcher set before any code runs.
    """
    rank = int(os.environ.get("RANK", "0")) if rank is None else rank
    root = logging.getLogger("megaswift")
    root.setLevel(logging.DEBUG if verbose else logging.INFO if rank == 0 else logging.WARNING)
    root.propagate = False
    if not root.handlers:
        handler = _StderrHandler()
        prefix = "" if rank == 0 else f"[rank {rank}] "
        handler.setFormatter(logging.Formatter(f"%(asctime)s {prefix}%(message)s", "%H:%M:%S"))
        root.addHandler(handler)


class _StderrHandler(logging.Handler):
    """Write to what `sys.stderr` is when the fact is said: a progress bar and a test put a stand-in there."""

    def emit(self, record: logging.LogRecord) -> None:
        stream = sys.stderr
        try:
            stream.write(self.format(record) + "\n")
            stream.flush()
        except (OSError, ValueError):  # a terminal that is gone, a stream that is closed: no reason to end a training
            self.handleError(record)
