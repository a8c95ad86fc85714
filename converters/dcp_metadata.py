"""The .metadata file of torch.distributed.checkpoint: which file holds which part of which tensor.

It is a pickle. Writing it needs no torch. Reading it here runs no code from it: every class that it names becomes an inert record. The classes are
those of torch/distributed/checkpoint/metadata.py and filesystem.py (2.6 to 2.13).
"""

import pickle
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megaswift.converters.dcp_pickle import Call, Entries, Global, Instance, dumps
from megaswift.errors import CheckpointError

FILE = ".metadata"

DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}  # torch's names -> a safetensors header's


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredItem:
    """One serialized tensor or object: `length` bytes of `file` from `begin` on."""

    file: str
    begin: int
    length: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredChunk:
    """A box of a tensor."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    item: StoredItem


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """A tensor cut into boxes; dtype as in a safetensors header, or torch's name where that has none here."""

    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[StoredChunk, ...]


def read_metadata(folder: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a checkpoint by key; objects are left out. Raises CheckpointError."""
    path = folder / FILE
    try:
        with path.open("rb") as file:
            metadata = _InertUnpickler(file).load()
        items = {
            (index.fqn, _numbers(index.offset)): StoredItem(
                file=str(place.relative_path), begin=int(place.offset), length=int(place.length)
            )
            for index, place in metadata.storage_data.items()
            if "offset" in vars(index)  # an object's has none
        }
        return {
            key: _stored_tensor(key, tensor, items)
            for key, tensor in metadata.state_dict_metadata.items()
            if hasattr(tensor, "chunks")
        }
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read: {error.strerror}. Choose a folder with a torch_dist checkpoint."
        ) from None
    except (
        pickle.UnpicklingError,
        EOFError,
        AttributeError,
        KeyError,
        TypeError,
        ValueError,
        IndexError,
    ) as error:
        raise CheckpointError(
            f"{path} is not the metadata of a torch_dist checkpoint ({error!r}). Copy the file again."
        ) from None


def _stored_tensor(key: str, tensor: Any, items: Mapping[Any, StoredItem]) -> StoredTensor:
    dtype = _inert_name(tensor.properties.dtype)
    chunks = tuple(
        StoredChunk(
            offsets=_numbers(chunk.offsets),
            sizes=_numbers(chunk.sizes),
            item=items[key, _numbers(chunk.offsets)],
        )
        for chunk in tensor.chunks
    )
    return StoredTensor(dtype=DTYPES.get(dtype, dtype), shape=_numbers(tensor.size), chunks=chunks)


class _Inert:
    """Stands for an object of any class: keeps what it was made from and its attributes."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        # A frozen dataclass pickles its attributes; TensorProperties pickles a tuple (metadata.py, __getstate__).
        if isinstance(state, dict):
            self.__dict__.update(state)
        else:
            self.dtype = state[0]


class _InertUnpickler(pickle.Unpickler):
    """Loads plain data; classes and functions become inert records, so nothing of the file can run."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        return type(name, (_Inert,), {"__module__": f"inert.{module}"})


def _numbers(size: Any) -> tuple[int, ...]:
    """Return the numbers of an inert torch.Size, which pickles as torch.Size((a, b))."""
    numbers = size.arguments[0] if isinstance(size, _Inert) else size
    return tuple(int(number) for number in numbers)


def _inert_name(dtype: Any) -> str:
    return dtype.__name__ if isinstance(dtype, type) else str(dtype)


_METADATA = "torch.distributed.checkpoint.metadata"
_STRIDED = Call(Global("torch.serialization", "_get_layout"), ("torch.strided",))
_CONTIGUOUS = Call(Global(_METADATA, "_MEM_FORMAT_ENCODING"), (0,))


def write_metadata(
    path: Path, tensors: Mapping[str, StoredTensor], objects: Mapping[str, StoredItem]
) -> None:
    """Write a .metadata file; equal arguments give equal bytes."""
    names = {name: torch_name for torch_name, name in DTYPES.items()}
    state, storage = Entries(), Entries()
    for key, tensor in tensors.items():
        # dtype, layout, requires_grad, memory format, pin_memory (TensorProperties.__getstate__)
        properties = (Global("torch", names[tensor.dtype]), _STRIDED, False, _CONTIGUOUS, False)
        chunks = [
            _instance("ChunkStorageMetadata", {"offsets": _size(chunk.offsets), "sizes": _size(chunk.sizes)})
            for chunk in tensor.chunks
        ]
        described = {
            "properties": _instance("TensorProperties", properties),
            "size": _size(tensor.shape),
            "chunks": chunks,
        }
        state.append((key, _instance("TensorStorageMetadata", described)))
        for number, chunk in enumerate(tensor.chunks):
            index = {"fqn": key, "index": number, "offset": _size(chunk.offsets)}
            storage.append((_instance("MetadataIndex", index), _place(chunk.item)))
    for key, item in objects.items():
        state.append((key, _instance("BytesStorageMetadata", None)))
        storage.append((_instance("MetadataIndex", {"fqn": key, "index": None}), _place(item)))
    content = {
        "state_dict_metadata": state,
        "planner_data": None,
        "storage_data": storage,
        "storage_meta": None,
    }
    path.write_bytes(dumps(_instance("Metadata", content)))


def _instance(name: str, state: Any) -> Instance:
    return Instance(Global(_METADATA, name), state)


def _size(numbers: tuple[int, ...]) -> Call:
    return Call(Global("torch", "Size"), (numbers,))


def _place(item: StoredItem) -> Instance:
    state = {"relative_path": item.file, "offset": item.begin, "length": item.length}
    return Instance(Global("torch.distributed.checkpoint.filesystem", "_StorageInfo"), state)
