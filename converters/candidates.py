"""Which known families a model of an unknown type might be: by the keys of its config.json and the names and shapes of its tensors.

That says nothing about the mathematics: parity/infer.py proves it. No torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megaswift.converters.check import check_files
from megaswift.converters.plan import file_tensors
from megaswift.converters.quantised import plain_tensors
from megaswift.converters.tensor_files import TensorInfo
from megaswift.errors import ModelError, WeightsError
from megaswift.metadata.catalogue import FAMILIES
from megaswift.metadata.meta import ModelMeta
from megaswift.metadata.read import meta_from_config

NEAREST = 3  # families that a refusal tells about


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One family, what the model would be in it, and what does not fit."""

    family: str
    meta: ModelMeta | None  # None: its config.json cannot be read so
    fault: str  # "": everything fits
    strangers: int  # keys and tensors that do not fit


def candidates(
    config: Mapping[str, Any], folder: Path | None, tensors: Mapping[str, TensorInfo] | None
) -> list[Candidate]:
    """Return every family that is built, the best fit first; `tensors` None looks at config.json alone."""
    found = [
        _candidate(name, dict(config), folder, tensors)
        for name, family in FAMILIES.items()
        if family.supported
    ]
    return sorted(found, key=_order)


def _order(candidate: Candidate) -> tuple[bool, int, int, bool, str]:
    """Fewest strangers first; of those that fit alike the family with the fewest switches, a Llama before its likes."""
    name = candidate.family
    switches = len(FAMILIES[name].defaults)
    return candidate.fault != "", candidate.strangers, switches, name != "llama", name


def _candidate(
    name: str, config: dict[str, Any], folder: Path | None, tensors: Mapping[str, TensorInfo] | None
) -> Candidate:
    keys = FAMILIES[name].strange_keys(config)
    try:
        meta = meta_from_config(config, folder, family=name)
    except ModelError as error:
        fault = f"the keys {', '.join(keys)} are not its own" if keys else str(error)
        return Candidate(family=name, meta=None, fault=fault, strangers=1000 * max(1, len(keys)))
    try:
        if tensors is not None:
            check_files(meta, plain_tensors(meta, tensors))
    except WeightsError as error:
        strangers = len(file_tensors(meta).keys() ^ (tensors or {}).keys())
        return Candidate(family=name, meta=meta, fault=str(error), strangers=strangers)
    return Candidate(family=name, meta=meta, fault="", strangers=0)


def refusal(model_type: str, found: list[Candidate]) -> ModelError:
    """Return the error for a model that fits no family, with what did not fit the nearest ones; the caller raises it."""
    nearest = "".join(f"\n  {one.family}: {one.fault}" for one in found[:NEAREST])
    return ModelError(
        f"model_type={model_type} is not a known family, and the model is none under another name. The nearest ones, and what "
        f"does not fit them:{nearest}\nA family needs a declaration in megaswift/metadata/families and a table in converters/tables."
    )
