"""What goes on beside the steps of a run: reporting, validating, moving other models and layers, saving, and watching the clock."""

import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state

from megaswift.config.run import RunConfig
from megaswift.launch.governor import Governor
from megaswift.launch.heartbeat import Heartbeat
from megaswift.launch.ledger import beginning
from megaswift.launch.slurm import job_end
from megaswift.parallel.agreement import alike
from megaswift.platforms.platform import Platform
from megaswift.training.account import Account
from megaswift.training.callbacks import Evaluate, Log, Predict
from megaswift.training.due import Due
from megaswift.training.engine import Engine
from megaswift.training.feed import TrainFeed, ValidationFeed
from megaswift.training.following import FollowReference
from megaswift.training.lisa import DrawLayers
from megaswift.training.loop import Callback, Progress
from megaswift.training.own_callbacks import OwnCallbacks
from megaswift.training.reporters import JsonLines, PlainLines, ProgressBar, Reporter, TensorBoard
from megaswift.training.services import SERVICES
from megaswift.training.signals import Interrupt
from megaswift.training.spikes import SpikeGuard
from megaswift.training.stragglers import Stragglers, places_of_ranks
from megaswift.training.validations import Validations
from megaswift.training.wall_time import WallTime


def services_of(run: RunConfig, output_dir: Path, *, start: Progress) -> list[Reporter]:
    """Return where lines go beyond this machine, on rank 0. Raises ConfigError where a service refuses."""
    asked = [name for name in run.logging.report_to if name in SERVICES] if dist.get_rank() == 0 else []
    return [SERVICES[name](run, output_dir, resumed_step=start.step) for name in dict.fromkeys(asked)]


def reporters_of(run: RunConfig, output_dir: Path, *, start: Progress, total_steps: int) -> list[Reporter]:
    """Return where lines go on this machine, on rank 0."""
    if dist.get_rank() != 0:
        return []
    reporters: list[Reporter] = [JsonLines(output_dir, resumed_step=start.step)]
    if "tensorboard" in run.logging.report_to:
        folder = Path(run.logging.tensorboard_dir or output_dir / "runs")
        reporters.append(TensorBoard(folder, resumed_step=start.step))
    if sys.stderr.isatty():
        reporters.append(ProgressBar(total_steps=total_steps, start=start.step))
    else:
        reporters.append(PlainLines(total_steps=total_steps))
    return reporters


def log_of(run: RunConfig, platform: Platform, feed: TrainFeed, reporters: Sequence[Reporter]) -> Log:
    """Return what reports the steps."""
    every, verbose = run.logging.logging_steps, run.logging.verbose
    return Log(feed, reporters, every=every, device=platform.device, with_samples=verbose)


def observers(
    run: RunConfig,
    platform: Platform,
    engine: Engine,
    feed: TrainFeed,
    validation: ValidationFeed | None,
    reporters: Sequence[Reporter],
    heartbeat: Heartbeat,
    validations: Validations,
    predict: Predict | None,
    own: OwnCallbacks | None,
) -> list[Callback]:
    """Return what looks at every step beside the log and changes nothing in it; a spike ends the run."""
    callbacks: list[Callback] = []
    if dist.get_world_size() > 1:
        callbacks.append(
            Stragglers(
                lambda: heartbeat.work_s,
                reporters,
                peers=parallel_state.get_pipeline_model_parallel_rank(),
                places=places_of_ranks(platform.device),
                every=run.logging.logging_steps,
                device=platform.device,
            )
        )
    if run.training.spike_factor is not None:
        callbacks.append(SpikeGuard(run.training.spike_factor))
    if validation is not None or predict is not None:
        patience = run.logging.early_stop_interval
        callbacks.append(
            Evaluate(
                engine,
                feed,
                validation,
                reporters,
                due=validating(run, feed),
                found=validations,
                patience=patience,
                predict=predict,
                tell=None if own is None else own.after_validation,
            )
        )
    return callbacks


def movers(run: RunConfig, engine: Engine, reference: Sequence[Any] | None) -> list[Callback]:
    """Return what changes models between steps, before a checkpoint is saved; every rank calls it. Raises ConfigError."""
    moving: list[Callback] = [DrawLayers(run, engine)] if run.lisa.lisa_activated_layers else []
    if run.preference.sync_ref_model:
        assert reference is not None, "config/preference_rules.py"
        steps, alpha = run.preference.ref_model_sync_steps, run.preference.ref_model_mixup_alpha
        moving.append(alike(lambda: FollowReference(engine, reference, every_steps=steps, alpha=alpha)))
    return moving


def account_of(run: RunConfig, output_dir: Path, start: Progress, *, on_gpus: bool) -> Account | None:
    """Return what keeps the ledger, on rank 0."""
    if dist.get_rank() != 0:
        return None
    dtype, world_size = run.model.torch_dtype or "bfloat16", dist.get_world_size()
    facts = beginning(os.environ, dtype=dtype, on_gpus=on_gpus, world_size=world_size)
    every = run.logging.logging_steps
    return Account(output_dir, every=every, clock=time.time, start={**facts, "step": start.step})


def wall_time_of(
    run: RunConfig,
    interrupt: Interrupt,
    feed: TrainFeed,
    *,
    start: Progress,
    validates: bool,
    under_way: Callable[[], bool],
) -> WallTime:
    """Return what tells the run to stop: a signal, or the end of its time on a cluster."""
    # One rank watches the clock: its word reaches the others with the step's totals.
    end = job_end(os.environ) if dist.get_rank() == 0 else None
    return WallTime(
        interrupt,
        Governor(start=time.time(), end=end),
        start=start,
        saves=saving(run, feed),
        validates=validating(run, feed) if validates else Due(feed),
        under_way=under_way,
        clock=time.time,
    )


def saving(run: RunConfig, feed: TrainFeed) -> Due:
    """Return when checkpoints are saved."""
    chosen = run.checkpoint
    return Due(
        feed,
        every_steps=chosen.save_steps if chosen.save_strategy == "steps" else None,
        every_epoch=chosen.save_strategy == "epoch",
    )


def validating(run: RunConfig, feed: TrainFeed) -> Due:
    """Return when the run is validated."""
    chosen = run.logging
    by_steps = chosen.eval_strategy == "steps"
    return Due(
        feed, every_steps=chosen.eval_steps if by_steps else None, every_epoch=chosen.eval_strategy == "epoch"
    )
