"""Plan a conversion between a Hugging Face folder and a torch_dist checkpoint: which bytes go where, no model, no GPU.

Both directions walk the plan of one rank that holds the whole model: its parameters are the tensors of a torch_dist
checkpoint, however many ranks wrote it. So a conversion is a list of byte ranges to be copied.
"""

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from megaswift.converters.certificate import certify
from megaswift.converters.check import check_files
from megaswift.converters.conversion import Conversion, Part
from megaswift.converters.copying import Copy, Literal
from megaswift.converters.dcp_items import STORAGES, empty_object, find_data, wrap
from megaswift.converters.dcp_metadata import FILE as METADATA
from megaswift.converters.dcp_metadata import (
    StoredChunk,
    StoredItem,
    StoredTensor,
    read_metadata,
    write_metadata,
)
from megaswift.converters.dcp_names import Address, addresses, extra_states, find, stacks_layers
from megaswift.converters.model_files import config_json, copy_model_files
from megaswift.converters.plan import (
    EMBEDDING,
    TIED_OUTPUT,
    Parameter,
    Piece,
    file_tensors,
    float32_tensors,
    plan_chunk,
)
from megaswift.converters.shards import index_json, plan_files
from megaswift.converters.tensor_files import DTYPE_BYTES, DTYPE_NAMES, INDEX_FILE, TensorInfo, read_folder
from megaswift.errors import CheckpointError, ModelError, WeightsError
from megaswift.metadata.meta import ModelMeta
from megaswift.parallel.layout import Layout, coordinates, padded_vocab_size

RELEASE = "release"  # the folder in which Megatron-LM looks for weights without a training state
TRACKER = "latest_checkpointed_iteration.txt"
MODEL_FILES = "hf"  # config.json, tokenizer and so on, for the way back


def to_mcore(
    meta: ModelMeta, folder: Path, *, dtype: str | None, vocab_multiple: int, max_bytes: int
) -> Conversion:
    """Plan the way from a Hugging Face folder to a torch_dist checkpoint.

    `dtype` is config.json's name of the new dtype, None to keep the files'. Embedding and output layer get zero rows up to a
    multiple of `vocab_multiple`. Raises WeightsError where the files do not fit config.json.
    """
    folder = folder.absolute()
    tensors = read_folder(folder)
    check_files(meta, tensors)
    writer = _DcpWriter(max_bytes)
    stacked = stacks_layers(meta)
    for parameter in _whole_model(meta):
        if parameter.name in (EMBEDDING, TIED_OUTPUT):
            rows = padded_vocab_size(parameter.shape[0], tp=vocab_multiple)
            parameter = replace(parameter, shape=(rows, *parameter.shape[1:]))
        writer.add(
            parameter,
            addresses(parameter, meta, stacked=stacked),
            tensors,
            dtype=DTYPE_NAMES[dtype] if dtype else None,
        )

    def finish(growing: Path) -> None:
        release = growing / RELEASE
        write_metadata(release / METADATA, writer.tensors, writer.objects)
        backends = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
        backends |= {"common_backend": "torch", "common_backend_version": 1}
        (release / "metadata.json").write_text(json.dumps(backends))
        _write_common(release / "common.pt", stacked=stacked)
        (growing / TRACKER).write_text(RELEASE)
        (growing / MODEL_FILES).mkdir(exist_ok=True)
        copy_model_files(folder, growing / MODEL_FILES)
        (growing / MODEL_FILES / "config.json").write_text(
            config_json(meta, dtype=dtype or meta.dtype), encoding="utf-8"
        )

    return Conversion(parts=writer.parts(), facts=_facts(meta, "hf to mcore"), finish=finish)


def to_hf(meta: ModelMeta, checkpoint: Path, *, dtype: str | None, max_bytes: int) -> Conversion:
    """Plan the way from a torch_dist checkpoint, written under any layout, to a Hugging Face folder.

    `checkpoint` is the folder with .metadata; what it holds beside the model (optimizer, random states) is left out.
    Raises CheckpointError where a parameter is missing or has another shape.
    """
    checkpoint = checkpoint.absolute()
    stored = read_metadata(checkpoint)
    sources: dict[str, list[tuple[Parameter, Piece, Address, StoredTensor]]] = defaultdict(list)
    for parameter in _whole_model(meta):
        address, tensor = find(parameter, meta, stored)
        _check_shape(parameter, address, tensor)
        for piece in parameter.pieces:
            sources[piece.tensor].append((parameter, piece, address, tensor))
    wanted = [
        TensorInfo(
            name=name,
            dtype=DTYPE_NAMES[dtype] if dtype else sources[name][0][3].dtype,
            shape=shape,
            file=Path(),
            begin=0,
        )
        for name, shape in file_tensors(meta).items()
    ]
    files = plan_files(wanted, Path(), max_bytes=max_bytes)  # below the output, wherever that grows
    finder = _DataFinder(checkpoint)
    parts = []
    for file in files:
        spans: list[Literal | Copy] = [Literal(at=0, data=file.header)]
        for info in file.tensors:
            for _, piece, address, tensor in sources[info.name]:
                spans += _from_chunks(info, piece, address, tensor, finder)
        parts.append(
            Part(name=file.path.name, num_bytes=file.num_bytes, spans=tuple(spans), summed=file.tensors)
        )

    def finish(growing: Path) -> None:
        if len(files) > 1:
            (growing / INDEX_FILE).write_text(index_json(files))
        if meta.folder is not None:
            copy_model_files(meta.folder, growing)
        (growing / "config.json").write_text(config_json(meta, dtype=dtype or meta.dtype), encoding="utf-8")

    return Conversion(parts=tuple(parts), facts=_facts(meta, "mcore to hf"), finish=finish)


def find_checkpoint(folder: Path) -> Path:
    """Return the folder with .metadata at or below `folder`, as Megatron-LM and this project lay them out; raises CheckpointError."""
    tracked = [folder / RELEASE]
    if (folder / TRACKER).is_file() and (text := (folder / TRACKER).read_text().strip()).isdigit():
        tracked = [folder / f"iter_{int(text):07d}"]  # checkpointing.py of Megatron-LM, get_checkpoint_name
    for candidate in (folder, *tracked, *sorted(path for path in folder.glob("*") if path.is_dir())):
        if (candidate / METADATA).is_file():
            return candidate
    raise CheckpointError(
        f"{folder} holds no torch_dist checkpoint: no {METADATA} in it. Choose the folder that has one."
    )


def _whole_model(meta: ModelMeta) -> list[Parameter]:
    """Return every parameter; raises ModelError for a model whose tensors are more than byte ranges of its file."""
    parameters = plan_chunk(meta, Layout(), coordinates(Layout(), 0))
    obstacles = {
        "experts packed transposed": any(
            piece.slab is not None for one in parameters for piece in one.pieces
        ),
        "tensors of another dtype": bool(float32_tensors(meta)),
        "latent attention": meta.mla is not None,
        "Gated DeltaNet": meta.linear_attention is not None,
        "multi-token-prediction layers": meta.num_mtp_layers > 0,
    }
    if found := [name for name, is_there in obstacles.items() if is_there]:
        raise ModelError(
            f"{meta.model_type} has {' and '.join(found)}, which convert does not copy. Training reads its folder directly."
        )
    return parameters


def _facts(meta: ModelMeta, direction: str) -> dict[str, Any]:
    return {
        "format": 1,
        "direction": direction,
        "model_type": meta.model_type,
        "certificate": asdict(certify(meta, Layout())),
    }


class _DcpWriter:
    """Lays parameters end to end into .distcp files."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._files: list[list[Literal | Copy]] = []
        self._ends: list[int] = []
        self._summed: list[list[TensorInfo]] = []
        self._chunks: dict[str, list[StoredChunk]] = defaultdict(list)
        self._kinds: dict[str, tuple[str, tuple[int, ...]]] = {}
        self._found: list[Address] = []
        self._object = empty_object()

    def add(
        self,
        parameter: Parameter,
        where: list[Address],
        tensors: Mapping[str, TensorInfo],
        *,
        dtype: str | None,
    ) -> None:
        """Append one parameter; further places name the same bytes."""
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
        spans = self._files[-1]
        spans.append(Literal(at=begin, data=wrapping.before))
        for piece in parameter.pieces:
            spans.append(_into_parameter(piece, tensors[piece.tensor], at, dtype))
        spans.append(Literal(at=at + data_bytes, data=wrapping.after))
        end = at + data_bytes + len(wrapping.after)
        self._ends[-1] = end
        self._summed[-1] += infos
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
            self._summed.append([])
            if len(self._files) == 1:  # the one object that all extra states are
                self._files[0].append(Literal(at=0, data=self._object))
                self._ends[0] = len(self._object)
        return self._ends[-1]

    @staticmethod
    def _name(number: int) -> str:
        return f"__{number}_0.distcp"

    def parts(self) -> tuple[Part, ...]:
        """Return the files."""
        return tuple(
            Part(
                name=f"{RELEASE}/{self._name(number)}",
                num_bytes=end,
                spans=tuple(spans),
                summed=tuple(summed),
            )
            for number, (spans, end, summed) in enumerate(
                zip(self._files, self._ends, self._summed, strict=True)
            )
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


def _into_parameter(piece: Piece, info: TensorInfo, at: int, dtype: str) -> Copy:
    """Return the copy of one tensor's rows into a whole parameter whose bytes begin at `at`."""
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


class _DataFinder:
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


def _check_shape(parameter: Parameter, address: Address, tensor: StoredTensor) -> None:
    expected = (*address.counts, *parameter.shape)
    fits = tensor.shape == expected
    if parameter.is_paddable and len(tensor.shape) == len(expected):
        fits = all(found >= size for found, size in zip(tensor.shape, expected, strict=True))
    if not fits or tensor.dtype not in STORAGES:
        raise CheckpointError(
            f"{address.key} is {list(tensor.shape)} of {tensor.dtype} in the checkpoint, and {list(expected)} by config.json. "
            "They do not belong together."
        )


def _from_chunks(
    info: TensorInfo, piece: Piece, address: Address, tensor: StoredTensor, finder: _DataFinder
) -> Iterator[Copy]:
    """Yield the copies that fill one tensor of the file from the boxes of a stored parameter."""
    itemsize, new_itemsize = DTYPE_BYTES[tensor.dtype], info.item_bytes
    lead = len(address.offsets)
    copied = 0
    for chunk in tensor.chunks:
        if chunk.offsets[:lead] != address.offsets:
            continue
        first_row, rows = chunk.offsets[lead], chunk.sizes[lead]
        first_col, cols = (
            (chunk.offsets[lead + 1], chunk.sizes[lead + 1]) if len(chunk.sizes) > lead + 1 else (0, 1)
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


def _write_common(path: Path, *, stacked: bool) -> None:
    """Write what Megatron keeps beside the tensors; version 3.0 is its order of rows in linear_qkv (checkpointing.py)."""
    import torch  # only this small file is written by torch itself

    content = {"non_homogeneous_layers": not stacked, "singleton_local_shards": False}
    torch.save({"checkpoint_version": 3.0, "iteration": 0, "content_metadata": content}, path)
