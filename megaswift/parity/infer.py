"""A model of an unknown type taken for one of a known family, once it is proven to compute the same."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megaswift.converters.candidates import candidates, refusal
from megaswift.converters.tensor_files import TensorInfo
from megaswift.errors import ModelError
from megaswift.metadata.catalogue import FAMILIES
from megaswift.metadata.meta import ModelMeta
from megaswift.parity.reference import class_defaults
from megaswift.parity.verify import Verdict, verify


@dataclass(frozen=True, kw_only=True)
class Inference:
    """The family of a model, and the comparison that proves it."""

    meta: ModelMeta
    verdict: Verdict


def infer(
    config: Mapping[str, Any],
    folder: Path | None,
    tensors: Mapping[str, TensorInfo] | None,
    *,
    trust_remote_code: bool = False,
) -> Inference:
    """Return which family a model of an unknown type is; raises ModelError where none is proven.

    Names alone prove nothing: families share keys and tensors and differ in what they compute. So each family that fits is
    compared with the class that transformers has for the unknown type, or with the model's own code if that is trusted.
    """
    model_type = str(config.get("model_type"))
    found = candidates(config, folder, tensors)
    fitting = [one for one in found if not one.fault and one.meta is not None]
    if not fitting:
        raise refusal(model_type, found)
    tried = []
    for one in fitting:
        assert one.meta is not None, "it fits"
        try:
            verdict = verify(config, one.meta, trust_remote_code=trust_remote_code)
        except ModelError as error:
            names = ", ".join(other.family for other in fitting)
            raise ModelError(
                f"model_type={model_type} is not a known family. By its keys and tensors it could be {names}, but names prove "
                f"nothing about what it computes, and {error} If you know that it is one of them under another name, write "
                "that model_type into its config.json."
            ) from None
        if verdict.passed:
            faults = other_defaults(config, folder, one.family, trust_remote_code=trust_remote_code)
            verdict = replace(verdict, faults=tuple(faults))
        if verdict.passed:
            return Inference(meta=one.meta, verdict=verdict)
        tried.append(replace(one, fault=verdict.faults[0]))
    raise refusal(model_type, tried)


def other_defaults(
    config: Mapping[str, Any], folder: Path | None, family: str, *, trust_remote_code: bool
) -> list[str]:
    """Return the keys that config.json lacks and that the class fills otherwise than the family does.

    A small model does not show them: its sizes are all written down.
    """
    theirs = class_defaults(config, folder, trust_remote_code=trust_remote_code)
    return [
        f"{key} is absent from config.json; the class takes {theirs[key]!r}, the family {family} {default!r}"
        for key, default in FAMILIES[family].defaults.items()
        if key not in config and key in theirs and theirs[key] != default
        and not isinstance(default, dict) and None not in (theirs[key], default)
    ]  # fmt: skip
