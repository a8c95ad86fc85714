"""The model of a run on this rank: built, adapted, and filled from files."""

from pathlib import Path
from typing import Any

import torch.distributed as dist

from megaswift.config.run import RunConfig
from megaswift.converters.adapters import load_peft
from megaswift.converters.dcp_pieces import McoreCheckpoint
from megaswift.converters.load import load_weights
from megaswift.converters.lora_targets import adapted_modules
from megaswift.converters.peft_folder import PeftAdapter
from megaswift.metadata.meta import ModelMeta
from megaswift.models.build import build_model
from megaswift.models.lora import apply_lora
from megaswift.models.tuner import finish_tuner
from megaswift.parallel.agreement import agree, alike
from megaswift.parallel.layout import Layout
from megaswift.platforms.platform import Platform
from megaswift.training.freeze import freeze, open_modules


def weights_of(run: RunConfig, meta: ModelMeta) -> Path | McoreCheckpoint:
    """Return where the weights are that a run starts from."""
    if run.model.mcore_model is not None:
        return McoreCheckpoint(folder=Path(run.model.mcore_model))
    return Path(str(meta.folder))


def load_model(
    run: RunConfig,
    meta: ModelMeta,
    layout: Layout,
    platform: Platform,
    *,
    adapter: PeftAdapter | None,
    fresh: bool,
    group: Any,
    weights: Path | McoreCheckpoint,
) -> list[Any]:
    """Return this rank's chunks; every rank of the world calls it. Raises UserError.

    `fresh` says that no checkpoint is read into them afterwards, which leaves frozen weights out. `weights` is
    where those of the model are. `adapter` must have been adopted by the run's tuner. `group` holds all ranks and is patient.
    """
    chunks, rank = alike(lambda: build_model(meta, run, layout, platform)), dist.get_rank()
    adapted = run.tuner.tuner_type == "lora"
    if run.freeze.chooses:
        alike(lambda: freeze(chunks, meta, layout, rank, run.freeze))
    if adapted:
        ranks = adapter.ranks(meta) if adapter else None
        modules = alike(lambda: adapted_modules(meta, run.tuner))
        seed = run.training.seed
        alike(lambda: apply_lora(chunks, run.tuner, meta, seed=seed, ranks=ranks, modules=modules))
        if run.tuner.modules_to_save:
            alike(lambda: open_modules(chunks, meta, layout, rank, run.tuner))
    if not run.model.random_init and (fresh or not chunks[0].all_trains):
        agree(lambda: load_weights(chunks, meta, layout, rank, weights), group=group)
    seed = run.training.seed
    alike(lambda: finish_tuner(chunks, run.tuner, device=platform.device, seed=seed, fresh=fresh))
    if adapter is not None and fresh:
        agree(lambda: load_peft(chunks, meta, layout, rank, adapter), group=group)
    return list(chunks)
