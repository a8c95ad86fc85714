"""How much a user may still write to a file system: what is free, and what a quota leaves."""

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

KIB = 1024
TIMEOUT_S = 10.0  # a server that does not answer is no reason to wait


@dataclass(frozen=True, kw_only=True)
class Mount:
    """Where a folder lies."""

    device: str
    point: str
    kind: str


def writable_bytes(folder: Path) -> int:
    """Return the bytes that this user can write below an existing folder."""
    free = shutil.disk_usage(folder).free  # what is free for users, not what root keeps for itself
    left = _quota_left(mount_of(folder.resolve(), _text(Path("/proc/mounts"))))
    return free if left is None else min(free, left)


def mount_of(folder: Path, mounts: str) -> Mount | None:
    """Return the entry of /proc/mounts that a folder lies in: the longest mount point above it."""
    entries = [line.split() for line in mounts.splitlines()]
    above = [entry for entry in entries if len(entry) > 2 and folder.is_relative_to(entry[1])]
    if not above:
        return None
    device, point, kind = max(above, key=lambda entry: len(entry[1]))[:3]
    return Mount(device=device, point=point, kind=kind)


def quota_left(text: str, mount: Mount) -> int | None:
    """Return the bytes that a quota leaves, by the output of `lfs quota -q` or `quota -w`; None where there is no limit.

    A line is: file system, KiB used (with a star where it is too much), soft limit, hard limit, ... (quota(1), lfs-quota(1)).
    A soft limit counts: a long run outlives its period of grace.
    """
    for line in text.splitlines():
        words = line.split()
        if len(words) < 4 or words[0] not in (mount.device, mount.point):
            continue
        numbers = [word.rstrip("*") for word in words[1:4]]
        if all(number.isdigit() for number in numbers):
            used, *limits = map(int, numbers)
            given = [limit for limit in limits if limit]
            return max(0, min(given) - used) * KIB if given else None
    return None


def _quota_left(mount: Mount | None) -> int | None:
    if mount is None:
        return None
    lustre = ["lfs", "quota", "-q", "-u", str(os.getuid()), mount.point]
    words = lustre if mount.kind == "lustre" else ["quota", "-w"]
    if shutil.which(words[0]) is None:
        return None
    try:
        said = subprocess.run(words, capture_output=True, text=True, timeout=TIMEOUT_S).stdout
    except (OSError, subprocess.TimeoutExpired):
        return None
    return quota_left(said, mount)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
