"""Short training runs on synthetic tokens, for comparing layouts and resumed runs; every function runs on every rank."""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from math import lcm
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megaswift.checkpoint.resume import load_checkpoint
from megaswift.checkpoint.store import Store
from megaswift.config.model import ModelConfig
from megaswift.config.precision import token_multiple
from megaswift.config.reference import has_teacher_here, needs_reference
from megaswift.config.reranker import TASK_TYPES as RERANKERS
from megaswift.config.rows import PAIRED, texts_of_a_row
from megaswift.config.rules import resolve
from megaswift.config.run import RunConfig
from megaswift.converters.export import export_hf
from megaswift.converters.load import load_weights
from megaswift.converters.lora_targets import adapted_modules
from megaswift.data.batches import BatchSettings, MicroBatch, TrainData
from megaswift.data.encode import EncodedSet
from megaswift.data.mismatched import mismatched_answers
from megaswift.mcore import process_groups
from megaswift.metadata.meta import ModelMeta
from megaswift.metadata.read import get_model_meta
from megaswift.models.build import build_model
from megaswift.models.lora import apply_lora
from megaswift.models.tuner import finish_tuner
from megaswift.parallel.context import pad_multiple
from megaswift.parallel.layout import Layout
from megaswift.platforms.platform import select_platform
from megaswift.tasks.catalogue import make_task, trained_model
from megaswift.training.context import context_share, place_context
from megaswift.training.engine import Engine
from megaswift.training.feed import TrainFeed
from megaswift.training.freeze import freeze, open_modules
from megaswift.training.gradient_starts import start_from_gradients
from megaswift.training.lisa import DrawLayers, open_layers
from megaswift.training.loop import Progress, Step
from megaswift.training.optimizer import build_optimizer, wrap_chunks
from megaswift.training.reference import reference_copy, teacher_copy
from megaswift.training.saver import Saver
from megaswift.training.schedule import build_schedule
from megaswift.training.validations import Validations

WORDS = (119, 5)  # of generative rerankers; with tp=2 each on another rank
Curve = list[tuple[float, float]]  # (loss, gradient norm) of each step


@dataclass(frozen=True, kw_only=True)
class Case:
    """One short run: section name -> settings that differ from the defaults."""

    name: str
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    pad_to_multiple: int = 1  # more padding than the layout needs, so that every layout has the same
    task: str = "sft"

    def run_config(self, folder: Path) -> RunConfig:
        """Return the settings of the run on the model in `folder`."""
        values: dict[str, dict[str, Any]] = {
            "model": {"model": str(folder), "torch_dtype": "float32"},
            "data": {"dataset": ["synthetic"], "max_length": 64},
            "optimizer": {"lr": 1e-3, "lr_decay_style": "constant"},
            "training": {"global_batch_size": 8, "train_iters": 20},
            "logging": {"report_to": ["none"]},
        }
        run = RunConfig(task=self.task)
        for section in {*values, *self.settings}:
            changes = {**values.get(section, {}), **self.settings.get(section, {})}
            run = replace(run, **{section: replace(getattr(run, section), **changes)})
        return run


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A run's parts, so that a test can go on with them."""

    run: RunConfig
    meta: ModelMeta
    layout: Layout
    engine: Engine
    feed: TrainFeed


def synthetic_set(*, entries: int = 23, vocab: int = 131, longest: int = 40) -> EncodedSet:
    """Return documents of random tokens and lengths; about a third of the tokens carries no loss."""
    generator = np.random.default_rng(7)
    lengths = generator.integers(3, longest + 1, entries)
    tokens = int(lengths.sum())
    return EncodedSet(
        input_ids=generator.integers(3, vocab, tokens).astype(np.int32),
        loss_weights=(generator.random(tokens) > 0.3).astype(np.uint8),
        starts=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        samples=np.arange(entries, dtype=np.int64),
    )


def synthetic_rows(run: RunConfig) -> EncodedSet:
    """Return rows of random tokens for the task of a run."""
    if run.task == "rlhf":
        return synthetic_judged(run.preference.rlhf_type)
    if run.model.task_type == "embedding":
        texts = texts_of_a_row(run)
        return replace(synthetic_set(entries=8 * texts), per_row=texts)
    if run.model.task_type in RERANKERS:
        return synthetic_groups(run)
    return synthetic_labelled(run.model) if run.model.task_type == "seq_cls" else synthetic_set()


def synthetic_groups(run: RunConfig, *, rows: int = 8) -> EncodedSet:
    """Return rows of random tokens as groups of documents, of which some rows have fewer than others."""
    most, per_row = 1 + run.reranker.max_negative_samples, texts_of_a_row(run)
    sizes = np.array(
        [[2 + (row + group) % (most - 1) for group in range(per_row // most)] for row in range(rows)]
    )
    plain = synthetic_set(entries=int(sizes.sum()))
    lengths = np.zeros((rows, per_row), np.int64)
    is_there = np.arange(per_row) < sizes.sum(1)[:, None]
    lengths[is_there] = plain.lengths
    return replace(
        plain,
        loss_weights=np.zeros_like(plain.loss_weights),
        starts=np.concatenate([[0], np.cumsum(lengths)]),
        samples=np.repeat(np.arange(rows), per_row),
        per_row=per_row,
        targets=(sizes[:, 0] if per_row == most else sizes).astype(np.float32),
    )


def synthetic_labelled(model: ModelConfig, *, rows: int = 8) -> EncodedSet:
    """Return documents of random tokens with labels, or numbers, of the kind that the model's head predicts."""
    labels = model.num_labels or 1
    table = np.random.default_rng(3).random((rows, labels))
    targets = {
        "single_label_classification": table.argmax(1),
        "multi_label_classification": table > 0.5,
        "regression": table,
    }[model.problem]
    return replace(synthetic_set(entries=rows), targets=targets.astype(np.float32))


def synthetic_judged(kind: str, *, rows: int = 8) -> EncodedSet:
    """Return rows of random tokens as a loss of `kind` reads them: pairs, or answers, for KTO with labels; answers end them."""
    per_row = 2 if kind in PAIRED else 1
    plain = synthetic_set(entries=rows * per_row)
    weights = np.zeros_like(plain.loss_weights)
    for start, end in pairwise(plain.starts.tolist()):
        weights[start + 1 + (end - start) // 3 : end] = 1
    encoded = replace(plain, loss_weights=weights, per_row=per_row)
    if kind != "kto":
        return encoded
    labels = (np.arange(rows) % 3 == 0).astype(np.float32)
    return replace(encoded, targets=labels, mismatched=mismatched_answers(encoded, max_length=40))


@contextmanager
def prepared(
    folder: Path, case: Case, *, encoded: EncodedSet | None = None, updates: int = 0
) -> Iterator[Trained]:
    """Yield model, optimizer and data of a case on this rank, with weights from `folder`; free them and the groups after.

    Documents are synthetic unless given. `updates` is where a resumed run goes on.

    Megatron's DDP keeps the model, parts of which keep the graph of the last step, whose accumulators have hooks that keep
    the DDP: a cycle through C++ that no collector sees. It would also keep gloo's groups, which poll in threads of their own
    and slow every later test down.
    """
    trained = _prepare(folder, case, encoded, updates)
    yield trained
    for chunk in trained.engine.chunks:
        vars(chunk).clear()
    process_groups.destroy()


def _prepare(folder: Path, case: Case, encoded: EncodedSet | None, updates: int) -> Trained:
    platform = select_platform("cpu")
    meta = get_model_meta(folder)
    resolved = resolve(case.run_config(folder), meta, dist.get_world_size(), platform.name)
    run = resolved.config
    if encoded is None:
        encoded = synthetic_rows(run)
    meta = trained_model(run, meta, pad_id=0)
    layout = place_context(
        run,
        meta,
        resolved.layout,
        platform,
        lengths=encoded.lengths,
        rows=len(encoded),
        ranks_per_node=dist.get_world_size(),
    )
    process_groups.initialise(layout, seed=run.training.seed, timeout_min=3)
    process_groups.nest_context(layout, timeout_min=3)
    chunks = build_model(meta, run, layout, platform)
    if run.tuner.tuner_type == "lora":
        modules = adapted_modules(meta, run.tuner)
        apply_lora(chunks, run.tuner, meta, seed=run.training.seed, modules=modules)
        if run.tuner.modules_to_save:
            open_modules(chunks, meta, layout, dist.get_rank(), run.tuner)
    if run.freeze.chooses:
        freeze(chunks, meta, layout, dist.get_rank(), run.freeze)
    load_weights(chunks, meta, layout, dist.get_rank(), folder)
    finish_tuner(chunks, run.tuner, device=platform.device, seed=run.training.seed, fresh=True)
    reference = reference_copy(run, meta, layout, platform, group=None) if needs_reference(run) else None
    teacher = teacher_copy(run, meta, layout, platform, group=None) if has_teacher_here(run) else None
    if run.lisa.lisa_activated_layers:
        open_layers(chunks, run, updates=updates)
    task = make_task(run, meta, reference=reference, teacher=teacher, words=WORDS)
    settings = BatchSettings(
        global_batch_size=run.training.global_batch_size or 1,
        micro_batch_size=run.training.micro_batch_size,
        packing=run.data.packing,
        packing_length=run.data.packing_length,
        padding_free=run.data.padding_free,
        pad_to_multiple=lcm(
            case.pad_to_multiple,
            token_multiple(run.precision)
            * pad_multiple(cp=layout.cp, tp=layout.tp, sequence_parallel=layout.sequence_parallel),
        ),
    )
    data, share = TrainData(encoded, settings), context_share(layout)
    if run.tuner.starts_from_gradients:
        first = list(data.micro_batches(0, dp_rank=parallel_state.get_data_parallel_rank(), dp=layout.dp))
        start_from_gradients(chunks, run, meta, first, task=task, share_of_context=share)
    wrapped = wrap_chunks(chunks, run)
    optimizer = build_optimizer(wrapped, run)
    schedule = build_schedule(optimizer, run.optimizer, total_steps=run.training.train_iters or 1)
    engine = Engine(wrapped, optimizer, schedule, task, measure=count, share=share)
    feed = TrainFeed(
        data,
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp=layout.dp,
        noise_alpha=run.training.neftune_noise_alpha,
    )
    return Trained(run=run, meta=meta, layout=layout, engine=engine, feed=feed)


def count(batch: MicroBatch) -> tuple[int, float]:
    """Measure a micro batch without a cost model."""
    return batch.input_ids.numel(), 0.0


def steps(trained: Trained, first: int, last: int) -> Curve:
    """Make optimizer steps `first` to `last` - 1 and return (loss, gradient norm) of each."""
    curve = []
    for step in range(first, last):
        result = trained.engine.train_step(trained.feed.batch(step * trained.feed.items_per_step))
        assert result.grad_norm is not None
        curve.append((result.loss, result.grad_norm))
        if trained.run.lisa.lisa_activated_layers:
            progress = Progress(step=step + 1, updates=step + 1)
            made = Step(progress=progress, result=result, time_s=0.0, is_last=False)
            DrawLayers(trained.run, trained.engine).after_step(made)
    return curve


def curves(rank: int, world_size: int, folder: Path, cases: Sequence[Case]) -> dict[str, Curve]:
    """Return the curve of every case, one after the other in the same processes."""
    found = {}
    for case in cases:
        torch.manual_seed(1)
        with prepared(folder, case) as trained:
            found[case.name] = steps(trained, 0, trained.run.training.train_iters or 1)
    return found


def export_gradients(rank: int, world_size: int, folder: Path, cases: Sequence[Case], output: Path) -> None:
    """Write every case's gradients of the first step as a Hugging Face model, `output`/<its name>: whole tensors, whatever the layout.

    Names and cuts of weights are those of their gradients. The learning rate is 0 and nothing is clipped, so that the
    gradients stay as the optimizer reads them.
    """
    for case in cases:
        torch.manual_seed(1)
        still = {**case.settings.get("optimizer", {}), "lr": 0.0, "clip_grad": 0.0}
        settings = {**case.settings.get("parallel", {}), "use_distributed_optimizer": False}
        first = replace(case, settings={**case.settings, "optimizer": still, "parallel": settings})
        with prepared(folder, first) as trained:
            steps(trained, 0, 1)
            chunks = [chunk.module for chunk in trained.engine.chunks]
            for chunk in chunks:
                for parameter in chunk.parameters():
                    parameter.data.copy_(parameter.main_grad)
            export_hf(chunks, trained.meta, trained.layout, rank, output / case.name, dtype="float32")


def saver_of(trained: Trained, output_dir: Path) -> Saver:
    """Return what saves a run, without an export."""
    return Saver(
        run=trained.run,
        meta=trained.meta,
        layout=trained.layout,
        store=Store(output_dir),
        engine=trained.engine,
        writers={},
        validations=Validations(),
    )


def saved_curve(
    rank: int, world_size: int, folder: Path, case: Case, output_dir: Path, at: int, last: int
) -> Curve:
    """Train to step `last` without a break, saving after step `at`; return the steps after it."""
    with prepared(folder, case) as trained:
        steps(trained, 0, at)
        items = at * trained.feed.items_per_step
        saver_of(trained, output_dir)(Progress(step=at, updates=at, consumed_samples=items))
        return steps(trained, at, last)


def resumed_curve(rank: int, world_size: int, folder: Path, case: Case, output_dir: Path, last: int) -> Curve:
    """Go on from the newest checkpoint, maybe under another layout, to step `last`; return the steps made."""
    checkpoint = Store(output_dir).latest_complete()
    assert checkpoint is not None
    with prepared(folder, case, updates=checkpoint.manifest.updates) as trained:
        for chunk in trained.engine.chunks:  # what is not read shows
            for parameter in chunk.parameters():
                if parameter.requires_grad or chunk.module.all_trains:
                    parameter.data.fill_(float("nan"))
        load_checkpoint(
            checkpoint,
            chunks=[chunk.module for chunk in trained.engine.chunks],
            optimizer=trained.engine.optimizer,
            layout=trained.layout,
        )
        trained.engine.schedule.step(checkpoint.manifest.updates)
        return steps(trained, checkpoint.manifest.step, last)


def temporary_folder() -> Path:
    """Return a folder that the caller removes."""
    return Path(tempfile.mkdtemp(prefix="megaswift-test-"))
