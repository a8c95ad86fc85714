"""From a training checkpoint, or from a model and an adapter, to a Hugging Face or PEFT folder, in this one process."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist

from megaswift.checkpoint.save import SHARDS
from megaswift.checkpoint.state import model_tensors
from megaswift.checkpoint.store import Checkpoint, Store, read_checkpoint
from megaswift.checkpoint.torch_dist import load_tensors
from megaswift.config.export import ExportConfig
from megaswift.config.model import ModelConfig
from megaswift.config.parallel import ParallelConfig
from megaswift.config.parse import parse_saved
from megaswift.config.run import RunConfig
from megaswift.config.tokens import tokens_of
from megaswift.config.tuner import TunerConfig
from megaswift.converters.adapters import load_peft, save_peft
from megaswift.converters.export import ExportReport, export_hf
from megaswift.converters.load import load_weights
from megaswift.converters.lora_targets import adapted_modules
from megaswift.converters.new_tokens import read_with_new_tokens
from megaswift.converters.peft_folder import PeftAdapter, read_adapter
from megaswift.data.chatml import added_chat_template
from megaswift.errors import CheckpointError, ConfigError
from megaswift.launch.join import this_rank
from megaswift.logs import get_logger
from megaswift.mcore import process_groups
from megaswift.metadata.hub import Files, locate
from megaswift.metadata.meta import ModelMeta
from megaswift.metadata.read import get_model_meta
from megaswift.models.build import build_model
from megaswift.models.lora import apply_lora
from megaswift.models.tuner import finish_tuner
from megaswift.parallel.layout import Layout
from megaswift.platforms.platform import init_distributed, select_platform
from megaswift.tasks.catalogue import trained_model
from megaswift.training.freeze import freeze, open_modules
from megaswift.training.lisa import open_layers
from megaswift.training.model import weights_of

logger = get_logger(__name__)

RUN_FILE = "run.yaml"  # the settings that a checkpoint keeps of its run


def export(config: ExportConfig) -> ExportReport:
    """Write what `config` asks for and return what was written; raises UserError before anything is there."""
    output = check_target(config)
    checkpoint = find_source(config)
    run = _run_of(config, checkpoint)
    with _folder_of(run, output.absolute().parent) as folder:
        meta = get_model_meta(folder, trust_remote_code=run.model.trust_remote_code)
        return _export(config, output, checkpoint, run, meta)


def _export(
    config: ExportConfig, output: Path, checkpoint: Checkpoint | None, run: RunConfig, meta: ModelMeta
) -> ExportReport:
    meta = trained_model(run, meta)
    dtype = config.target.torch_dtype or run.model.torch_dtype or meta.dtype
    adapter = read_adapter(run.tuner.adapters[0], meta) if run.tuner.adapters else None
    if adapter is not None:
        run = replace(run, tuner=adapter.adopt(run.tuner, meta))
    run = replace(run, model=replace(run.model, torch_dtype=dtype))

    platform = select_platform("cpu")
    here = this_rank(os.environ)
    init_distributed(platform, rank=0, world_size=1, master=here.master, timeout_min=10)
    layout = Layout()
    process_groups.initialise(layout, seed=run.training.seed, timeout_min=10)
    chunks = build_model(meta, run, layout, platform)
    _fill(chunks, meta, layout, run, adapter=adapter, checkpoint=checkpoint)
    if run.tuner.tuner_type == "lora" and not config.target.merge_lora:
        report = save_peft(
            chunks,
            meta,
            layout,
            0,
            output,
            tuner=run.tuner,
            dtype=dtype,
            base_model=run.model.model,
            with_tokenizer=bool(run.model.new_special_tokens),
        )
    else:
        report = export_hf(
            chunks,
            meta,
            layout,
            0,
            output,
            dtype=dtype,
            max_shard_size=config.target.max_shard_size,
            merge_lora=run.tuner.tuner_type == "lora",
            quant_method=config.target.quant_method,
            chat_template=added_chat_template(run, meta),
        )
    process_groups.destroy()
    dist.destroy_process_group()
    return report


@contextmanager
def _folder_of(run: RunConfig, beside: Path) -> Iterator[Path]:
    """Yield the folder of the run's model; one with new tokens lies `beside` the output for a moment, where there is room."""
    if not run.model.new_special_tokens:
        yield locate(str(run.model.model), files=Files.ALL if run.model.reads_safetensors else Files.FACTS)
        return
    beside.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".model-", dir=beside) as home:
        yield read_with_new_tokens(run.model, Path(home))


def check_target(config: ExportConfig) -> Path:
    """Return the folder to write; raises ConfigError where there is none, or one that must not be replaced."""
    if config.target.output_dir is None:
        raise ConfigError("output_dir is missing. Say where to write: --output_dir FOLDER.")
    output = Path(config.target.output_dir)
    if output.exists() and not config.target.exist_ok:
        raise ConfigError(f"output_dir={output} exists. Choose another folder, or give --exist_ok true.")
    return output


def find_source(config: ExportConfig) -> Checkpoint | None:
    """Return the checkpoint to export, or None for a model; raises UserError where that is not clear."""
    source, merge = config.source, config.target.merge_lora
    if (source.checkpoint is None) == (source.model is None):
        raise ConfigError(
            "Give either --checkpoint (of a training run) or --model (with --adapters to merge one)."
        )
    if source.checkpoint is None:
        if bool(source.adapters) != merge or len(source.adapters) > 1:
            raise ConfigError(
                "--model is exported with one of --adapters and --merge_lora true, or without both."
            )
        return None
    if source.adapters:
        raise ConfigError("adapters is for --model; a checkpoint has its own.")
    if source.new_special_tokens:
        raise ConfigError("new_special_tokens is for --model; a checkpoint has its own.")
    folder = Path(source.checkpoint)
    newest = Store(folder).latest_complete()
    checkpoint = newest or read_checkpoint(folder)
    if not (checkpoint.folder / SHARDS).is_dir():
        raise CheckpointError(
            f"{checkpoint.folder} was saved without its weights (--save_optim false): use its export."
        )
    return checkpoint


def _run_of(config: ExportConfig, checkpoint: Checkpoint | None) -> RunConfig:
    """Return the settings under which the model is built, on one rank."""
    source = config.source
    if checkpoint is None:
        tuner = TunerConfig(tuner_type="lora" if source.adapters else "full", adapters=source.adapters)
        model = ModelConfig(
            model=source.model,
            new_special_tokens=tokens_of(source.new_special_tokens),
            trust_remote_code=source.trust_remote_code,
        )
        return RunConfig(model=model, tuner=tuner)
    trained = parse_saved(checkpoint.folder / RUN_FILE)
    if config.target.merge_lora and trained.tuner.tuner_type != "lora":
        raise ConfigError(f"merge_lora=true but {checkpoint.folder} has no adapter. Leave the flag out.")
    return replace(trained, parallel=ParallelConfig())


def _fill(
    chunks: list[Any],
    meta: ModelMeta,
    layout: Layout,
    run: RunConfig,
    *,
    adapter: PeftAdapter | None,
    checkpoint: Checkpoint | None,
) -> None:
    adapted = run.tuner.tuner_type == "lora"
    if adapted:
        ranks = adapter.ranks(meta) if adapter else None
        modules = adapted_modules(meta, run.tuner)
        apply_lora(chunks, run.tuner, meta, seed=run.training.seed, ranks=ranks, modules=modules)
        if run.tuner.modules_to_save:
            open_modules(chunks, meta, layout, 0, run.tuner)
    if run.freeze.chooses:
        freeze(chunks, meta, layout, 0, run.freeze)
    if run.lisa.lisa_activated_layers:
        open_layers(chunks, run, updates=0)  # any layers: all are read, by names of their own
    if checkpoint is None or not chunks[0].all_trains:
        load_weights(chunks, meta, layout, 0, weights_of(run, meta))
    # A base in four bits is what the adapters were trained beside.
    finish_tuner(chunks, run.tuner, device=torch.device("cpu"), seed=run.training.seed, fresh=False)
    if checkpoint is not None:
        load_tensors(checkpoint.folder / SHARDS, model_tensors(chunks))
        logger.info("read %s, step %d", checkpoint.folder, checkpoint.manifest.step)
    elif adapter is not None:
        load_peft(chunks, meta, layout, 0, adapter)
