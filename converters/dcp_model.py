"""A torch_dist checkpoint as a whole: where below a folder it lies, and where it keeps every parameter of a model."""

from dataclasses import dataclass
from pathlib import Path

from megaswift.converters.check import SCORE
from megaswift.converters.dcp_items import STORAGES
from megaswift.converters.dcp_metadata import FILE as METADATA
from megaswift.converters.dcp_metadata import StoredTensor, read_metadata
from megaswift.converters.dcp_names import Address, candidates, find
from megaswift.converters.plan import TIED_OUTPUT, Parameter, plan_chunk
from megaswift.errors import CheckpointError, listing
from megaswift.metadata.meta import ModelMeta
from megaswift.parallel.layout import Layout, coordinates

RELEASE = "release"  # the folder in which Megatron-LM looks for weights without a training state
TRACKER = "latest_checkpointed_iteration.txt"
MODEL_KEYS = ("embedding.", "decoder.", "output_layer.")  # others belong to an optimizer


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredParameter:
    """A parameter of the whole model, and the tensor of the checkpoint that it is a box of."""

    parameter: Parameter
    address: Address
    tensor: StoredTensor


def find_checkpoint(folder: Path) -> Path:
    """Return the folder with .metadata at or below `folder`, as Megatron-LM and this project lay them out; raises CheckpointError.

    Without a tracker file it is the only one there is, or Megatron-LM's of the highest iteration.
    """
    folder = folder.expanduser()
    tracked = [folder / RELEASE]
    if (folder / TRACKER).is_file() and (text := (folder / TRACKER).read_text().strip()).isdigit():
        tracked = [folder / f"iter_{int(text):07d}"]  # checkpointing.py of Megatron-LM, get_checkpoint_name
    for candidate in (folder, *tracked):
        if (candidate / METADATA).is_file():
            return candidate
    below = sorted(path.parent for path in folder.glob(f"*/{METADATA}"))  # iter_0000100: digits stand in line
    if below and all(path.name.startswith("iter_") for path in below):
        below = below[-1:]
    if len(below) > 1:
        raise CheckpointError(
            f"{folder} holds several checkpoints: {', '.join(path.name for path in below)}. Choose one of them."
        )
    if below:
        return below[0]
    raise CheckpointError(
        f"{folder} holds no torch_dist checkpoint: no {METADATA} in it. Choose the folder that has one."
    )


def whole_model(meta: ModelMeta) -> list[Parameter]:
    """Return the parameters of one rank that holds everything: the tensors of a checkpoint, however many ranks wrote it."""
    return plan_chunk(meta, Layout(), coordinates(Layout(), 0))


def stored_parameters(meta: ModelMeta, checkpoint: Path) -> list[StoredParameter]:
    """Return where the folder with .metadata keeps each parameter of the model, which is read from .metadata alone.

    A model that scores may lack its head, where the checkpoint is of a language model. Raises CheckpointError where another
    parameter is missing, one has another shape, or the checkpoint holds more of a model than this one.
    """
    stored = read_metadata(checkpoint)
    found, claimed = [], {TIED_OUTPUT} if meta.scores is not None else set()
    for parameter in whole_model(meta):
        claimed.update(one.key for one in candidates(parameter, meta))
        if parameter.tensors == (SCORE,) and _scores_nothing(meta, stored):
            continue
        address, tensor = find(parameter, meta, stored)
        _check_shape(parameter, address, tensor)
        found.append(StoredParameter(parameter=parameter, address=address, tensor=tensor))
    if unclaimed := sorted(key for key in stored.keys() - claimed if key.startswith(MODEL_KEYS)):
        raise CheckpointError(
            f"{checkpoint} holds more of a model than config.json describes: {listing(unclaimed)}. They do not belong together."
        )
    return found


def _scores_nothing(meta: ModelMeta, stored: dict[str, StoredTensor]) -> bool:
    """Whether a checkpoint has no head for scores: nothing in its place, or the language model's, a row for each token."""
    head = stored.get(TIED_OUTPUT)
    return head is None or head.shape[0] >= meta.vocab_size


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
