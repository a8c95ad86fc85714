"""Slurm's compact host lists, `node[01-03,7],gpu-a`, as `scontrol show hostnames` expands them (slurm 22.05)."""

import re
from itertools import product
from math import prod

from megaswift.errors import LaunchError

MAX_HOSTS = 1 << 16  # slurm 22.05, src/common/hostlist.c: MAX_RANGE


def expand_hostlist(text: str) -> list[str]:
    """Return the host names of a list; raises LaunchError where it is not one.

    Zero padding is kept (`n[08-10]` -> n08 n09 n10). Several brackets in a name multiply.
    """
    hosts: list[str] = []
    for entry in re.split(r"[,\s]+(?![^\[]*\])", text.strip()):  # separators outside of brackets
        hosts += _expand_entry(entry, text) if entry else []
    return hosts


def _expand_entry(entry: str, text: str) -> list[str]:
    """Return the names of `a[1-2]b[3]`; of several brackets the last one moves fastest, then the first, the second, ..."""
    literals, ranges = re.split(r"\[[^\[\]]*\]", entry), re.findall(r"\[([^\[\]]*)\]", entry)
    if any(bracket in literal for literal in literals for bracket in "[]"):
        raise LaunchError(f"host list {text} has a bracket without its partner.")
    if not ranges:
        return [entry]
    if literals[-1]:
        raise LaunchError(
            f"host list {text} goes on after the last bracket of a name, which Slurm does not allow."
        )
    choices = [_expand_ranges(one, text) for one in ranges]
    if prod(map(len, choices)) > MAX_HOSTS:
        raise LaunchError(f"host list {text} names more than {MAX_HOSTS} hosts.")
    slow_to_fast = [*reversed(range(len(choices) - 1)), len(choices) - 1]
    names = []
    for chosen in product(*(choices[place] for place in slow_to_fast)):
        by_place = dict(zip(slow_to_fast, chosen, strict=True))
        names.append("".join(literals[place] + by_place[place] for place in range(len(choices))))
    return names


def _expand_ranges(ranges: str, text: str) -> list[str]:
    names: list[str] = []
    for one in ranges.split(","):
        first, dash, last = one.partition("-")
        last = last if dash else first
        if not (first.isdecimal() and last.isdecimal()) or int(last) < int(first):
            raise LaunchError(f"host list {text} has a range that is not first-last: {one!r}.")
        if int(last) - int(first) >= MAX_HOSTS:
            raise LaunchError(f"host list {text} has a range of more than {MAX_HOSTS} hosts.")
        names += [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    return names
