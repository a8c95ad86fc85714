"""Errors that a user can cause and mend: one clear message, exit code 2."""

import difflib
from collections.abc import Iterable

MAX_NAMES = 8  # of one kind in a message


class UserError(Exception):
    """What is wrong (name=value), the rule, and what to do; one sentence each."""

    exit_code = 2
    is_known = False  # every rank has been told already: parallel/agreement.py


class ConfigError(UserError):
    """A setting, or two settings that contradict each other."""


class ModelError(UserError):
    """A model folder, a config.json, or a family that is not known."""


class WeightsError(UserError):
    """Weight files: missing, broken, unclaimed or unfilled tensors."""


class DataError(UserError):
    """A data set or a row."""


class CheckpointError(UserError):
    """A training checkpoint that cannot be written or read."""


class TrainingError(UserError):
    """A run whose numbers went wrong."""


class LaunchError(UserError):
    """Ranks that cannot be started or joined."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ' Did you mean X?' for the known name nearest to `name`, or the whole list when it is short."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if close:
        return f" Did you mean {close[0]}?"
    return f" Choose from {', '.join(known)}." if 0 < len(known) <= 12 else ""


def listing(names: Iterable[str]) -> str:
    """Return the first names and how many more there are."""
    names = list(names)
    more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
    return ", ".join(names[:MAX_NAMES]) + more
