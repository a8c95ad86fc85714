"""Find the boxes of a torch_dist checkpoint that a tensor of a file is made of, whatever layout wrote it."""

from collections.abc import Iterator
from math import prod
from pathlib import Path

from megaswift.converters.copying import Copy
from megaswift.converters.dcp_items import STORAGES, find_data
from megaswift.converters.dcp_metadata import StoredItem, StoredTensor
from megaswift.converters.dcp_names import Address
from megaswift.converters.plan import Parameter, Piece
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


def check_shape(parameter: Parameter, address: Address, tensor: StoredTensor) -> None:
    expected = (*address.counts, *parameter.shape)
    fits = tensor.shape == expected
    if parameter.is_paddable and len(tensor.shape) == len(expected):
        fits = all(found >= size for found, size in zip(tensor.shape, expected, strict=True))
    if not fits or tensor.dtype not in STORAGES:
        raise CheckpointError(
            f"{address.key} is {list(tensor.shape)} of {tensor.dtype} in the checkpoint, and {list(expected)} by config.json. "
            "They do not belong together."
        )


def copies_from(
    info: TensorInfo, piece: Piece, address: Address, tensor: StoredTensor, finder: DataFinder
) -> Iterator[Copy]:
    """Yield the copies that fill one tensor of the file, or rows of it, from the boxes of a stored parameter."""
    itemsize, new_itemsize = DTYPE_BYTES[tensor.dtype], info.item_bytes
    lead = len(address.offsets)
    copied = 0
    for chunk in tensor.chunks:
        if chunk.offsets[:lead] != address.offsets:
            continue
        first_row, rows = chunk.offsets[lead], chunk.sizes[lead]
        inner = prod(chunk.sizes[lead + 2 :])  # dimensions that are never cut: they count as columns
        first_col, cols = (
            (chunk.offsets[lead + 1] * inner, chunk.sizes[lead + 1] * inner)
            if len(chunk.sizes) > lead + 1
            else (0, 1)
        )
        wanted_cols = min(first_col + cols, info.cols) - first_col
        if wanted_cols <= 0:
            continue  # padded heads
        data = finder.begin(chunk.item, num_bytes=rows * cols * itemsize)
        file_row = piece.rows.start
        for begin, end in piece.into.intervals():
            low, high = max(begin, first_row), min(end, first_row + rows)
            if low < high:
                copied += (high - low) * wanted_cols
                yield Copy(
                    at=info.begin + ((file_row + low - begin) * info.cols + first_col) * new_itemsize,
                    pitch=info.cols * new_itemsize,
                    source=finder.checkpoint / chunk.item.file,
                    source_at=data + (low - first_row) * cols * itemsize,
                    source_pitch=cols * itemsize,
                    run_bytes=wanted_cols * itemsize,
                    runs=high - low,
                    cast=None if tensor.dtype == info.dtype else (tensor.dtype, info.dtype),
                )
            file_row += end - begin
    if copied != piece.size:
        raise CheckpointError(
            f"{address.key} lacks {piece.size - copied} of the {piece.size} elements of {info.name}. The checkpoint is incomplete."
        )
