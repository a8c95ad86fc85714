"""Safetensors files as they lie on disk: headers read and written, and mapped bytes cut into slices. No torch.

A file is 8 bytes of header length (little endian), a JSON header, then the tensors' bytes without a hole:
https://github.com/huggingface/safetensors, "Format". Letters: C size of the last dim (1 for a vector), N all rows of that size.
"""

import json
import math
import mmap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from megaswift.errors import WeightsError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library (tensor.rs, MAX_HEADER_SIZE)

DTYPE_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2,
    "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
}  # fmt: skip
DTYPE_NAMES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}  # config.json's names -> the header's

# numpy has no bfloat16: elements travel as unsigned integers of their size.
Bits = npt.NDArray[np.unsignedinteger[Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorInfo:
    """Where one tensor lies: bytes begin..begin + num_bytes of `file`."""

    name: str
    dtype: str  # as in the header, e.g. "BF16"
    shape: tuple[int, ...]
    file: Path
    begin: int
    packed: "Packed | None" = None  # its elements have to be computed; file and begin are those of the values

    @property
    def item_bytes(self) -> int:
        """Bytes of one element."""
        return DTYPE_BYTES[self.dtype]

    @property
    def rows(self) -> int:
        """N; a scalar has one row."""
        return matrix_size(self.shape)[0]

    @property
    def cols(self) -> int:
        """C; 1 for a vector."""
        return matrix_size(self.shape)[1]

    @property
    def num_bytes(self) -> int:
        """Bytes of the whole tensor."""
        return self.rows * self.cols * self.item_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Packed:
    """The tensors of a file that a quantised tensor is made of."""

    values: TensorInfo  # F8_E4M3 [N, C], or U8 [E, N, C/32, 16] in MXFP4
    scales: TensorInfo  # [P, Q] or one for all; [E, N, C/32]


def matrix_size(shape: Sequence[int]) -> tuple[int, int]:
    """Return (N, C) of a tensor seen as a matrix; matrices that are packed along dim 0 lie below each other."""
    if len(shape) < 2:
        return math.prod(shape), 1
    return math.prod(shape[:-1]), shape[-1]


def read_folder(folder: Path) -> dict[str, TensorInfo]:
    """Return every tensor of a model folder, read from headers alone: name -> where it lies.

    Takes model.safetensors, or the files that model.safetensors.index.json names. Raises WeightsError for a folder
    without safetensors, and for a file that is missing, broken or at odds with the index.
    """
    if (folder / SINGLE_FILE).is_file():
        return read_header(folder / SINGLE_FILE)
    if (folder / INDEX_FILE).is_file():
        return _read_sharded(folder)
    if any(folder.glob("pytorch_model*.bin")):
        raise WeightsError(
            f"{folder} holds pickle weights (pytorch_model*.bin), which can run code when read and cannot be sliced. "
            "Convert them once with transformers: "
            "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder, safe_serialization=True)."
        )
    raise WeightsError(
        f"{folder} holds neither {SINGLE_FILE} nor {INDEX_FILE}. Download the weights into it."
    )


def _read_sharded(folder: Path) -> dict[str, TensorInfo]:
    index = folder / INDEX_FILE
    try:
        weight_map = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WeightsError(
            f"{index} is not a safetensors index ({error!r}). Download the file again."
        ) from None
    tensors: dict[str, TensorInfo] = {}
    for file in sorted(set(weight_map.values())):
        if not (folder / file).is_file():
            raise WeightsError(
                f"{folder / file} is missing, though {INDEX_FILE} names it. Download the file."
            )
        for name, info in read_header(folder / file).items():
            if name in tensors:
                raise WeightsError(
                    f"The tensor {name} lies in {tensors[name].file} and in {info.file}. Keep one of them."
                )
            tensors[name] = info
    for name, file in weight_map.items():
        if name not in tensors or tensors[name].file.name != file:
            raise WeightsError(
                f"{folder / file} lacks the tensor {name} that {INDEX_FILE} puts there. Download the file again."
            )
    return tensors


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Return the tensors of one safetensors file, checked against its size; raises WeightsError naming the file."""
    try:
        file_bytes = path.stat().st_size
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            if file_bytes < 8 or header_bytes > min(file_bytes - 8, MAX_HEADER_BYTES):
                raise _broken(path, f"its header claims {header_bytes} bytes and the file has {file_bytes}")
            entries = json.loads(file.read(header_bytes), object_pairs_hook=_without_duplicates)
        data_begin = 8 + header_bytes
        entries.pop("__metadata__", None)
        tensors = {name: _tensor_info(path, name, entry, data_begin) for name, entry in entries.items()}
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error}. Check the path and its permissions.") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _broken(path, f"its header is not a safetensors header ({error})") from None
    end = data_begin
    for info in sorted(tensors.values(), key=lambda info: (info.begin, info.num_bytes)):
        if info.begin != end:
            raise _broken(
                path,
                f"the bytes of {info.name} begin at {info.begin} where {end} was due, an overlap or a hole",
            )
        end += info.num_bytes
    if end != file_bytes:
        raise _broken(path, f"its tensors end at byte {end} and the file has {file_bytes}")
    return tensors


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"it names {next(name for name in names if names.count(name) > 1)} twice")
    return values


def _tensor_info(path: Path, name: str, entry: Mapping[str, Any], data_begin: int) -> TensorInfo:
    begin, end = entry["data_offsets"]
    if entry["dtype"] not in DTYPE_BYTES:
        raise ValueError(f"{name} has the unknown dtype {entry['dtype']}")
    info = TensorInfo(
        name=name, dtype=entry["dtype"], shape=tuple(entry["shape"]), file=path, begin=data_begin + begin
    )
    if end - begin != info.num_bytes or min(info.shape, default=0) < 0:
        raise ValueError(f"{name} has shape {list(info.shape)} of {info.dtype} and {end - begin} bytes")
    return info


def _broken(path: Path, what: str) -> WeightsError:
    return WeightsError(
        f"{path} is not a complete safetensors file: {what}. Download or write the file again."
    )


def encode_header(tensors: Iterable[tuple[str, str, tuple[int, ...]]]) -> tuple[bytes, dict[str, int]]:
    """Return the first bytes of a file that holds (name, dtype, shape) in this order, and each tensor's absolute offset.

    The metadata {"format": "pt"} is what transformers asks for.
    """
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begins: dict[str, int] = {}
    end = 0
    for name, dtype, shape in tensors:
        begins[name] = end
        end += math.prod(shape) * DTYPE_BYTES[dtype]
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begins[name], end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin on a multiple of 8 bytes, as the library writes them
    header = len(text).to_bytes(8, "little") + text
    return header, {name: len(header) + begin for name, begin in begins.items()}


class TensorReader:
    """Maps the files of a model folder and hands out views of their tensors; pages are read when they are touched."""

    def __init__(self, tensors: Mapping[str, TensorInfo]) -> None:
        self.tensors = tensors
        self._maps: dict[Path, mmap.mmap] = {}

    def __enter__(self) -> "TensorReader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._maps.clear()  # a map closes when its last view is gone

    def matrix(self, name: str) -> Bits:
        """Return the tensor as [N, C] elements, a view of the file.

        The view is writable and private (copy on write), since torch refuses read-only memory; nothing reaches the file.
        """
        return self.stored(self.tensors[name])

    def stored(self, info: TensorInfo) -> Bits:
        """Return any tensor of a file as matrix() does."""
        assert info.packed is None, f"{info.name} has to be unpacked"
        if info.file not in self._maps:
            with info.file.open("rb") as file:
                self._maps[info.file] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        dtype = np.dtype(f"u{info.item_bytes}")
        flat = np.frombuffer(self._maps[info.file], dtype, count=info.rows * info.cols, offset=info.begin)
        return flat.reshape(info.rows, info.cols)

    def slab(self, name: str, index: int) -> Bits:
        """Return the index-th of the matrices [C, N] that a tensor packs, transposed: [N, C], a view of the file."""
        packed = self.matrix(name).reshape(self.tensors[name].shape)[index]
        return packed.T if packed.ndim == 2 else packed[:, None]
