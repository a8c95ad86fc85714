"""Whether the tensors of a folder are exactly those that the model needs, read from headers alone."""

import re
from collections.abc import Mapping

from megaswift.converters.plan import EMBEDDING, TIED_OUTPUT, file_tensors, is_carried, is_unread, table_for
from megaswift.converters.tensor_files import DTYPE_NAMES, TensorInfo
from megaswift.errors import WeightsError, listing
from megaswift.metadata.meta import ModelMeta

# A model that scores may start from a language model: its own head is then new, and the other is left behind.
SCORE, LM_HEAD = "score.weight", "lm_head.weight"


def check_files(meta: ModelMeta, tensors: Mapping[str, TensorInfo]) -> None:
    """Raise WeightsError unless every tensor is claimed by the model's table once, none is missing and every shape fits."""
    expected = file_tensors(meta)
    faults = []
    if missing := [name for name in expected if name not in tensors and name != SCORE]:
        faults.append(f"missing: {listing(missing)}")
    if unclaimed := [name for name in tensors if name not in expected and not _is_ignored(meta, name)]:
        faults.append(f"not claimed by the family {meta.family}: {listing(unclaimed)}")
    present = [name for name in expected if name in tensors]
    if misshapen := [
        f"{name} is {list(tensors[name].shape)}, not {list(expected[name])}"
        for name in present
        if tensors[name].shape != expected[name]
    ]:
        faults.append(f"of another shape than config.json says: {listing(misshapen)}")
    if odd := [
        f"{name} is {tensors[name].dtype}"
        for name in present
        if tensors[name].dtype not in DTYPE_NAMES.values()
    ]:
        faults.append(f"of a dtype other than {', '.join(DTYPE_NAMES)}: {listing(odd)}")
    if faults:
        raise WeightsError(
            f"The tensors of {meta.folder or meta.model_type} do not fit its config.json; {'; '.join(faults)}. "
            "Nothing was loaded; check that config.json and the safetensors belong together."
        )


def tied_twin(meta: ModelMeta) -> tuple[str, str] | None:
    """Return the names (embedding, output layer) of a model that ties them, whose file may hold both if they are equal."""
    if not meta.tied_embeddings:
        return None
    files = {row.megatron: row.file for row in table_for(meta).rows}
    return files[EMBEDDING], files[TIED_OUTPUT]


def _is_ignored(meta: ModelMeta, name: str) -> bool:
    twin = tied_twin(meta)
    return (
        (twin is not None and name == twin[1])
        or (meta.scores is not None and name == LM_HEAD)
        or is_carried(meta, name)
        or is_unread(meta, name)
        or any(re.fullmatch(pattern, name) for pattern in table_for(meta).ignored)
    )
