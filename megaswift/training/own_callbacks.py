"""Callbacks of a person's own: what --callbacks names, called on every rank between steps.

NAME(run) gets the RunConfig and returns an object with some of METHODS, or None on ranks where it has nothing to do; called are
after_step(step) with a training/loop.py Step, after_validation(line) with the line of logging.jsonl, and after_save(folder) with the
complete checkpoint. True from the first two ends the run, on whichever rank it is said.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megaswift.config.report_rules import CALLBACK_GROUP, CALLBACKS_OF_EVERY_RUN
from megaswift.config.run import RunConfig
from megaswift.errors import ConfigError, TrainingError
from megaswift.logs import get_logger
from megaswift.parallel.agreement import agree
from megaswift.rollout.rewards import function_named
from megaswift.training.loop import Step

logger = get_logger(__name__)

METHODS = ("after_step", "after_validation", "after_save")


@dataclass(frozen=True, kw_only=True)
class Own:
    """What one name of --callbacks stands for on this rank."""

    asked: str
    callback: Any

    @property
    def methods(self) -> set[str]:
        """Those that it has here."""
        return {name for name in METHODS if callable(getattr(self.callback, name, None))}


class OwnCallbacks:
    """All of them; ranks meet after each call, where any of them has such a method on some rank, and fail or end together."""

    def __init__(self, each: Sequence[Own], *, methods: set[str], group: Any) -> None:
        """`methods` are those that are called, the same on every rank; `group` holds all ranks, on processors, and is patient."""
        self._each, self._methods, self._group = each, methods, group
        self.have_ended = False  # the run

    def after_step(self, step: Step) -> bool:
        """Tell of a step; every rank calls it. Raises TrainingError."""
        return self._tell("after_step", step)

    def after_validation(self, line: dict[str, Any]) -> bool:
        """Tell of a validation; every rank calls it. Raises TrainingError."""
        return self._tell("after_validation", line)

    def after_save(self, folder: Path) -> None:
        """Tell of a complete checkpoint; every rank calls it. Raises TrainingError."""
        self._tell("after_save", folder)

    def _tell(self, method: str, what: Step | dict[str, Any] | Path) -> bool:
        if method not in self._methods:
            return False
        # What moves: an exit code and a truth by each rank.
        ends = torch.tensor(agree(lambda: self._call(method, what), group=self._group), dtype=torch.int32)
        dist.all_reduce(ends, op=dist.ReduceOp.MAX, group=self._group)
        ended = bool(ends)
        if ended and method != "after_save":
            self.have_ended = True
            logger.info("the run ends as %s of a callback says so (callbacks)", method)
        return ended

    def _call(self, method: str, what: Step | dict[str, Any] | Path) -> bool:
        ends = False
        for own in self._each:
            if method not in own.methods:
                continue
            try:
                ends |= bool(getattr(own.callback, method)(what))
            except (Exception, SystemExit) as error:  # whatever a person's callback raises is his to mend
                raise TrainingError(
                    f"callbacks={own.asked} fails in {method} on rank {dist.get_rank()}: {type(error).__name__}: {error}. Mend it."
                ) from error
        return ends


def load_own_callbacks(run: RunConfig, *, group: Any) -> OwnCallbacks | None:
    """Return the callbacks of a resolved run, None where there are none. Every rank calls it; raises ConfigError."""
    asked = [name for name in run.logging.callbacks if name not in CALLBACKS_OF_EVERY_RUN]
    if not asked:
        return None
    each = agree(lambda: [_made(name, run) for name in asked], group=group)
    everywhere: list[list[set[str]]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(everywhere, [own.methods for own in each], group=group)
    methods = [set().union(*found) for found in zip(*everywhere, strict=True)]  # of each, on any rank

    def check() -> None:
        for name, found in zip(asked, methods, strict=True):
            if not found:
                raise ConfigError(
                    f"callbacks={name} returned nothing with one of {', '.join(METHODS)}. Give it a method of that name."
                )

    agree(check, group=group)
    return OwnCallbacks(each, methods=set().union(*methods), group=group)


def _made(asked: str, run: RunConfig) -> Own:
    make = function_named(asked, asked="callbacks", group=CALLBACK_GROUP)
    try:
        return Own(asked=asked, callback=make(run))
    except (Exception, SystemExit) as error:  # whatever a person's file raises is his to mend
        raise ConfigError(
            f"callbacks={asked} fails when it gets the RunConfig: {type(error).__name__}: {error}. Mend it."
        ) from error
