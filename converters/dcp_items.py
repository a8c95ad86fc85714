"""One tensor as torch.distributed.checkpoint stores it: what torch.save writes, a zip archive around the raw bytes. No torch.

Zip: PKWARE APPNOTE 6.3.10, sections 4.3 and 4.5.3 (zip64). The archive holds data.pkl (protocol 2, what torch.save
pickles for a dense tensor), byteorder, version and data/0. The checksum of data/0 is left 0, as torch.save does under
set_crc32_options(False); torch.load does not check it. So the bytes around the data follow from dtype and shape alone.
"""

import math
import pickle
import struct
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

from megaswift.converters.tensor_files import DTYPE_BYTES
from megaswift.errors import CheckpointError

STORAGES = {"BF16": "BFloat16Storage", "F16": "HalfStorage", "F32": "FloatStorage"}

_DOS_EPOCH = 0x21  # 1 January 1980, the zero of zip's dates
_MAX_32 = 0xFFFFFFFF


@dataclass(frozen=True, kw_only=True)
class Wrapping:
    """The bytes before and after a tensor's own."""

    before: bytes
    after: bytes


def wrap(dtype: str, shape: Sequence[int]) -> Wrapping:
    """Return what lies around the bytes of a contiguous tensor of a header's dtype, e.g. "BF16"."""
    data_bytes = math.prod(shape) * DTYPE_BYTES[dtype]
    before, directory = _small_records(_tensor_pickle(dtype, shape))
    data = _Record(name="archive/data/0", size=data_bytes, crc=0, offset=len(before))
    before += data.local_header()
    directory += data.directory_entry()
    return Wrapping(
        before=before, after=directory + _end_of_directory(4, directory, offset=len(before) + data_bytes)
    )


def saved_object(value: object) -> bytes:
    """Return what torch.save writes for plain Python data."""
    records, directory = _small_records(pickle.dumps(value, protocol=2))
    return records + directory + _end_of_directory(3, directory, offset=len(records))


def empty_object() -> bytes:
    """Return what Megatron saves as the extra state of a module that has none."""
    return saved_object([None])


def _small_records(pickled: bytes) -> tuple[bytes, bytes]:
    """Return the records that every archive begins with, and their directory."""
    records, directory = b"", b""
    for name, content in (("data.pkl", pickled), ("byteorder", b"little"), ("version", b"3\n")):
        record = _Record(
            name=f"archive/{name}", size=len(content), crc=zlib.crc32(content), offset=len(records)
        )
        records += record.local_header() + content
        directory += record.directory_entry()
    return records, directory


@dataclass(frozen=True, kw_only=True)
class _Record:
    """One stored file of an archive; only the last one, whose own offset is small, may be larger than 4 GiB."""

    name: str
    size: int
    crc: int
    offset: int

    def local_header(self) -> bytes:
        return b"PK\x03\x04" + self._common() + self.name.encode() + self._extra()

    def directory_entry(self) -> bytes:
        place = struct.pack("<HHHII", 0, 0, 0, 0, self.offset)
        return (
            b"PK\x01\x02"
            + struct.pack("<H", 45)
            + self._common()
            + place
            + self.name.encode()
            + self._extra()
        )

    def _common(self) -> bytes:
        size = min(self.size, _MAX_32)
        lengths = len(self.name), len(self._extra())
        return struct.pack("<HHHHHIIIHH", 45, 0, 0, 0, _DOS_EPOCH, self.crc, size, size, *lengths)

    def _extra(self) -> bytes:
        return struct.pack("<HHQQ", 1, 16, self.size, self.size) if self.size >= _MAX_32 else b""


def _end_of_directory(records: int, directory: bytes, *, offset: int) -> bytes:
    """Return the end of the archive; in its zip64 form where the directory begins beyond 4 GiB."""
    size = len(directory)
    end = b"PK\x05\x06" + struct.pack("<HHHHIIH", 0, 0, records, records, size, min(offset, _MAX_32), 0)
    if offset < _MAX_32:
        return end
    wide = b"PK\x06\x06" + struct.pack("<QHHIIQQQQ", 44, 45, 45, 0, 0, records, records, size, offset)
    locator = b"PK\x06\x07" + struct.pack("<IQI", 0, offset + size, 1)
    return wide + locator + end


def _tensor_pickle(dtype: str, shape: Sequence[int]) -> bytes:
    """Return the pickle of torch._utils._rebuild_tensor_v2(storage 0, offset 0, shape, strides, requires_grad False, hooks {})."""
    strides = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
    storage = (
        b"(" + _text("storage") + f"ctorch\n{STORAGES[dtype]}\n".encode() + _text("0") + _text("cpu")
        + _number(math.prod(shape)) + b"tQ"
    )  # fmt: skip
    return (
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(" + storage + _number(0) + _numbers(shape) + _numbers(strides)
        + b"\x89ccollections\nOrderedDict\n)RtR."
    )  # fmt: skip


def _text(text: str) -> bytes:
    return b"X" + struct.pack("<I", len(text)) + text.encode()


def _number(number: int) -> bytes:
    return b"\x8a\x08" + struct.pack("<q", number)


def _numbers(numbers: Sequence[int]) -> bytes:
    return b"(" + b"".join(map(_number, numbers)) + b"t"


def find_data(path: Path, *, offset: int, length: int, num_bytes: int) -> int:
    """Return where in the file the raw bytes of a stored tensor begin; raises CheckpointError unless they are `num_bytes`."""
    try:
        with (
            path.open("rb") as file,
            zipfile.ZipFile(cast(BinaryIO, _Window(file, offset, length))) as archive,
        ):
            (record,) = (one for one in archive.infolist() if one.filename.endswith("/data/0"))
            file.seek(offset + record.header_offset)
            header = file.read(30)
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise CheckpointError(
            f"{path} holds no tensor at byte {offset}: {error}. Copy the checkpoint again."
        ) from None
    name_bytes, extra_bytes = struct.unpack("<HH", header[26:30])
    if record.compress_type != zipfile.ZIP_STORED or record.file_size != num_bytes:
        raise CheckpointError(
            f"{path} holds {record.file_size} bytes at byte {offset} where {num_bytes} were due. Copy the checkpoint again."
        )
    return offset + record.header_offset + 30 + int(name_bytes) + int(extra_bytes)


class _Window:
    """Part of an open file that zipfile takes for a file of its own."""

    def __init__(self, file: BinaryIO, offset: int, length: int) -> None:
        self._file, self._offset, self._length, self._position = file, offset, length, 0

    def seek(self, position: int, whence: int = 0) -> int:
        self._position = position + (0, self._position, self._length)[whence]
        if not 0 <= self._position <= self._length:
            raise ValueError("a seek beyond its end")
        return self._position

    def tell(self) -> int:
        return self._position

    def seekable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        left = self._length - self._position
        self._file.seek(self._offset + self._position)
        data = self._file.read(left if size < 0 else min(size, left))
        self._position += len(data)
        return data
