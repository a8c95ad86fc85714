"""`convert --verify`: a small model of the same structure through transformers and through the converter."""

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from megaswift.converters.conversion import carry_out
from megaswift.converters.dcp_model import find_checkpoint
from megaswift.converters.offline import to_hf, to_mcore
from megaswift.errors import ModelError, WeightsError
from megaswift.metadata.beside import MODEL_FILES
from megaswift.metadata.catalogue import FAMILIES
from megaswift.metadata.features import check_supported
from megaswift.metadata.meta import ModelMeta
from megaswift.metadata.read import meta_from_config
from megaswift.metadata.small import small_config
from megaswift.parity.compare import GRADIENT_LIMIT, LOGITS_LIMIT, differences
from megaswift.parity.documents import Outcome, read_tensors
from megaswift.parity.ours import megatron_outcome, one_rank
from megaswift.parity.reference import (
    has_trusted_code,
    read_config,
    save_random,
    transformers_outcome,
    without_progress_bars,
    write_question,
)

MAX_FAULTS = 12  # lines of a report
MAX_FILE_BYTES = 200_000  # several files, so that a parameter's place in its file counts


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What a verification found."""

    model_type: str
    family: str
    compared_with: str  # the model type whose class of transformers was run
    remote_code: bool  # that class is the model's own code
    layers: int
    tensors: int
    faults: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether both sides agree."""
        return not self.faults

    def text(self) -> str:
        """Return what was found, for people."""
        whose = "its own code" if self.remote_code else f"transformers' {self.compared_with}"
        title = f"{self.model_type} ({self.family}) against {whose}: {self.layers} layers, {self.tensors} tensors, float32\n"
        if self.passed:
            return (
                title
                + f"logits agree within {LOGITS_LIMIT:.0e} of the largest, every gradient within {GRADIENT_LIMIT:.0e}; "
                "torch_dist and back is bit-identical: pass\n"
            )
        shown = "".join(f"  {fault}\n" for fault in self.faults[:MAX_FAULTS])
        more = f"  and {len(self.faults) - MAX_FAULTS} more\n" if len(self.faults) > MAX_FAULTS else ""
        return title + shown + more + "the sides differ: fail\n"


def verify(config: Mapping[str, Any], meta: ModelMeta, *, trust_remote_code: bool = False) -> Verdict:
    """Return whether a small model of the structure of `config` computes the same here as in transformers.

    `meta` is what config.json was read as. Raises ModelError where transformers cannot build the model's class: then
    there is nothing to compare with, and for a family that is not built.
    """
    check_supported(replace(meta, quantization=None))  # the small model's weights are not packed
    with tempfile.TemporaryDirectory(prefix="megaswift-verify-") as scratch, without_progress_bars():
        reference = Reference.make(config, meta, Path(scratch), trust_remote_code=trust_remote_code)
        small = meta_from_config(reference.config, reference.folder, family=meta.family)
        with one_rank():
            faults = reference.faults_of(small, Path(scratch) / "ours")
        if not faults:
            faults = round_trip_faults(small, reference.folder, Path(scratch) / "trip")
        return Verdict(
            model_type=meta.model_type,
            family=meta.family,
            compared_with=reference.model_type,
            remote_code=reference.remote_code,
            layers=small.num_layers,
            tensors=len(read_tensors(reference.folder)),
            faults=tuple(faults),
        )


def round_trip_faults(meta: ModelMeta, folder: Path, scratch: Path) -> list[str]:
    """Return the tensors of a folder that change on their way into a torch_dist checkpoint and back."""
    checkpoint, back = scratch / "mcore", scratch / "hf"
    there = to_mcore(meta, folder, dtype=None, vocab_multiple=1, max_bytes=MAX_FILE_BYTES)
    carry_out(there, checkpoint, source=folder)
    beside = replace(meta, folder=checkpoint / MODEL_FILES)
    return_trip = to_hf(beside, find_checkpoint(checkpoint), dtype=None, max_bytes=MAX_FILE_BYTES)
    carry_out(return_trip, back, source=checkpoint)
    one, other = read_tensors(folder), read_tensors(back)
    found = [
        f"{name} is on one side of the way to torch_dist and back only"
        for name in sorted(one.keys() ^ other.keys())
    ]
    same = sorted(one.keys() & other.keys())
    return found + [
        f"{name} comes back from torch_dist changed"
        for name in same
        if not torch.equal(one[name], other[name])
    ]


@dataclass(frozen=True, kw_only=True)
class Reference:
    """A small random model on the disk, and what transformers makes of it."""

    config: dict[str, Any]  # config.json, in the spelling of the model that is verified
    folder: Path
    model_type: str  # that transformers was asked for
    remote_code: bool
    outcome: Outcome

    @classmethod
    def make(
        cls, config: Mapping[str, Any], meta: ModelMeta, scratch: Path, *, trust_remote_code: bool = False
    ) -> "Reference":
        """Save a small model of the structure of `config` below `scratch` and run it; raises ModelError."""
        small = small_config(config, meta)
        asked = dict(small)
        repeats = FAMILIES[meta.family].repeats
        own_code = has_trusted_code(small, meta.folder, trust_remote_code=trust_remote_code)
        if repeats is not None and meta.model_type == meta.family and not own_code:
            asked["model_type"] = repeats
        question = scratch / "config"
        question.mkdir()
        write_question(asked, question, code_from=meta.folder if own_code else None)
        try:
            theirs = read_config(question, trust_remote_code=own_code)
            folder = save_random(theirs, scratch / "model", trust_remote_code=own_code)
        except (ValueError, TypeError, KeyError, AttributeError, ImportError, OSError, RuntimeError) as error:
            raise ModelError(
                f"model_type={asked['model_type']} cannot be built by transformers here, so there is nothing to compare with: "
                f"{_first_line(error)} {_remedy(small, own_code)}"
            ) from None
        outcome = transformers_outcome(folder, scratch / "theirs", trust_remote_code=own_code)
        (folder / "config.json").write_text(
            json.dumps(small)
        )  # as this model spells it, not as transformers does
        return cls(
            config=small, folder=folder, model_type=asked["model_type"], remote_code=own_code, outcome=outcome
        )

    def faults_of(self, meta: ModelMeta, gradients: Path) -> list[str]:
        """Return how the converter's model, read as `meta`, differs; the groups of one rank stand."""
        try:
            ours = megatron_outcome(meta, self.folder, gradients)
        except WeightsError as error:
            return [str(error)]
        return differences(ours, self.outcome)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:200]


def _remedy(config: Mapping[str, Any], own_code: bool) -> str:
    if "auto_map" in config and not own_code:
        return "The folder has code of its own: --trust_remote_code true runs it."
    return "A newer transformers may know it."
