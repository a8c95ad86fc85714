"""Folders that appear complete or not at all: they grow under another name and get their own by a rename."""

import errno
import os
import shutil
from pathlib import Path

from megaswift.errors import WeightsError


def growing_name(output: Path) -> Path:
    """Return the name under which `output` grows."""
    return output.with_name(output.name + ".incomplete")


def check_output(output: Path, *, replaces: str, source: Path | None) -> None:
    """Raise WeightsError if `output` is `source`, or holds anything but an earlier output, known by its file `replaces`."""
    if source is not None and output.exists() and output.samefile(source):
        raise WeightsError(f"{output} is the folder that the model is read from. Choose another one.")
    if output.exists() and any(output.iterdir()) and not (output / replaces).is_file():
        raise WeightsError(
            f"{output} exists and has no {replaces}, so it is not an earlier output. Choose another folder."
        )


def check_space(folder: Path, num_bytes: int) -> None:
    """Raise OSError unless the disk has room for `num_bytes`."""
    if shutil.disk_usage(folder).free < num_bytes:
        raise OSError(errno.ENOSPC, f"{num_bytes / 1e9:.1f} GB are needed and the disk is full", str(folder))


def publish(growing: Path, output: Path, *, fsync: bool = True) -> None:
    """Give the folder its name, with `fsync` once all of it is on the disk; what had the name before is removed last.

    Raises OSError.
    """
    if fsync:
        for path in (*growing.rglob("*"), growing):
            sync(path)
    old = output.with_name(output.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if output.exists():
        output.rename(old)
    growing.rename(output)
    if fsync:
        sync(output.parent)
    shutil.rmtree(old, ignore_errors=True)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
