"""Bytes copied from files into a file, and the checksums taken as they pass by."""

import ctypes
import errno
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import xxhash

from megaswift.converters import copying, mapped_file
from megaswift.converters.copying import Checksum, Copy, Literal, SpanWriter
from megaswift.converters.mapped_file import MappedFile
from megaswift.errors import CheckpointError


@pytest.mark.parametrize(
    ("runs", "run_bytes", "pitch", "source_pitch"),
    [
        (1, 5000, 5000, 5000),
        (7, 300, 300, 300),
        (7, 300, 500, 300),
        (7, 300, 300, 700),
        (5, 90_000, 100_000, 95_000),
        (0, 8, 8, 8),
    ],
)
def test_copies_land_where_they_should(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    runs: int,
    run_bytes: int,
    pitch: int,
    source_pitch: int,
) -> None:
    monkeypatch.setattr(copying, "BUFFER_BYTES", 1024)
    source = np.random.default_rng(0).integers(0, 256, 600_000, dtype=np.uint8)
    source.tofile(tmp_path / "source")
    expected = np.zeros(600_000, np.uint8)
    for run in range(runs):
        at, source_at = 11 + run * pitch, 17 + run * source_pitch
        expected[at : at + run_bytes] = source[source_at : source_at + run_bytes]
    expected[:5] = list(b"start")
    copy = Copy(
        at=11,
        pitch=pitch,
        source=tmp_path / "source",
        source_at=17,
        source_pitch=source_pitch,
        run_bytes=run_bytes,
        runs=runs,
    )
    ranges = [(side, begin, num) for side in ("source", "target") for begin, num in ((17, 1500), (11, 4000))]
    sums = [Checksum(tmp_path / side, begin, num) for side, begin, num in ranges]
    with SpanWriter(tmp_path / "target", 600_000) as writer:
        writer.write([Literal(at=0, data=b"start"), copy], sums)
    assert np.array_equal(np.fromfile(tmp_path / "target", np.uint8), expected)
    for one, (side, begin, num) in zip(sums, ranges, strict=True):
        data = (source if side == "source" else expected)[begin : begin + num]
        assert one.hexdigest() == xxhash.xxh3_128_hexdigest(data.tobytes())


def test_a_checksum_whose_bytes_pass_by_in_order_reads_nothing_again(tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(bytes(range(250)) * 4)
    copy = Copy(
        at=0, pitch=500, source=tmp_path / "source", source_at=0, source_pitch=500, run_bytes=500, runs=2
    )
    sums = [Checksum(tmp_path / "source", 0, 300), Checksum(tmp_path / "source", 300, 700)]
    with SpanWriter(tmp_path / "target", 1000) as writer:
        writer.write([copy], sums)
    (tmp_path / "source").unlink()
    assert [one.hexdigest() for one in sums] == [
        xxhash.xxh3_128_hexdigest((bytes(range(250)) * 4)[part]) for part in (slice(300), slice(300, None))
    ]


def test_source_that_ends_early_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(b"short")
    copy = Copy(at=0, pitch=9, source=tmp_path / "source", source_at=0, source_pitch=9, run_bytes=9, runs=1)
    with pytest.raises(CheckpointError, match="ends at byte 5"), SpanWriter(tmp_path / "target", 9) as writer:
        writer.write([copy])


def test_source_that_is_cut_off_meanwhile_is_an_error(tmp_path: Path) -> None:
    """Reading what a mapping holds no more would end the process."""
    source = tmp_path / "source"
    source.write_bytes(bytes(100_000))
    mapped = MappedFile(source)
    assert len(mapped.read(0, 100_000)) == 100_000
    os.truncate(source, 10)
    with pytest.raises(CheckpointError, match=r"cannot be read at byte 50000.*cut off"):
        mapped.read(50_000, 50_000)


def test_older_kernels_read_without_the_mapping(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They refuse to bring pages in, and a mere access to a page that is gone would end the process."""

    def refuse(*_: object) -> int:
        ctypes.set_errno(errno.EINVAL)
        return -1

    source = tmp_path / "source"
    source.write_bytes(bytes(range(250)) * 400)
    mapped = MappedFile(source)
    monkeypatch.setattr(mapped_file, "_libc", SimpleNamespace(madvise=refuse))
    assert mapped.read(50_001, 9) == bytes(range(1, 10))
    os.truncate(source, 10)
    with pytest.raises(CheckpointError, match=r"cannot be read at byte 50000.*cut off"):
        mapped.read(50_000, 50_000)


def test_mapping_lets_go_of_what_it_has_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapped_file, "MAPPED_BYTES", 1 << 20)
    source = np.random.default_rng(0).integers(0, 256, 64 << 20, dtype=np.uint8)
    source.tofile(tmp_path / "source")
    mapped, before = MappedFile(tmp_path / "source"), file_bytes()
    for at in range(0, len(source), 1 << 18):
        assert bytes(mapped.read(at, 1 << 18)) == source[at : at + (1 << 18)].tobytes()
    assert file_bytes() - before < 16 << 20


def file_bytes() -> int:
    """Return how much of this process's memory is of files."""
    (line,) = [one for one in Path("/proc/self/status").read_text().splitlines() if one.startswith("RssFile")]
    return int(line.split()[1]) << 10
