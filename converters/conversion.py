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
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from megaswift.converters.copying import Literal, Span, write_file
from megaswift.converters.folders import check_output, check_space, growing_name, publish, sync
from megaswift.converters.tensor_files import TensorInfo
from megaswift.errors import CheckpointError
from megaswift.logs import get_logger

logger = get_logger(__name__)

REPORT = "conversion.json"
_PLAN = "plan.json"
_SUMS = ".sums"
POLL_S = 0.1
THREADS = max(2, os.cpu_count() or 1)  # beside the one that writes; one of them may wait for the disk
CHECKSUM_BYTES = 1 << 19
STALL_S = 600.0  # without a byte written by anyone; the slowest parts take some minutes on a busy file system


@dataclass(frozen=True, kw_only=True)
class Summed:
    """A tensor of the Hugging Face side whose checksum the writer of a part takes."""

    info: TensorInfo  # with a relative file: a tensor of this very part
    after: int = 0  # spans of the part, which have to be written before


@dataclass(frozen=True, kw_only=True)
class Part:
    """One large file of the output."""

    name: str  # below the output folder
    num_bytes: int
    spans: tuple[Span, ...]
    summed: tuple[Summed, ...]  # in the order of `after`


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """Everything that is known before the first byte is written."""

    parts: tuple[Part, ...]
    facts: Mapping[str, Any]  # for the report; equal facts, parts and sources mean an equal output
    finish: Callable[[Path], object]  # adds the small files to the growing folder

    def fingerprint(self) -> int:
        """Return a number that changes with the plan and with every source file."""
        sources = sorted(
            {
                source
                for part in self.parts
                for span in part.spans
                if not isinstance(span, Literal)
                for source in span.sources
            }
        )
        stats = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in sources]
        text = repr(
            (dict(self.facts), [(part.name, part.num_bytes, part.spans) for part in self.parts], stats)
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
    if _read_json(output / REPORT).get("fingerprint") == fingerprint:
        logger.info("%s is complete already", output)
        return output
    try:
        if rank == 0:
            _prepare(conversion, output, growing, source, fingerprint)
        _wait(
            lambda: _read_json(growing / _PLAN).get("fingerprint") == fingerprint,
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
    missing = [part for part in conversion.parts if not (growing / part.name).exists()]
    check_space(growing, sum(part.num_bytes for part in missing))
    if len(missing) < len(conversion.parts):
        logger.info(
            "going on: %d of %d parts are there", len(conversion.parts) - len(missing), len(conversion.parts)
        )
    for folder in {(growing / part.name).parent for part in conversion.parts}:
        folder.mkdir(parents=True, exist_ok=True)
    _write_json(growing / _PLAN, {"fingerprint": fingerprint})


def _write_parts(parts: tuple[Part, ...], growing: Path) -> None:
    """Write those parts that are not there; meanwhile threads take checksums and bring what is written to the disk."""
    with ThreadPoolExecutor(THREADS) as pool:
        sealing: list[Future[None]] = []
        for part in parts:
            path = growing / part.name
            if not path.exists():
                partial = path.with_name(path.name + ".partial")
                sums: dict[str, Future[str]] = {}
                write_file(partial, num_bytes=part.num_bytes, spans=_summing(part, partial, pool, sums))
                synced = pool.submit(sync, partial)
                # The pool takes work in this order, so that a task which waits for earlier ones blocks nothing.
                sealing.append(pool.submit(_seal, part, synced, sums, path))
        for one in sealing:
            one.result()


def _summing(
    part: Part, partial: Path, pool: ThreadPoolExecutor, sums: dict[str, Future[str]]
) -> Iterator[Span]:
    """Yield the spans of a part to its writer; when it asks for the next one, the checksums that can be taken are begun.

    The disk, too, begins before the whole part is written.
    """
    waiting, synced = deque(part.summed), None
    for done in range(len(part.spans) + 1):
        if done and (synced is None or synced.done()):
            synced = pool.submit(sync, partial)
        while waiting and waiting[0].after <= done:
            info = waiting.popleft().info
            sums[info.name] = pool.submit(_checksum, info.file if info.file.is_absolute() else partial, info)
        if done < len(part.spans):
            yield part.spans[done]


def _seal(part: Part, synced: Future[None], sums: Mapping[str, Future[str]], path: Path) -> None:
    """Note the checksums of a part, and give it its name."""
    synced.result()
    noted = {
        info.name: {"dtype": info.dtype, "shape": list(info.shape), "bytes": info.num_bytes, "xxh3_128": sums[info.name].result()}
        for info in (one.info for one in part.summed)
    }  # fmt: skip
    _write_json(path.with_name(path.name + _SUMS), noted)
    path.with_name(path.name + ".partial").rename(path)


def _checksum(path: Path, info: TensorInfo) -> str:
    """Return the XXH3 of a tensor's bytes, 128 bits as hexadecimal digits: ten times as fast as a CRC without instructions for it."""
    digest, left = xxhash.xxh3_128(), info.num_bytes
    buffer = memoryview(bytearray(CHECKSUM_BYTES))  # one for all reads, and small enough for the processor's cache
    with path.open("rb", buffering=0) as file:
        file.seek(info.begin)
        while left and (count := file.readinto(buffer[:left])):
            digest.update(buffer[:count])
            left -= count
    return digest.hexdigest()


def _finish(conversion: Conversion, output: Path, growing: Path, fingerprint: int) -> None:
    tensors: dict[str, Any] = {}
    for part in conversion.parts:
        path = growing / part.name
        tensors |= _read_json(path.with_name(path.name + _SUMS))
    conversion.finish(growing)
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
