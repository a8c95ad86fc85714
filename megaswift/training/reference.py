"""Frozen models beside the trained one: the reference, or its log-probabilities computed once to disk, and a teacher."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megaswift.config.reference import beside
from megaswift.config.run import RunConfig
from megaswift.converters.dcp_model import find_checkpoint
from megaswift.converters.dcp_pieces import McoreCheckpoint
from megaswift.converters.peft_folder import PeftAdapter, read_adapter
from megaswift.data.batches import BatchSettings, MicroBatch, ValidationData
from megaswift.data.encode import EncodedSet
from megaswift.errors import ConfigError, ModelError
from megaswift.logs import get_logger
from megaswift.metadata.meta import ModelMeta
from megaswift.metadata.read import get_model_meta
from megaswift.parallel.agreement import agree, agree_on_first, alike
from megaswift.parallel.layout import Layout
from megaswift.platforms.platform import Platform
from megaswift.tasks.catalogue import trained_model
from megaswift.tasks.preference import answer_logps
from megaswift.tasks.task import look, run_model
from megaswift.training.context import context_share
from megaswift.training.model import load_model, weights_of

logger = get_logger(__name__)

FOLDER = "reference_logps"  # below the run's folder
WEIGHT_FILES = ("*.safetensors", "adapter_config.json", ".metadata", "*.distcp")


def reference_copy(
    run: RunConfig,
    meta: ModelMeta,
    layout: Layout,
    platform: Platform,
    *,
    group: Any,
    kept: Path | None = None,
) -> list[Any]:
    """Return this rank's chunks of the reference, without gradients; every rank of the world calls it.

    `group` holds all ranks and is patient; `kept` is where its weights are if they have changed. Raises UserError where --ref_model
    or --ref_adapters does not fit.
    """
    reference = alike(lambda: reference_meta(run, meta))
    adapter = None
    if run.preference.ref_adapters:
        adapter = alike(lambda: read_adapter(run.preference.ref_adapters[0], reference))
    weights = kept or reference_weights(run, reference)
    return _frozen(run, reference, layout, platform, adapter=adapter, group=group, weights=weights)


def teacher_copy(
    run: RunConfig, meta: ModelMeta, layout: Layout, platform: Platform, *, group: Any
) -> list[Any]:
    """Return this rank's chunks of --teacher_model as reference_copy() does; it may be of another size, under the same layout."""
    teacher = alike(lambda: teacher_meta(run, meta))
    return _frozen(run, teacher, layout, platform, group=group, weights=Path(str(teacher.folder)))


def _frozen(
    run: RunConfig,
    meta: ModelMeta,
    layout: Layout,
    platform: Platform,
    *,
    adapter: PeftAdapter | None = None,
    group: Any,
    weights: Path | McoreCheckpoint,
) -> list[Any]:
    plain = beside(run, has_experts=meta.moe is not None)  # not in four bits either
    if adapter is not None:
        plain = replace(plain, tuner=adapter.adopt(replace(plain.tuner, tuner_type="lora"), meta))
    chunks = load_model(
        plain, meta, layout, platform, adapter=adapter, fresh=True, group=group, weights=weights
    )
    for chunk in chunks:
        chunk.requires_grad_(False)
    return chunks


def reference_meta(run: RunConfig, meta: ModelMeta) -> ModelMeta:
    """Return the facts of the reference; raises ConfigError."""
    return _facts_of(run, meta, "ref_model", run.preference.ref_model)


def teacher_meta(run: RunConfig, meta: ModelMeta) -> ModelMeta:
    """Return the facts of the teacher in memory; raises ConfigError."""
    return _facts_of(run, meta, "teacher_model", run.preference.teacher_model)


def _facts_of(run: RunConfig, meta: ModelMeta, flag: str, name: str | None) -> ModelMeta:
    if name is None:
        return meta
    try:
        other = get_model_meta(name, use_hf=run.model.use_hf, trust_remote_code=run.model.trust_remote_code)
    except ModelError as error:
        raise ConfigError(f"{flag}: {error}") from error
    if other.vocab_size != meta.vocab_size:
        raise ConfigError(
            f"{flag}={name} has vocab_size={other.vocab_size} and the trained model {meta.vocab_size}: they do not read "
            "the same tokens. Choose one with the same tokenizer."
        )
    return trained_model(run, other)


def reference_weights(run: RunConfig, reference: ModelMeta) -> Path | McoreCheckpoint:
    """Return where the weights of the model of reference_meta() are, before it follows any other."""
    chosen = run.preference
    if chosen.mcore_ref_model is not None:
        return McoreCheckpoint(folder=Path(chosen.mcore_ref_model))
    if chosen.ref_model is not None:
        return Path(str(reference.folder))
    return weights_of(run, reference)


@dataclass(frozen=True, kw_only=True)
class References:
    """Computes log-probabilities under the reference once, and keeps them on disk."""

    run: RunConfig
    meta: ModelMeta
    layout: Layout
    platform: Platform
    output_dir: Path
    group: Any  # all ranks, patient

    def of(self, sets: Sequence[EncodedSet], settings: BatchSettings, *, pad_id: int) -> list[EncodedSet]:
        """Return the sets with their references, which are read where an earlier start left them.

        Every rank of the world calls it. The reference model is in memory only while it computes.
        """
        chunks: list[Any] = []
        found = []
        for encoded in sets:
            file = self.output_dir / FOLDER / f"{self._key(encoded)}.npy"
            if not agree_on_first(file.exists):
                if not chunks:
                    chunks = reference_copy(self.run, self.meta, self.layout, self.platform, group=self.group)
                table = self._compute(chunks, encoded, settings, pad_id)
                agree_on_first(lambda file=file, table=table: _write(file, table))  # type: ignore[misc]  # bound now
                logger.info(
                    "computed the reference's log-probabilities of %d answers: %s", len(encoded), file
                )
            references = agree(lambda file=file: np.load(file, mmap_mode="r"))  # type: ignore[misc]  # bound now
            mismatched = encoded.mismatched
            if mismatched is not None:
                (mismatched,) = self.of([mismatched], settings, pad_id=pad_id)
            found.append(replace(encoded, references=references, mismatched=mismatched))
        return found

    def _compute(
        self, chunks: Sequence[Any], encoded: EncodedSet, settings: BatchSettings, pad_id: int
    ) -> np.ndarray:
        """Return the log-probability of every entry's answer, float64 [entries]; every rank of the world calls it."""
        data = ValidationData(replace(encoded, mismatched=None, targets=None), settings, pad_id=pad_id)
        table = torch.zeros(len(encoded), dtype=torch.float64, device=self.platform.device)
        dp_rank, share = parallel_state.get_data_parallel_rank(), context_share(self.layout)
        counts = (
            parallel_state.get_tensor_model_parallel_rank() == 0
            and parallel_state.get_context_parallel_rank() == 0
        )
        for step in range(data.num_steps()):
            whole = data.micro_batches(step, dp_rank=dp_rank, dp=self.layout.dp)
            batches = list(whole if share is None else map(share, whole))
            keep = partial(_entries_and_logps, ld_alpha=self.run.preference.ld_alpha)
            for entries, logps in look(chunks, batches, keep, run=run_model):
                if counts:
                    table[list(entries)] = logps
        dist.all_reduce(table)
        return table.cpu().numpy()

    def _key(self, encoded: EncodedSet) -> str:
        """Return what the log-probabilities depend on: the tokens, and the weights as far as their files tell."""
        weights = reference_weights(self.run, reference_meta(self.run, self.meta))
        base = find_checkpoint(weights.folder) if isinstance(weights, McoreCheckpoint) else weights
        files = [
            (path.name, path.stat().st_size, path.stat().st_mtime_ns)
            for folder in (base, *map(Path, self.run.preference.ref_adapters))
            for path in sorted(path for pattern in WEIGHT_FILES for path in folder.glob(pattern))
        ]
        weighs = (files, self.run.model.torch_dtype, self.run.preference.ld_alpha)
        digest = hashlib.sha256(repr(weighs).encode())
        for values in (encoded.input_ids, encoded.loss_weights, encoded.starts):
            digest.update(np.ascontiguousarray(values).data)
        return digest.hexdigest()[:16]


def _entries_and_logps(
    batch: MicroBatch, losses_BS: torch.Tensor, *, ld_alpha: float | None
) -> tuple[tuple[int, ...], torch.Tensor]:
    return batch.sample_ids, answer_logps(batch, losses_BS, ld_alpha=ld_alpha)


def _write(file: Path, table: np.ndarray) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    growing = file.with_suffix(".tmp")
    with growing.open("wb") as opened:
        np.save(opened, table)
    os.replace(growing, file)
