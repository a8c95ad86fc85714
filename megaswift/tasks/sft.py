"""Next-token prediction: the loss of supervised fine-tuning, and of pre-training, where every token carries loss.

Letters: B batch, S sequence.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from megaswift.data.batches import MicroBatch
from megaswift.models.attention import documents_of

# What Megatron's schedule makes of a micro batch: the loss to differentiate, its token count, and what is logged.
Loss = tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]


def forward_step(data_iterator: Iterator[MicroBatch], model: Any) -> tuple[torch.Tensor, Any]:
    """Run one micro batch through this rank's chunk; the signature is that of Megatron's schedules.

    Returns the losses [B, S] on the last pipeline stage and hidden states [S, B, D] elsewhere, and the loss function.
    """
    batch = next(data_iterator)
    device = next(model.parameters()).device
    loss_mask_BS = batch.loss_mask.to(device, non_blocking=True)
    output = model(
        batch.input_ids.to(device, non_blocking=True),
        batch.position_ids.to(device, non_blocking=True),
        None,  # causal; documents are kept apart by their lengths, never by a quadratic mask
        labels=batch.labels.to(device, non_blocking=True),
        loss_mask=loss_mask_BS,
        packed_seq_params=documents_of(batch, device),
    )
    return output, partial(token_loss, loss_mask_BS)


def token_loss(loss_mask_BS: torch.Tensor, losses_BS: torch.Tensor) -> Loss:
    """Return the weighted sum of the token losses, the number of tokens that carry loss, and both for the log.

    The three-tuple is what Megatron's calculate_per_token_loss asks for: it divides by the tokens of the global batch, so
    that every token weighs the same whichever rank saw it. `num_tokens` is int32, as the schedule accumulates it.
    """
    loss_sum = (losses_BS * loss_mask_BS).sum()
    num_tokens = (loss_mask_BS != 0).sum(dtype=torch.int32)
    return loss_sum, num_tokens, {"loss": torch.stack([loss_sum.detach().double(), num_tokens.double()])}
