"""Next-token prediction: the loss of supervised fine-tuning, and of pre-training, where every token carries loss.

With p the probability of the next token it is -log p; or by dynamic fine-tuning -p log p, where no gradient goes through the
factor p: Wu et al. 2025 (arXiv 2508.05629).

Letters: B batch, S sequence.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch

from megaswift.data.batches import MicroBatch
from megaswift.tasks.task import Loss, RunModel, run_model


class NextToken:
    """The task of `megaswift sft` and `megaswift pt`."""

    metrics: tuple[str, ...] = ()

    def __init__(self, *, by_probability: bool = False, run: RunModel = run_model) -> None:
        """`by_probability` weighs losses by the probability of their tokens."""
        self._by_probability, self._run = by_probability, run

    def prepare(self, batches: list[MicroBatch], chunks: Sequence[Any]) -> list[MicroBatch]:
        """Return the batches as they are."""
        return batches

    def forward_step(self, data_iterator: Iterator[MicroBatch], model: Any) -> tuple[torch.Tensor, Any]:
        """Run one micro batch; its loss is token_loss."""
        batch = next(data_iterator)
        return self._run(batch, model), partial(self._loss, batch.loss_mask)

    def _loss(self, loss_mask_BS: torch.Tensor, losses_BS: torch.Tensor) -> Loss:
        if self._by_probability:
            losses_BS = losses_BS * torch.exp(-losses_BS.detach())
        return token_loss(loss_mask_BS, losses_BS)

    def summary(self, means: dict[str, float]) -> dict[str, float]:
        """Return nothing beside the loss."""
        return means


def token_loss(loss_mask_BS: torch.Tensor, losses_BS: torch.Tensor) -> Loss:
    """Return the weighted sum of the token losses, the number of tokens that carry loss, and both for the log.

    The three-tuple is what Megatron's calculate_per_token_loss asks for: it divides by the tokens of the global batch, so
    that every token weighs the same whichever rank saw it. `num_tokens` is int32, as the schedule accumulates it.
    """
    loss_mask_BS = loss_mask_BS.to(losses_BS.device, non_blocking=True)
    loss_sum = (losses_BS * loss_mask_BS).sum()
    num_tokens = (loss_mask_BS != 0).sum(dtype=torch.int32)
    return loss_sum, num_tokens, {"loss": torch.stack([loss_sum.detach().double(), num_tokens.double()])}
