"""How a checkpoint is cut into safetensors files: every rank computes the same names, headers and offsets."""

import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megaswift.converters.tensor_files import DTYPE_BYTES, SINGLE_FILE, TensorInfo, encode_header
from megaswift.errors import ConfigError

_POWERS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}


@dataclass(frozen=True, kw_only=True)
class OutputFile:
    """A file that is to be written: its first bytes and where each tensor goes."""

    path: Path
    header: bytes
    tensors: tuple[TensorInfo, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of the whole file."""
        return len(self.header) + sum(info.num_bytes for info in self.tensors)


def parse_size(text: str) -> int:
    """Return the bytes that "5GB" (powers of 1000) or "5GiB" (powers of 1024) means; raises ConfigError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([KMGT])(I?)B)?", text.strip().upper())
    if not match or float(match[1]) <= 0:
        raise ConfigError(
            f"max_shard_size={text} is not a size. Write a number and a unit, such as 5GB or 500MiB."
        )
    number, power, binary = match.groups()
    return int(float(number) * (1024 if binary else 1000) ** _POWERS[power or ""])


def plan_files(
    tensors: Iterable[TensorInfo], folder: Path, *, max_bytes: int, single: str = SINGLE_FILE
) -> list[OutputFile]:
    """Return the files that hold `tensors` in this order, each at most `max_bytes` of tensors unless one is larger.

    Of a TensorInfo only name, dtype and shape count here. One file is called `single`, several as transformers calls them.
    """
    groups: list[list[TensorInfo]] = [[]]
    filled = 0
    for info in tensors:
        if groups[-1] and filled + info.num_bytes > max_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(info)
        filled += info.num_bytes
    if len(groups) == 1:
        return [_output_file(folder / single, groups[0])]
    stem = single.removesuffix(".safetensors")
    return [
        _output_file(folder / f"{stem}-{number:05d}-of-{len(groups):05d}.safetensors", group)
        for number, group in enumerate(groups, start=1)
    ]


def _output_file(path: Path, tensors: Sequence[TensorInfo]) -> OutputFile:
    # Wide elements first, so that every tensor begins on a multiple of its element size; sorted() keeps the order else.
    ordered = sorted(tensors, key=lambda info: -DTYPE_BYTES[info.dtype])
    header, begins = encode_header((info.name, info.dtype, info.shape) for info in ordered)
    placed = [
        TensorInfo(name=info.name, dtype=info.dtype, shape=info.shape, file=path, begin=begins[info.name])
        for info in ordered
    ]
    return OutputFile(path=path, header=header, tensors=tuple(placed))


def index_json(files: Sequence[OutputFile]) -> str:
    """Return the text of model.safetensors.index.json."""
    placed = [info for file in files for info in file.tensors]
    return json.dumps(
        {
            "metadata": {"total_size": sum(info.num_bytes for info in placed)},
            "weight_map": {info.name: info.file.name for info in sorted(placed, key=lambda info: info.name)},
        },
        indent=2,
    )


def create(file: OutputFile) -> None:
    """Make the file in its full size with its header; the tensors' bytes are zero until they are written."""
    with file.path.open("wb") as opened:
        opened.write(file.header)
        opened.truncate(file.num_bytes)


def write_at(descriptor: int, data: memoryview, offset: int) -> None:
    """Write all bytes of `data` at `offset`; one pwrite may take fewer than it is given."""
    while data:
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written


class RowWriter:
    """Writes rows of tensors into files that exist already; several processes may do so at once."""

    def __init__(self, files: Sequence[OutputFile]) -> None:
        self.bytes_written = 0
        self._slots = {info.name: info for file in files for info in file.tensors}
        self._descriptors: dict[Path, int] = {}

    def slot(self, name: str) -> TensorInfo:
        """Return where a tensor goes."""
        return self._slots[name]

    def write(self, name: str, rows: memoryview, *, first_row: int) -> None:
        """Write the bytes of whole rows of the tensor `name` from row `first_row` on; raises OSError."""
        slot = self._slots[name]
        if slot.file not in self._descriptors:
            self._descriptors[slot.file] = os.open(slot.file, os.O_WRONLY)
        write_at(self._descriptors[slot.file], rows, slot.begin + first_row * slot.cols * slot.item_bytes)
        self.bytes_written += len(rows)

    def close(self) -> None:
        """Wait until everything is on the disk; raises OSError."""
        while self._descriptors:
            _, descriptor = self._descriptors.popitem()
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
