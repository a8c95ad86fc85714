"""A training run from settings to checkpoint; the order of its parts is the order of this file."""

import os
import shutil
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist
from megatron.core import parallel_state

from megaswift.checkpoint.resume import check_identity, find_checkpoint, load_checkpoint
from megaswift.checkpoint.store import Checkpoint, Store
from megaswift.config.freeze import FreezeConfig
from megaswift.config.reference import compares, distils
from megaswift.config.rules import ResolvedRun, resolve
from megaswift.config.run import RunConfig
from megaswift.converters.lora_targets import adapted_modules, whole_tensors
from megaswift.converters.new_tokens import rows_that_do_not_train
from megaswift.converters.peft_folder import read_adapter
from megaswift.converters.selection import trained_elements
from megaswift.data.batches import TrainData
from megaswift.launch.environment import RankEnv
from megaswift.launch.heartbeat import Heartbeat, empty_folder
from megaswift.launch.join import this_rank
from megaswift.launch.layout import layout_here
from megaswift.launch.preflight import check_teacher, model_of
from megaswift.logs import get_logger, setup_logging
from megaswift.mcore import process_groups
from megaswift.metadata.meta import ModelMeta
from megaswift.metadata.read import get_model_meta
from megaswift.parallel.agreement import agree, agree_on_first, alike
from megaswift.parallel.layout import Layout
from megaswift.platforms.fp8 import check_fp8, format_for, software_here
from megaswift.platforms.platform import Platform, init_distributed, select_platform
from megaswift.tasks.catalogue import make_task, trained_model
from megaswift.tasks.task import run_model
from megaswift.training.allocation import check_allocation
from megaswift.training.beside import (
    account_of,
    log_of,
    movers,
    observers,
    reporters_of,
    saving,
    services_of,
    wall_time_of,
)
from megaswift.training.callbacks import Save
from megaswift.training.context import context_share, place_context, ranks_of_this_node
from megaswift.training.engine import Engine
from megaswift.training.feed import ValidationFeed
from megaswift.training.feeds import make_feed, make_predictions
from megaswift.training.following import reference_writers
from megaswift.training.gradient_starts import start_from_gradients
from megaswift.training.guides import load_guides
from megaswift.training.lisa import open_layers
from megaswift.training.loop import Callback, Progress, train_loop
from megaswift.training.model import load_model, weights_of
from megaswift.training.optimizer import build_optimizer, shards_optimizer, wrap_chunks
from megaswift.training.own_callbacks import load_own_callbacks
from megaswift.training.reference import References
from megaswift.training.saver import Saver
from megaswift.training.schedule import build_schedule
from megaswift.training.setup import (
    TOKENISED,
    Sets,
    export_writers,
    identity_of,
    load_sets,
    measurer,
    model_folder,
    share_folder,
    with_references,
)
from megaswift.training.signals import Interrupt
from megaswift.training.stream import load_stream
from megaswift.training.validations import check_metric, criterion_of, resumed_validations

logger = get_logger(__name__)

# One rank tokenises, or reads a large model from a slow disk, while the others wait.
PATIENCE = timedelta(hours=24)
HEARTBEATS = "heartbeat"  # below the run's folder


@dataclass(frozen=True, kw_only=True)
class RunSummary:
    """How a run ended; the same on every rank."""

    output_dir: Path
    step: int
    total_steps: int
    checkpoint: Path | None  # the newest complete one
    interrupted: bool  # told to stop before its last step


def train(run: RunConfig, *, given: frozenset[str] = frozenset()) -> RunSummary:
    """Train as one rank of the world that this process belongs to, or alone; every rank calls it.

    A layout that the planner chooses leaves the flags alone that the user has `given`.
    Raises UserError, on the rank that found it; others then leave with its exit code.
    """
    here = this_rank(os.environ)
    platform = select_platform(run.launch.platform, local_rank=here.local_rank)
    setup_logging(rank=here.rank, verbose=run.logging.verbose)
    init_distributed(
        platform,
        rank=here.rank,
        world_size=here.world_size,
        master=here.master,
        timeout_min=run.parallel.ddp_timeout_min,
    )
    check_allocation(platform, local_rank=here.local_rank)
    summary = train_in_world(agree_on_first(lambda: _with_layout(run, platform, here, given)), platform)
    # Not after a failure: leaving a group is a collective for some back ends, and a failed rank enters none.
    process_groups.destroy()
    dist.destroy_process_group()
    return summary


def _with_layout(run: RunConfig, platform: Platform, here: RankEnv, given: frozenset[str]) -> RunConfig:
    """Return the run with the layout that the planner chooses where none is named."""
    if not run.launch.auto_layout:
        return run
    nodes = here.world_size // here.local_world_size
    on_gpus = platform.name == "cuda"
    chosen = layout_here(
        run, model_of(run), nodes=nodes, ranks_per_node=here.local_world_size, on_gpus=on_gpus
    )
    if chosen is None:
        return run
    logger.info("%s", chosen.note)
    return chosen.adopt(run, given)


def train_in_world(run: RunConfig, platform: Platform) -> RunSummary:
    """Train as one rank of the world of torch.distributed; every rank calls it. Raises UserError."""
    patient = dist.new_group(backend="gloo", timeout=PATIENCE)
    folder = model_folder(run, group=patient)
    meta, resolved = agree(lambda: _resolve(run, platform, folder), group=patient)
    asked, run, layout = run, resolved.config, resolved.layout
    adapter = alike(lambda: read_adapter(run.tuner.adapters[0], meta)) if run.tuner.adapters else None
    if adapter is not None:
        run = replace(run, tuner=adapter.adopt(run.tuner, meta))
    for note in resolved.notes:
        logger.info("%s", note)
    process_groups.initialise(layout, seed=run.training.seed, timeout_min=run.parallel.ddp_timeout_min)

    output_dir = Path(run.checkpoint.output_dir)
    share_folder(output_dir)
    store = Store(output_dir, criterion=criterion_of(run))
    checkpoint = agree_on_first(lambda: _checkpoint_to_resume(store, run, meta))
    if run.data.streaming:
        sets = load_stream(run, meta, layout, output_dir=output_dir, group=patient, checkpoint=checkpoint)
    else:
        sets = load_sets(run, meta, layout, output_dir=output_dir, group=patient)
    layout = agree_on_first(
        lambda: place_context(
            run,
            meta,
            layout,
            platform,
            lengths=sets.lengths,
            rows=sets.num_items,
            ranks_per_node=ranks_of_this_node(),
        )
    )
    process_groups.nest_context(layout, timeout_min=run.parallel.ddp_timeout_min)
    start = _progress(checkpoint)
    services = agree(lambda: services_of(run, output_dir, start=start), group=patient)
    own = load_own_callbacks(run, group=patient)
    if compares(run) and run.preference.precompute_ref_log_probs:
        references = References(
            run=run, meta=meta, layout=layout, platform=platform, output_dir=output_dir, group=patient
        )
        sets = with_references(sets, references)
    guides = load_guides(run, meta, layout, platform, checkpoint=checkpoint, group=patient)
    fresh = checkpoint is None
    chunks = load_model(
        run,
        meta,
        layout,
        platform,
        adapter=adapter,
        fresh=fresh,
        group=patient,
        weights=weights_of(run, meta),
    )
    if run.lisa.lisa_activated_layers:
        open_layers(chunks, run, updates=start.updates)
    agree_on_first(lambda: empty_folder(output_dir / HEARTBEATS))
    heartbeat = Heartbeat(
        output_dir / HEARTBEATS,
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        patience_s=run.launch.hang_timeout_seconds or 0.0,
    )
    forward = heartbeat.during("a forward pass", run_model)
    task = make_task(
        run,
        meta,
        reference=guides.reference,
        teacher=guides.teacher,
        call_in=guides.call_in,
        run_model=forward,
    )
    dp_rank = parallel_state.get_data_parallel_rank()
    if fresh and run.tuner.starts_from_gradients:
        first = agree(lambda: list(sets.train.micro_batches(0, dp_rank=dp_rank, dp=layout.dp)), group=patient)
        share = context_share(layout)
        alike(lambda: start_from_gradients(chunks, run, meta, first, task=task, share_of_context=share))
    wrapped = wrap_chunks(chunks, run)
    optimizer = build_optimizer(wrapped, run)
    total_steps = _total_steps(run, sets, start)
    schedule = alike(lambda: build_schedule(optimizer, run.optimizer, total_steps=total_steps))
    asked_of = guides.served if distils(run) else None
    engine = Engine(
        wrapped,
        optimizer,
        schedule,
        task,
        measure=measurer(run, meta),
        share=context_share(layout),
        teach=heartbeat.patiently("asking the teacher", asked_of.teach) if asked_of else None,
    )
    if checkpoint is not None:
        load_checkpoint(checkpoint, chunks=chunks, optimizer=optimizer, layout=layout)
        schedule.step(start.updates)
        logger.info("resumed from %s at step %d", checkpoint.folder, start.step)

    feed = make_feed(
        run,
        meta,
        layout,
        engine,
        sets,
        guides,
        checkpoint=checkpoint,
        run_model=forward,
        group=patient,
    )
    validations = resumed_validations(run, checkpoint)
    if validations.are_enough(run.logging.early_stop_interval):
        total_steps = start.step  # it has ended
    reporters = [*reporters_of(run, output_dir, start=start, total_steps=total_steps), *services]
    dtype = asked.model.torch_dtype or meta.dtype
    saver = Saver(
        run=run,
        meta=meta,
        layout=layout,
        store=store,
        engine=engine,
        writers={
            **export_writers(run, meta, layout, chunks, dtype=dtype),
            **feed.writers(),
            **reference_writers(run, meta, layout, guides.reference),
        },
        validations=validations,
        group=patient,
        tell=None if own is None else own.after_save,
    )
    moving = movers(run, engine, guides.reference)
    validation = None
    if sets.val is not None and run.logging.eval_iters:
        validation = ValidationFeed(sets.val, dp_rank=dp_rank, dp=layout.dp, limit=run.logging.eval_iters)
    predict = make_predictions(run, meta, layout, engine, sets, feed, checkpoint=checkpoint, group=patient)
    validates = validation is not None or predict is not None
    interrupt = Interrupt()
    wall_time = wall_time_of(
        run, interrupt, feed, start=start, validates=validates, under_way=lambda: saver.is_under_way
    )
    account = account_of(run, output_dir, start, on_gpus=platform.name == "cuda")
    log = log_of(run, platform, feed, reporters)
    looking = observers(
        run, platform, engine, feed, validation, reporters, heartbeat, validations, predict, own
    )
    callbacks: list[Callback] = [
        log,
        *([] if own is None else [own]),
        *looking,
        *moving,
        *([] if account is None else [account]),
        Save(
            saver,
            timed=lambda save: wall_time.timed(save if account is None else account.timed(save)),
            due=saving(run, feed),
            stop_after_first=run.checkpoint.exit_after_save,
        ),
        wall_time,
    ]
    _announce(meta, layout, run, start=start, total_steps=total_steps)
    with interrupt, heartbeat, saver.completing():
        progress = train_loop(
            engine,
            feed,
            start=start,
            total_steps=total_steps,
            callbacks=callbacks,
            interrupt=wall_time,
            pulse=heartbeat,
        )
        log.finish()
    if validations.are_enough(run.logging.early_stop_interval) or (own is not None and own.have_ended):
        total_steps = progress.step
    feed.close()
    for reporter in reporters:
        reporter.close()
    if account is not None:
        account.close(progress, total_steps=total_steps)
    return _summary(store, progress, total_steps)


def _resolve(run: RunConfig, platform: Platform, folder: str | Path) -> tuple[ModelMeta, ResolvedRun]:
    meta = get_model_meta(
        folder,
        revision=run.model.model_revision,
        use_hf=run.model.use_hf,
        trust_remote_code=run.model.trust_remote_code,
    )
    software = software_here(platform.device.index or 0) if platform.name == "cuda" else None
    precision = run.precision
    fp8, note = format_for(
        precision.fp8_format, precision.fp8_recipe, hidden_size=meta.hidden_size, software=software
    )
    if software is not None and fp8 != "none":
        check_fp8(precision.fp8_recipe, software)
    run = replace(run, precision=replace(precision, fp8_format=fp8))
    world_size = dist.get_world_size()
    resolved = resolve(run, meta, world_size, platform.name)
    check_teacher(resolved.config, world_size=world_size, platform_name=platform.name)
    meta = trained_model(run, meta)
    adapted_modules(meta, run.tuner)  # names that the model does not have are found here
    whole = whole_tensors(meta, run.tuner)
    check_metric(resolved.config, meta)
    notes = [*resolved.notes, *([note] if note else []), *rows_that_do_not_train(run, meta, whole)]
    if run.freeze.chooses:
        trained, everything = (
            trained_elements(meta, run.freeze).total,
            trained_elements(meta, FreezeConfig()).total,
        )
        notes.append(f"{trained:,} of {everything:,} parameters train ({trained / everything:.2%})")
    return meta, replace(resolved, notes=tuple(notes))


def _checkpoint_to_resume(store: Store, run: RunConfig, meta: ModelMeta) -> Checkpoint | None:
    store.clean()
    checkpoint = find_checkpoint(store, run.checkpoint.resume)
    if checkpoint is not None:
        check_identity(checkpoint, identity_of(run, meta))
    return checkpoint


def _progress(checkpoint: Checkpoint | None) -> Progress:
    if checkpoint is None:
        return Progress()
    done = checkpoint.manifest
    return Progress(step=done.step, updates=done.updates, consumed_samples=done.consumed_samples)


def _total_steps(run: RunConfig, sets: Sets, start: Progress) -> int:
    """Return the steps of the whole run: --train_iters, or what is left of the epochs after `start`."""
    if run.training.train_iters is not None:
        return run.training.train_iters
    epochs = 1.0 if run.training.num_train_epochs is None else run.training.num_train_epochs
    assert isinstance(sets.train, TrainData), "a stream has --train_iters: config/data_rules.py"
    size = sets.train.settings.global_batch_size
    whole = sets.train.num_steps(epochs * run.rollout.num_iterations)
    # The global batch may have changed since the checkpoint: count on from the samples that it has seen.
    return start.step + max(0, whole - start.consumed_samples // size)


def _announce(meta: ModelMeta, layout: Layout, run: RunConfig, *, start: Progress, total_steps: int) -> None:
    axes = {
        "dp": layout.dp,
        "tp": layout.tp,
        "pp": layout.pp,
        "vpp": layout.vpp,
        "cp": layout.cp,
        "ep": layout.ep,
        "etp": layout.etp,
    }
    named = " ".join(f"{name}={size}" for name, size in axes.items() if size > 1) or "one rank"
    logger.info(
        "training %s, %s, %s, %s: steps %d to %d of %s samples",
        meta.model_type,
        run.tuner.tuner_type,
        run.model.torch_dtype,
        named + (", distributed optimizer" if shards_optimizer(run) and layout.dp > 1 else ""),
        start.step + 1,
        total_steps,
        run.training.global_batch_size,
    )


def _summary(store: Store, progress: Progress, total_steps: int) -> RunSummary:
    def finish() -> RunSummary:
        for folder in (TOKENISED, HEARTBEATS):
            shutil.rmtree(store.output_dir / folder, ignore_errors=True)
        newest = store.latest_complete()
        return RunSummary(
            output_dir=store.output_dir,
            step=progress.step,
            total_steps=total_steps,
            checkpoint=newest.folder if newest else None,
            interrupted=progress.step < total_steps,
        )

    return agree_on_first(finish)
