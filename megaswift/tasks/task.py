"""What a task is to the training loop, and how a micro batch goes through the model.

Letters: B batch, S sequence, D model size.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func

from megaswift.data.batches import MicroBatch
from megaswift.models.attention import documents_of
from megaswift.models.neftune import noise_of

MAXIMUM = "/max"  # ends the name of what is logged as the greatest value, which is never negative
# What Megatron's schedule makes of a micro batch: the sum of losses to differentiate, by how many it is to be divided (int32,
# summed over the global batch), and what is logged. Each entry of the log is [sum, number], float64, or [maximum, 1] of a name
# that ends in MAXIMUM; "loss" is the loss.
Loss = tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]
# (micro batch, this rank's chunk of the model) -> the chunk's output
RunModel = Callable[[MicroBatch, Any], torch.Tensor]
CallIn = Callable[[], AbstractContextManager[None]]  # in whose context a model is in memory


class Task(Protocol):
    """Batch in, loss out."""

    @property
    def metrics(self) -> Sequence[str]:
        """Names of what is logged beside the loss: means and maxima, and what `summary` adds itself; the same on every rank."""
        ...

    def prepare(self, batches: list[MicroBatch], chunks: Sequence[Any]) -> list[MicroBatch]:
        """Return the micro batches of a global batch with what the loss needs beside them; `chunks` is the model.

        Every rank of the world calls it before each training step and each validation step.
        """
        ...

    def forward_step(self, data_iterator: Iterator[MicroBatch], model: Any) -> tuple[torch.Tensor, Any]:
        """Run one micro batch through this rank's chunk; the signature is that of Megatron's schedules.

        Returns the chunk's output, and the function that makes a Loss of it.
        """
        ...

    def summary(self, means: dict[str, float]) -> dict[str, float]:
        """Return what is logged, given the means over a global batch or a validation; a metric that nothing entered is absent.

        Every rank of the world calls it once for each."""
        ...


def run_model(batch: MicroBatch, model: Any) -> torch.Tensor:
    """Run one micro batch through this rank's chunk of the model.

    Returns each token's cross-entropy [B, S], float32, zero where the mask is zero, on the last pipeline stage, and hidden
    states [S, B, D] elsewhere.
    """
    device = next(model.parameters()).device
    output: torch.Tensor = model(
        batch.input_ids.to(device, non_blocking=True),
        batch.position_ids.to(device, non_blocking=True),
        None,  # causal; documents are kept apart by their lengths, never by a quadratic mask
        labels=batch.labels.to(device, non_blocking=True),
        loss_mask=batch.loss_mask.to(device, non_blocking=True),
        packed_seq_params=documents_of(batch, device),
        noise=noise_of(batch),
        experts=batch.experts,
    )
    return output


def run_schedule(
    chunks: Sequence[Any], batches: list[MicroBatch], forward_step: Callable[..., Any], **options: Any
) -> list[Any]:
    """Run micro batches through all pipeline stages; every rank of the world calls it alike.

    Returns what the last stage makes of each micro batch, and [] elsewhere. `options` are those of Megatron's schedules.
    """
    # Every chunk of an interleaved schedule reads the same micro batches through an iterator of its own.
    iterators = [iter(batches) for _ in chunks]
    batch_size, seq_len = batches[0].input_ids.shape
    results: list[Any] = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iterators if len(iterators) > 1 else iterators[0],
        model=list(chunks),
        num_microbatches=len(batches),
        seq_length=seq_len,
        micro_batch_size=batch_size,
        **options,
    )
    return results


@torch.no_grad()
def look(
    chunks: Sequence[Any],
    batches: list[MicroBatch],
    keep: Callable[[MicroBatch, torch.Tensor], Any],
    *,
    run: RunModel,
    training: bool = False,
) -> list[Any]:
    """Run micro batches without gradients and, unless `training`, without dropout; return keep(batch, output) of each.

    Only the last pipeline stage has results; others return []. Every rank of the world calls it alike.
    """

    def forward_step(data_iterator: Iterator[MicroBatch], model: Any) -> tuple[torch.Tensor, Any]:
        batch = next(data_iterator)
        return run(batch, model), lambda output, non_loss_data: keep(batch, output)

    before = [chunk.training for chunk in chunks]
    for chunk in chunks:
        chunk.train(training)
    found = run_schedule(chunks, batches, forward_step, forward_only=True, collect_non_loss_data=True)
    for chunk, was_training in zip(chunks, before, strict=True):
        chunk.train(was_training)
    return found
