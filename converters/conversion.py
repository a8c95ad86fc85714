"""Carry out a planned conversion: parts are written by any number of processes, and a rerun goes on where one stopped.

The folder grows under another name. A part is a file; it is written as NAME.partial and gets its name once it is on the
disk, so a part that has its name is complete. The processes share nothing but the folder: part i belongs to process
i mod world. No torch.
"""

import json
import os
import shutil
import time
import zlib
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megaswift.converters.copying import Checksum, Literal, Span, SpanWriter
from megaswift.converters.folders import check_output, check_space, growing_name, publish, sync
from megaswift.converters.tensor_files import TensorInfo
from megaswift.errors import CheckpointError
from megaswift.logs import get_logger

logger = get_logger(__name__)

REPORT = "conversion.json"
_PLAN = "plan.json"
_SUMS = ".sums"
POLL_S = 0.1
THREADS = min(4, len(os.sched_getaffinity(0)))  # each holds a buffer, or an expert that has to be computed
DISK_THREADS = 4  # they only wait
STALL_S = 600.0  # without a byte written by anyone; the slowest parts take some minutes on a busy file system


@dataclass(frozen=True, kw_only=True)
class Stretch:
    """Bytes of a part, and the tensors of the Hugging Face side whose checksums are taken once these are written."""

    spans: tuple[Span, ...]
    summed: tuple[TensorInfo, ...]  # with a relative file: a tensor that these spans fill


@dataclass(frozen=True, kw_only=True)
class Part:
    """One large file of the output; what no stretch fills is zero."""

    name: str  # below the output folder
    num_bytes: int
    stretches: tuple[Stretch, ...]


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """Everything that is known before the first byte is written."""

    parts: tuple[Part, ...]
    facts: Mapping[str, Any]  # for the report; equal facts, parts and sources mean an equal output
    begin: Callable[[Path], object]  # puts the small files into the growing folder
    small: tuple[Path, ...] = ()  # files that they are made of

    def fingerprint(self) -> int:
        """Return a number that changes with the plan and with every source file."""
        sources = sorted(
            {
                source
                for part in self.parts
                for stretch in part.stretches
                for span in stretch.spans
                if not isinstance(span, Literal)
                for source in span.sources
            }
        )
        every = [*sources, *sorted(self.small)]
        stats = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in every]
        text = repr(
            (dict(self.facts), [(part.name, part.num_bytes, part.stretches) for part in self.parts], stats)
        )
        return zlib.crc32(text.encode()) << 32 | zlib.adler32(text.encode())


def carry_out(conversion: Conversion, output: Path, *, source: Path, rank: int = 0, world: int = 1) -> Path:
    """Write the output folder, which appears complete or not at all; every one of `world` processes calls it.

    Process 0 returns when the folder has its name, the others when their parts are written. A complete output of the same
    plan is left as it is. Raises CheckpointError where the output cannot be written or a process is gone; the parts that
    are complete stay for the next attempt.
    """
    output = output.absolute()
    growing = growing_name(output)
    fingerprint = conversion.fingerprint()

    def is_complete() -> bool:
        return bool(_read_json(output / REPORT).get("fingerprint") == fingerprint)

    if is_complete():
        logger.info("%s is complete already", output)
        return output
    try:
        if rank == 0:
            _prepare(conversion, output, growing, source, fingerprint)
        _wait(
            lambda: _read_json(growing / _PLAN).get("fingerprint") == fingerprint or is_complete(),
            growing,
            "process 0 to begin",
        )
        _write_parts(conversion.parts[rank::world], growing)
        if rank == 0:
            left = {part.name for part in conversion.parts}
            _wait(
                lambda: all((growing / name).exists() for name in left), growing, "the other processes' parts"
            )
            _finish(conversion, output, growing, fingerprint)
    except OSError as error:
        if rank and is_complete():  # process 0 found all parts there
            return output
        where = f" ({error.filename})" if error.filename else ""
        raise CheckpointError(
            f"Writing {output} failed: {error.strerror or error}{where}. Make room or choose another folder, and run the "
            "same command again: it goes on where it stopped."
        ) from None
    return output


def _prepare(conversion: Conversion, output: Path, growing: Path, source: Path, fingerprint: int) -> None:
    check_output(output, replaces=REPORT, source=source)
    if _read_json(growing / _PLAN).get("fingerprint") != fingerprint:
        shutil.rmtree(growing, ignore_errors=True)
        growing.mkdir(parents=True)
    missing = [part for part in conversion.parts if not _is_there(growing / part.name)]
    check_space(growing, sum(part.num_bytes for part in missing))
    if len(missing) < len(conversion.parts):
        logger.info(
            "going on: %d of %d parts are there", len(conversion.parts) - len(missing), len(conversion.parts)
        )
    for folder in {(growing / part.name).parent for part in conversion.parts}:
        folder.mkdir(parents=True, exist_ok=True)
    # Before the parts: once the system holds much that is not on the disk, each further file waits.
    conversion.begin(growing)
    _write_json(growing / _PLAN, {"fingerprint": fingerprint})


def _write_parts(parts: tuple[Part, ...], growing: Path) -> None:
    """Write those parts that are not there: threads write a part each, others wait until it is on the disk and name it.

    Two threads in one file would wait for each other: the kernel lets one write at a time.
    """
    with ThreadPoolExecutor(DISK_THREADS) as disk, ThreadPoolExecutor(THREADS) as writers:
        writing = [
            writers.submit(_write, part, growing / part.name, disk)
            for part in parts
            if not _is_there(growing / part.name)
        ]
        try:
            for sealing in [one.result() for one in writing]:
                sealing.result()
        except BaseException:
            writers.shutdown(wait=False, cancel_futures=True)
            raise


def _is_there(path: Path) -> bool:
    """Whether a part is complete: its checksums may be lost where the power was."""
    return path.exists() and path.with_name(path.name + _SUMS).exists()


def _write(part: Part, path: Path, disk: ThreadPoolExecutor) -> Future[None]:
    """Write a part, and return the task in which `disk` seals it."""
    partial = path.with_name(path.name + ".partial")
    noted = {}
    with SpanWriter(partial, part.num_bytes) as writer:
        for stretch in part.stretches:
            sums = [
                Checksum(info.file if info.file.is_absolute() else partial, info.begin, info.num_bytes)
                for info in stretch.summed
            ]
            writer.write(stretch.spans, sums)
            for info, checksum in zip(stretch.summed, sums, strict=True):
                noted[info.name] = {"dtype": info.dtype, "shape": list(info.shape), "bytes": info.num_bytes, "xxh3_128": checksum.hexdigest()}  # fmt: skip
    return disk.submit(_seal, partial, path, noted)


def _seal(partial: Path, path: Path, noted: Mapping[str, Any]) -> None:
    """Wait until a part is on the disk, note its checksums, and give it its name."""
    sync(partial)
    _write_json(path.with_name(path.name + _SUMS), noted)
    partial.rename(path)


def _finish(conversion: Conversion, output: Path, growing: Path, fingerprint: int) -> None:
    tensors: dict[str, Any] = {}
    for part in conversion.parts:
        path = growing / part.name
        tensors |= _read_json(path.with_name(path.name + _SUMS))
    report = {**conversion.facts, "fingerprint": fingerprint}
    report |= {"files": {part.name: part.num_bytes for part in conversion.parts}, "tensors": tensors}
    _write_json(growing / REPORT, report)
    for leftover in (growing / _PLAN, *growing.rglob(f"*{_SUMS}")):
        leftover.unlink(missing_ok=True)
    publish(growing, output)


def _wait(is_done: Callable[[], bool], growing: Path, what: str) -> None:
    """Return when `is_done`; raises CheckpointError when nobody has written anything for STALL_S."""
    newest, since = 0, time.monotonic()
    while not is_done():
        time.sleep(POLL_S)
        changed = max(
            (path.stat().st_mtime_ns for path in growing.rglob("*.partial") if path.exists()), default=0
        )
        if changed != newest:
            newest, since = changed, time.monotonic()
        if time.monotonic() - since > STALL_S:
            raise CheckpointError(
                f"Nothing was written into {growing} for {STALL_S:.0f} s while waiting for {what}. A process is gone; run "
                "the same command again, it goes on where it stopped."
            )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write a file that another process may be waiting for: it is there whole or not at all."""
    draft = path.with_name(path.name + ".draft")
    draft.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    draft.rename(path)
