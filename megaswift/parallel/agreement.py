"""Ranks that must succeed together: one that fails takes the others with it, and one message is printed."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from megaswift.errors import UserError

T = TypeVar("T")


class TakenAlong(SystemExit):
    """How a rank leaves that others take with them, one of which tells why."""


def agree(action: Callable[[], T], *, group: Any = None) -> T:
    """Run `action` on every rank and return its result once it has succeeded on all of them.

    Every rank of the world calls it. Where it fails, the lowest failing rank raises its own error and all others leave with
    the same exit code, so that a person reads one message. Ranks meet after the action: one that fails must not leave
    others in a collective of the action itself, unless that is another agree(). `group` holds all ranks, and how long they wait for
    each other.
    """
    failure: Exception | None = None
    result: T | None = None
    try:
        result = action()
    except Exception as error:  # raised again below, once every rank knows
        if isinstance(error, UserError) and error.is_known:
            raise
        failure = error
    codes: list[int | None] = [None] * dist.get_world_size()
    dist.all_gather_object(codes, _exit_code(failure), group=group)
    first = next((rank for rank, code in enumerate(codes) if code is not None), None)
    if first is None:
        return result  # type: ignore[return-value]  # every rank has its result here
    if failure is not None and first == dist.get_rank():
        if isinstance(failure, UserError):
            failure.is_known = True
        raise failure
    raise TakenAlong(codes[first])


def agree_on_first(action: Callable[[], T], *, group: Any = None) -> T:
    """Run `action` on rank 0 alone and return its result, which travels by pickle, on every rank; fails like agree()."""
    first = dist.get_rank() == 0
    box = [agree(lambda: action() if first else None, group=group)]
    dist.broadcast_object_list(box, src=0, group=group)
    return box[0]  # type: ignore[return-value]  # rank 0's result


def alike(action: Callable[[], T]) -> T:
    """Run `action`, which succeeds or fails on every rank for the same reason: rank 0 raises the error, others leave.

    Where ranks agreed within, the one that raised there raises.
    """
    try:
        return action()
    except UserError as error:
        if dist.get_rank() == 0 or error.is_known:
            error.is_known = True
            raise
        raise TakenAlong(error.exit_code) from error


def _exit_code(failure: Exception | None) -> int | None:
    if failure is None:
        return None
    return failure.exit_code if isinstance(failure, UserError) else 1
