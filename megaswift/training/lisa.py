"""Training a few layers at a time: Pan et al. 2024, LISA (arXiv 2403.17919), algorithm 1.

Gradients, optimizer state and float32 master weights exist for what trains alone: with every draw the model gets new gradient
buffers and a new optimizer. A drawn layer begins without moments; what always trains keeps its own, and the schedule goes on.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megaswift.checkpoint.state import (
    Owned,
    allocate_states,
    loss_scale,
    owned_by,
    restore_loss_scale,
    state_names,
)
from megaswift.config.run import RunConfig
from megaswift.logs import get_logger
from megaswift.models.causal_lm import CausalLM
from megaswift.training.engine import Engine
from megaswift.training.loop import Step
from megaswift.training.optimizer import DRAWN, build_optimizer, unwrap_chunks, wrap_chunks

logger = get_logger(__name__)


def drawn_layers(run: RunConfig, num_layers: int, *, updates: int) -> list[int]:
    """Return which layers of the whole model train after so many updates, in order; it depends on the run's seed and them alone."""
    key = (run.training.seed, updates // run.lisa.lisa_step_interval)
    numbers = np.random.Generator(np.random.Philox(np.random.SeedSequence(key))).random(num_layers)
    return sorted(numbers.argsort()[: run.lisa.lisa_activated_layers].tolist())


def open_layers(chunks: Sequence[CausalLM], run: RunConfig, *, updates: int) -> list[int]:
    """Let the drawn layers train, and no others; no rank talks to another. Returns the drawn ones of the whole model."""
    drawn = drawn_layers(run, chunks[0].config.num_layers, updates=updates)
    for chunk in chunks:
        chunk.layers_alike = False
        for layer in chunk.decoder.layers:
            for parameter in layer.parameters():
                if parameter.requires_grad:  # some are constants (models/activations.py)
                    setattr(parameter, DRAWN, True)
                if hasattr(parameter, DRAWN):
                    parameter.requires_grad_(layer.layer_number - 1 in drawn)
    return drawn


class DrawLayers:
    """A callback that draws the layers of the next steps; to be called before a checkpoint is saved."""

    def __init__(self, run: RunConfig, engine: Engine) -> None:
        self._run, self._engine = run, engine

    def after_step(self, step: Step) -> bool:
        """Draw where it is time; every rank of the world calls it, and all make new buffers."""
        updates = step.progress.updates
        if step.result.updated and updates % self._run.lisa.lisa_step_interval == 0:
            self._draw(updates)
        return False

    def _draw(self, updates: int) -> None:
        engine, run = self._engine, self._run
        scale = loss_scale(engine.optimizer)
        before = {
            parameter: owned_by(engine.optimizer, parameter)
            for chunk in engine.chunks
            for parameter in chunk.parameters()
            if parameter.requires_grad and not hasattr(parameter, DRAWN)
        }
        chunks = unwrap_chunks(engine.chunks, engine.optimizer)
        drawn = open_layers(chunks, run, updates=updates)
        wrapped = wrap_chunks(chunks, run)
        optimizer = build_optimizer(wrapped, run)
        allocate_states(optimizer, updates=updates)
        for parameter, owned in before.items():
            _hand_over(parameter, owned, optimizer)
        restore_loss_scale(optimizer, scale)
        engine.go_on_with(wrapped, optimizer)
        logger.debug("layers %s train from step %d", drawn, updates + 1)


@torch.no_grad()
def _hand_over(parameter: torch.Tensor, before: Owned | None, optimizer: Any) -> None:
    """Give a parameter its state back, which the optimizer before had; every data-parallel rank calls it.

    The distributed optimizer may now cut the parameter otherwise. What moves: each state once around the ranks, whole.
    """
    after = owned_by(optimizer, parameter)
    for name in state_names(optimizer, parameter):
        whole = torch.zeros(parameter.numel(), dtype=torch.float32, device=parameter.device)
        if before is not None:
            whole[before.start : before.stop] = before.states[name]
        if before is None or before.alone:
            dist.all_reduce(whole, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
        if after is not None:
            after.states[name].copy_(whole[after.start : after.stop])
