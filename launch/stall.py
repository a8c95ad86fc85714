"""Who keeps a stalled run waiting: judged from what every rank last wrote about itself. Pure functions."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

SILENT_S = 5.0  # a rank whose file is older than its peers' newest by this does not write any more
SHOWN_RANKS = 8  # of a group


@dataclass(frozen=True, kw_only=True)
class Beat:
    """Where one rank is, by its own word."""

    rank: int
    host: str
    step: int  # optimizer steps begun
    number: int  # counts up within a step
    phase: str  # for people
    patient: bool  # the phase may take as long as it takes
    still_s: float  # seconds since it moved, when it wrote this
    waits: bool  # its training thread is inside a communication call
    where: str  # function and line
    written: float = 0.0  # time of its file, by the file system's clock


def is_silent(beat: Beat, beats: Iterable[Beat]) -> bool:
    """Return whether a rank has stopped writing while others went on: frozen, or dead."""
    return max(one.written for one in beats) - beat.written > SILENT_S


def all_still(beats: Sequence[Beat], *, patience_s: float) -> bool:
    """Return whether every rank that still writes has stood still so long, none of them in a patient phase."""
    writing = [beat for beat in beats if not is_silent(beat, beats)]
    return bool(writing) and all(beat.still_s > patience_s and not beat.patient for beat in writing)


def blame(beats: Sequence[Beat], *, world_size: int) -> str:
    """Return one paragraph: which ranks are to blame, where they are, and where the others wait.

    To blame are ranks that do not write any more; otherwise those that are not inside a communication call while others
    are; otherwise those that are furthest behind.
    """
    missing = sorted(set(range(world_size)) - {beat.rank for beat in beats})
    silent = [beat for beat in beats if is_silent(beat, beats)]
    working = [beat for beat in beats if not beat.waits]
    behind = min((beat.step, beat.number) for beat in beats)
    if missing or silent:
        suspects = silent
    elif working and len(working) < len(beats):
        suspects = working
    else:
        suspects = [beat for beat in beats if (beat.step, beat.number) == behind]
    others = [beat for beat in beats if beat not in suspects]
    still_s = min((beat.still_s for beat in beats if beat not in silent), default=0.0)
    lines = [f"no rank has moved for {still_s:.0f} s."]
    if missing:
        lines.append(f"{_ranks(missing)} never said where: dead, or never started.")
    lines += [
        f"{_group(group)}{' and does not write any more' if group[0] in silent else ''}."
        for group in _alike(suspects)
    ]
    lines += [f"waiting: {_group(group)}." for group in _alike(others)]
    return " ".join(lines)


def _alike(beats: Sequence[Beat]) -> list[list[Beat]]:
    """Group ranks that are at the same place, the furthest behind first."""
    groups: dict[tuple[object, ...], list[Beat]] = {}
    for beat in sorted(beats, key=lambda one: (one.step, one.number, one.rank)):
        groups.setdefault((beat.step, beat.phase, beat.where), []).append(beat)
    return list(groups.values())


def _group(group: Sequence[Beat]) -> str:
    hosts = sorted({beat.host for beat in group})
    first = group[0]
    place = f"step {first.step}, {first.phase}" + (f", in {first.where}" if first.where else "")
    return f"{_ranks([beat.rank for beat in group])} on {', '.join(hosts[:SHOWN_RANKS])}: {place}"


def _ranks(ranks: Sequence[int]) -> str:
    shown = ", ".join(map(str, ranks[:SHOWN_RANKS])) + (
        f" and {len(ranks) - SHOWN_RANKS} more" if len(ranks) > SHOWN_RANKS else ""
    )
    return f"rank {shown}" if len(ranks) == 1 else f"ranks {shown}"
