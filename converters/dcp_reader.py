"""Find the boxes of a torch_dist checkpoint that a tensor of a file is made of, whatever layout wrote it."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

from megaswift.converters.copying import Copy
from megaswift.converters.dcp_items import find_data
from megaswift.converters.dcp_metadata import StoredItem
from megaswift.converters.dcp_model import StoredParameter
from megaswift.converters.plan import Piece
from megaswift.converters.tensor_files import DTYPE_BYTES, TensorInfo
from megaswift.errors import CheckpointError


class DataFinder:
    """Finds where the raw bytes of stored chunks begin, once each."""

    def __init__(self, checkpoint: Path) -> None:
        self.checkpoint = checkpoint
        self._begins: dict[StoredItem, int] = {}

    def begin(self, item: StoredItem, *, num_bytes: int) -> int:
        """Return the first byte of the chunk's elements in its file."""
        if item not in self._begins:
            path = self.checkpoint / item.file
            self._begins[item] = find_data(path, offset=item.begin, length=item.length, num_bytes=num_bytes)
        return self._begins[item]


@dataclass(frozen=True, slots=True, kw_only=True)
class Box:
    """Rows and columns of a parameter that lie together in a file; dims after the second are never cut and count as columns."""

    first_row: int
    rows: int
    first_col: int
    cols: int
    item: StoredItem


def boxes_of(stored: StoredParameter) -> Iterator[Box]:
    """Yield the boxes of a parameter."""
    lead = len(stored.address.offsets)
    for chunk in stored.tensor.chunks:
        if chunk.offsets[:lead] != stored.address.offsets:
            continue
        inner = prod(chunk.sizes[lead + 2 :])
        first_col, cols = (
            (chunk.offsets[lead + 1] * inner, chunk.sizes[lead + 1] * inner)
            if len(chunk.sizes) > lead + 1
            else (0, 1)
        )
        first_row, rows = chunk.offsets[lead], chunk.sizes[lead]
        yield Box(first_row=first_row, rows=rows, first_col=first_col, cols=cols, item=chunk.item)


def copies_from(
    info: TensorInfo, piece: Piece, stored: StoredParameter, finder: DataFinder
) -> Iterator[Copy]:
    """Yield the copies that fill one tensor of the file, or rows of it, from the boxes of a stored parameter."""
    dtype = stored.tensor.dtype
    itemsize, new_itemsize = DTYPE_BYTES[dtype], info.item_bytes
    copied = 0
    for box in boxes_of(stored):
        wanted_cols = min(box.first_col + box.cols, info.cols) - box.first_col
        if wanted_cols <= 0:
            continue  # padded heads
        data = finder.begin(box.item, num_bytes=box.rows * box.cols * itemsize)
        file_row = piece.rows.start
        for begin, end in piece.into.intervals():
            low, high = max(begin, box.first_row), min(end, box.first_row + box.rows)
            if low < high:
                copied += (high - low) * wanted_cols
                yield Copy(
                    at=info.begin + ((file_row + low - begin) * info.cols + box.first_col) * new_itemsize,
                    pitch=info.cols * new_itemsize,
                    source=finder.checkpoint / box.item.file,
                    source_at=data + (low - box.first_row) * box.cols * itemsize,
                    source_pitch=box.cols * itemsize,
                    run_bytes=wanted_cols * itemsize,
                    runs=high - low,
                    cast=None if dtype == info.dtype else (dtype, info.dtype),
                )
            file_row += end - begin
    if copied != piece.size:
        raise incomplete(stored, piece, copied)


def incomplete(stored: StoredParameter, piece: Piece, found: int) -> CheckpointError:
    """Return the error of a parameter whose boxes hold only `found` elements of a piece."""
    return CheckpointError(
        f"{stored.address.key} lacks {piece.size - found} of the {piece.size} elements of {piece.tensor}. "
        "The checkpoint is incomplete."
    )
