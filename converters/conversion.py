"""Carry out a planned conversion: parts are written by any number of processes, and a rerun goes on where one stopped.

The folder grows under another name. A part is a file; it is written as NAME.partial and gets its name once it is whole.
With `fsync` that means on the disk. Without, as with `cp`, a loss of power within half a minute takes what the system had
not written yet, and may leave a file's length and name without its bytes: such files are compared with the source, byte for
byte, before a rerun counts on them. The processes share nothing but the folder: part i belongs to process i mod world. No torch.
"""

import json
import os
import shutil
import time
import zlib
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

from megaswift.converters.copying import Checksum, Literal, Span, SpanWriter, holds
from megaswift.converters.folders import check_output, check_space, growing_name, publish, sync
from megaswift.converters.tensor_files import TensorInfo
from megaswift.errors import CheckpointError, ConfigError
from megaswift.logs import get_logger

logger = get_logger(__name__)

REPORT = "conversion.json"
# Of each process while it works: first the plan, by process 0, then a line for each part, with its tensors' checksums.
_PROGRESS = "progress-{}.jsonl"
_PARTIAL = ".partial"
POLL_S = 0.1
THREADS = min(4, len(os.sched_getaffinity(0)))  # each holds a buffer, or an expert that has to be computed
DISK_THREADS = 4  # they only wait
# From here on a conversion waits for the disk unless it is told. Below, `cp` returns at once too and a rerun takes seconds.
FSYNC_BYTES = 16_000_000_000
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

    @property
    def num_bytes(self) -> int:
        """Bytes of all parts."""
        return sum(part.num_bytes for part in self.parts)

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


def carry_out(
    conversion: Conversion,
    output: Path,
    *,
    source: Path,
    rank: int = 0,
    world: int = 1,
    fsync: bool | None = None,
) -> Path:
    """Write the output folder, which appears complete or not at all; every one of `world` processes calls it.

    Process 0 returns when the folder has its name, the others when their parts are written. `fsync` says whether to wait
    until it is on the disk; None: from FSYNC_BYTES on, and with several processes, whose nodes may fail one by one. A
    complete output of the same plan is left as it is, but for one that nobody waited for where `fsync` is true. Raises
    CheckpointError where the output cannot be written or a process is gone; the parts that are complete stay for the next
    attempt. Raises ConfigError for several processes without fsync.
    """
    output = output.absolute()
    growing = growing_name(output)
    if fsync is None:
        fsync = world > 1 or conversion.num_bytes >= FSYNC_BYTES
    if world > 1 and not fsync:
        raise ConfigError(
            f"fsync false is for one process, and {world} share this conversion. Leave it out, or use one process."
        )
    plan = {"fingerprint": conversion.fingerprint(), "fsync": fsync}

    def is_complete() -> bool:
        report = _read_json(output / REPORT)
        if report.get("fingerprint") != plan["fingerprint"]:
            return False
        return report.get("fsync") is True or (not fsync and _is_whole(conversion, output))

    try:
        if is_complete():
            logger.info("%s is complete already", output)
            return output
        if rank == 0:
            _prepare(conversion, output, growing, source, plan)
        progress = _Progress()

        def has_begun() -> bool:
            nonlocal progress
            progress = _read_progress(growing)
            return progress.plan == plan

        _wait(lambda: has_begun() or is_complete(), growing, "process 0 to begin")
        if progress.plan != plan:
            return output
        _write_parts(conversion.parts[rank::world], growing, progress, rank=rank, fsync=fsync)
        if rank == 0:

            def all_are_there() -> bool:
                nonlocal progress
                progress = _read_progress(growing)
                return not _missing(conversion.parts, growing, progress)

            _wait(all_are_there, growing, "the other processes' parts")
            _finish(conversion, output, growing, progress)
    except OSError as error:
        if rank and is_complete():  # process 0 found all parts there
            return output
        where = f" ({error.filename})" if error.filename else ""
        raise CheckpointError(
            f"Writing {output} failed: {error.strerror or error}{where}. Make room or choose another folder, and run the "
            "same command again: it goes on where it stopped."
        ) from None
    return output


def _prepare(
    conversion: Conversion, output: Path, growing: Path, source: Path, plan: Mapping[str, Any]
) -> None:
    check_output(output, replaces=REPORT, source=source)
    progress = _read_progress(growing)
    if progress.plan != plan:
        shutil.rmtree(growing, ignore_errors=True)
        growing.mkdir(parents=True)
        progress = _Progress()
    missing = _missing(conversion.parts, growing, progress)
    check_space(growing, sum(part.num_bytes for part in missing))
    if len(missing) < len(conversion.parts):
        there = len(conversion.parts) - len(missing)
        compared = "" if plan["fsync"] else ", to be compared with the source"
        logger.info("going on: %d of %d parts are there%s", there, len(conversion.parts), compared)
    for folder in {(growing / part.name).parent for part in conversion.parts}:
        folder.mkdir(parents=True, exist_ok=True)
    # Before the parts: once the system holds much that is not on the disk, each further file waits.
    conversion.begin(growing)
    parts = {growing / part.name for part in conversion.parts}
    for path in {*growing.rglob("*")} - parts:
        if path.suffix != _PARTIAL:  # another process may be at it
            sync(path)
    if progress.plan != plan:
        _note(growing / _PROGRESS.format(0), plan, fsync=bool(plan["fsync"]))


def _missing(parts: Iterable[Part], growing: Path, progress: "_Progress") -> list[Part]:
    """Return the parts that have no name yet, or whose checksums a loss of power has taken."""
    return [part for part in parts if part.name not in progress.noted or not (growing / part.name).exists()]


def _write_parts(
    parts: tuple[Part, ...], growing: Path, progress: "_Progress", *, rank: int, fsync: bool
) -> None:
    """Write those parts that are not there: threads write a part each, others wait for the disk and name it.

    Two threads in one file would wait for each other: the kernel lets one write at a time. `progress` is what stood there
    when this process began; process 0 may be removing it by now.
    """
    missing = {part.name for part in _missing(parts, growing, progress)}
    sealer = _Sealer(growing / _PROGRESS.format(rank), fsync=fsync)

    def write(part: Part) -> Future[None] | None:
        path = growing / part.name
        if part.name not in missing and (fsync or _part_is_whole(part, path)):
            return None
        partial = path.with_name(path.name + _PARTIAL)
        sums = _write(part, partial, fsync=fsync)
        return disk.submit(sealer.seal, partial, path, {"part": part.name, "tensors": sums})

    with ThreadPoolExecutor(DISK_THREADS) as disk, ThreadPoolExecutor(THREADS) as writers:
        writing = [writers.submit(write, part) for part in parts]
        try:
            for sealing in [one.result() for one in writing]:
                if sealing is not None:
                    sealing.result()
        except BaseException:
            writers.shutdown(wait=False, cancel_futures=True)
            raise


def _is_whole(conversion: Conversion, output: Path) -> bool:
    """Whether a folder holds what the conversion makes; the sources are read again."""
    logger.info("%s is there; comparing it with its source", output)
    with ThreadPoolExecutor(THREADS) as readers:
        return all(readers.map(lambda part: _part_is_whole(part, output / part.name), conversion.parts))


def _part_is_whole(part: Part, path: Path) -> bool:
    spans = [span for stretch in part.stretches for span in stretch.spans]
    return path.exists() and holds(path, part.num_bytes, spans)


def _write(part: Part, partial: Path, *, fsync: bool) -> dict[str, Any]:
    """Write a part, and return what is noted of its tensors."""
    noted = {}
    with SpanWriter(partial, part.num_bytes) as writer:
        for stretch in part.stretches:
            sums = [
                Checksum(info.file if info.file.is_absolute() else partial, info.begin, info.num_bytes)
                for info in stretch.summed
            ]
            writer.write(stretch.spans, sums)
            if fsync:
                writer.begin_sync()
            for info, checksum in zip(stretch.summed, sums, strict=True):
                noted[info.name] = {"dtype": info.dtype, "shape": list(info.shape), "bytes": info.num_bytes, "xxh3_128": checksum.hexdigest()}  # fmt: skip
    return noted


class _Sealer:
    """Notes a process's parts, and gives them their names."""

    def __init__(self, progress: Path, *, fsync: bool) -> None:
        self._progress, self._fsync = progress, fsync
        self._lock = Lock()

    def seal(self, partial: Path, path: Path, entry: Mapping[str, Any]) -> None:
        """Note a part and name it, with `fsync` once it is on the disk."""
        if self._fsync:
            sync(partial)
        with self._lock:
            _note(self._progress, entry, fsync=self._fsync)
        partial.rename(path)


def _note(progress: Path, entry: Mapping[str, Any], *, fsync: bool) -> None:
    line = json.dumps(entry)
    with progress.open("a", encoding="utf-8") as file:
        file.write(f"\n{line}\n")  # a process that was killed may have left half a line
    if fsync:
        sync(progress)


@dataclass(frozen=True, kw_only=True)
class _Progress:
    """What the processes have noted."""

    plan: Mapping[str, Any] = field(default_factory=dict)
    noted: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # checksums by part


def _read_progress(growing: Path) -> _Progress:
    """Return what is noted; process 0's file, the first to go in the end, is read last: with its plan all others are whole."""
    plan, noted = {}, {}
    for path in sorted(growing.glob(_PROGRESS.format("*")), reverse=True):
        try:
            lines = path.read_bytes().split(b"\n")
        except FileNotFoundError:  # process 0 begins anew, or ends
            continue
        for line in lines:
            try:
                entry = dict(json.loads(line))
            except (ValueError, TypeError):  # empty, or half of one
                continue
            if "part" in entry:
                noted[str(entry["part"])] = entry["tensors"]
            else:
                plan = entry
    return _Progress(plan=plan, noted=noted)


def _finish(conversion: Conversion, output: Path, growing: Path, progress: _Progress) -> None:
    """Write the report, and give all of it its name."""
    tensors: dict[str, Any] = {}
    for part in conversion.parts:
        tensors |= progress.noted[part.name]
    report = {**conversion.facts, **progress.plan}
    report |= {"files": {part.name: part.num_bytes for part in conversion.parts}, "tensors": tensors}
    text, own = json.dumps(report, indent=1) + "\n", growing / _PROGRESS.format(0)
    fsync = bool(progress.plan["fsync"])
    if fsync:
        (growing / REPORT).write_text(text, encoding="utf-8")
        for noted in (own, *growing.glob(_PROGRESS.format("*"))):
            noted.unlink(missing_ok=True)
    else:
        # Over the progress: ext4 takes up to half a second to remove a file while much waits to be written.
        with own.open("r+", encoding="utf-8") as file:
            file.write(text)
            file.truncate()
        own.rename(growing / REPORT)
    publish(growing, output, fsync=fsync)


def _wait(is_done: Callable[[], bool], growing: Path, what: str) -> None:
    """Return when `is_done`; raises CheckpointError when nobody has written anything for STALL_S."""
    newest, since = 0, time.monotonic()
    while not is_done():
        time.sleep(POLL_S)
        changed = max(map(_changed_ns, growing.rglob(f"*{_PARTIAL}")), default=0)
        if changed != newest:
            newest, since = changed, time.monotonic()
        if time.monotonic() - since > STALL_S:
            raise CheckpointError(
                f"Nothing was written into {growing} for {STALL_S:.0f} s while waiting for {what}. A process is gone; run "
                "the same command again, it goes on where it stopped."
            )


def _changed_ns(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:  # it has got its name
        return 0


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}
