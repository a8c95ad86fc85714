"""Tensors of a model folder that go through a conversion untouched, since the model does not hold them: its MTP layers'."""

from collections.abc import Mapping
from pathlib import Path

from megaswift.converters.plan import is_carried
from megaswift.converters.quantised import read_model
from megaswift.converters.tensor_files import INDEX_FILE, SINGLE_FILE, TensorInfo, read_header
from megaswift.metadata.meta import ModelMeta

CARRIED_FILE = (
    "carried.safetensors"  # beside config.json in a converted checkpoint, which has no other weights there
)


def carried_tensors(
    meta: ModelMeta, tensors: Mapping[str, TensorInfo] | None = None
) -> dict[str, TensorInfo]:
    """Return the tensors of the model's folder that its export keeps; `tensors` are those of the folder where they are known."""
    if tensors is None:
        tensors = _weights_of(meta, meta.folder) if meta.folder is not None and meta.num_mtp_layers else {}
    return {name: info for name, info in tensors.items() if is_carried(meta, name)}


def _weights_of(meta: ModelMeta, folder: Path) -> Mapping[str, TensorInfo]:
    if (folder / CARRIED_FILE).is_file():
        return read_header(folder / CARRIED_FILE)
    has_weights = any((folder / name).is_file() for name in (SINGLE_FILE, INDEX_FILE))
    return read_model(meta, folder) if has_weights else {}
