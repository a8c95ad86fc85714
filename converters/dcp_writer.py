"""Lay the parameters of a whole model into the files of a torch_dist checkpoint: what is copied where, and what .metadata says."""

from collections import defaultdict
from collections.abc import Mapping

from megaswift.converters.computed import Unpacked
from megaswift.converters.conversion import Part, Stretch
from megaswift.converters.copying import Copy, Literal, Span
from megaswift.converters.dcp_items import empty_object, wrap
from megaswift.converters.dcp_metadata import StoredChunk, StoredItem, StoredTensor
from megaswift.converters.dcp_names import Address, extra_states
from megaswift.converters.plan import Parameter, Piece
from megaswift.converters.quantised import files_of
from megaswift.converters.tensor_files import DTYPE_BYTES, TensorInfo
from megaswift.errors import WeightsError


class DcpWriter:
    """Lays parameters end to end into .distcp files."""

    def __init__(self, max_bytes: int, *, folder: str) -> None:
        self._max_bytes = max_bytes
        self._folder = folder
        self._files: list[list[Stretch]] = []
        self._ends: list[int] = []
        self._chunks: dict[str, list[StoredChunk]] = defaultdict(list)
        self._kinds: dict[str, tuple[str, tuple[int, ...]]] = {}
        self._found: list[Address] = []
        self._seen: set[str] = set()
        self._object = empty_object()

    def add(
        self,
        parameter: Parameter,
        where: list[Address],
        tensors: Mapping[str, TensorInfo],
        *,
        dtype: str | None,
    ) -> None:
        """Append one parameter; further places name the same bytes. Without `dtype` it keeps that of its tensors."""
        infos = [tensors[tensor] for tensor in parameter.tensors]
        kept = {info.dtype for info in infos}
        if dtype is None and len(kept) > 1:
            raise WeightsError(
                f"{', '.join(parameter.tensors)} have the dtypes {sorted(kept)} and are one tensor in Megatron. Give --torch_dtype."
            )
        dtype = dtype or kept.pop()
        ones = tuple(1 for _ in where[0].offsets)
        sizes = (*ones, *parameter.shape)
        wrapping = wrap(dtype, sizes)
        data_bytes = parameter.elements * DTYPE_BYTES[dtype]
        begin = self._room(len(wrapping.before) + data_bytes + len(wrapping.after))
        at = begin + len(wrapping.before)
        spans: tuple[Span, ...] = (
            Literal(at=begin, data=wrapping.before),
            *(into_parameter(piece, tensors[piece.tensor], at, dtype) for piece in parameter.pieces),
            Literal(at=at + data_bytes, data=wrapping.after),
        )
        end = at + data_bytes + len(wrapping.after)
        self._ends[-1] = end
        new = [info for info in infos if info.name not in self._seen]  # experts share a packed one
        self._seen |= {info.name for info in new}
        summed = tuple(part for info in new for part in files_of(info))
        self._files[-1].append(Stretch(spans=spans, summed=summed))
        item = StoredItem(file=self._name(len(self._files) - 1), begin=begin, length=end - begin)
        for address in where:
            zeros = tuple(0 for _ in parameter.shape)
            self._chunks[address.key].append(
                StoredChunk(offsets=(*address.offsets, *zeros), sizes=sizes, item=item)
            )
            self._kinds[address.key] = (dtype, (*address.counts, *parameter.shape))
        self._found += where

    def _room(self, num_bytes: int) -> int:
        """Return where in the last file the next `num_bytes` go, beginning a new file where the last one is full."""
        if not self._files or self._ends[-1] + num_bytes > self._max_bytes:
            self._files.append([])
            self._ends.append(0)
            if len(self._files) == 1:  # the one object that all extra states are
                whole = Literal(at=0, data=self._object)
                self._files[0].append(Stretch(spans=(whole,), summed=()))
                self._ends[0] = len(self._object)
        return self._ends[-1]

    @staticmethod
    def _name(number: int) -> str:
        return f"__{number}_0.distcp"

    def parts(self) -> tuple[Part, ...]:
        """Return the files."""
        return tuple(
            Part(name=f"{self._folder}/{self._name(number)}", num_bytes=end, stretches=tuple(stretches))
            for number, (stretches, end) in enumerate(zip(self._files, self._ends, strict=True))
        )

    @property
    def tensors(self) -> dict[str, StoredTensor]:
        """Return what .metadata says about the tensors."""
        return {
            key: StoredTensor(dtype=dtype, shape=shape, chunks=tuple(self._chunks[key]))
            for key, (dtype, shape) in self._kinds.items()
        }

    @property
    def objects(self) -> dict[str, StoredItem]:
        """Return what .metadata says about the extra states, which are all the same."""
        item = StoredItem(file=self._name(0), begin=0, length=len(self._object))
        return dict.fromkeys(extra_states(self._found), item)


def into_parameter(piece: Piece, info: TensorInfo, at: int, dtype: str) -> Copy | Unpacked:
    """Return what fills a whole parameter, whose bytes begin at `at`, with rows of one tensor."""
    if info.packed is not None or piece.slab is not None:
        return Unpacked(at=at, piece=piece, info=info, dtype=dtype)
    assert piece.rows.is_contiguous and piece.cols == (0, info.cols), (
        f"{piece.tensor}: one rank holds whole rows"
    )
    row, new_row = info.cols * info.item_bytes, info.cols * DTYPE_BYTES[dtype]
    return Copy(
        at=at + piece.into.start * new_row,
        pitch=piece.into.pitch * new_row,
        source=info.file,
        source_at=info.begin + piece.rows.start * row,
        source_pitch=piece.into.width * row,
        run_bytes=piece.into.width * row,
        runs=piece.into.runs,
        cast=None if dtype == info.dtype else (info.dtype, dtype),
    )
