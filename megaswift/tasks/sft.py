"""Next-token prediction: the loss of supervised fine-tuning, and of pre-training, where every token carries loss.

With p the probability of the next token it is -log p; or by dynamic fine-tuning -p log p, where no gradient goes through the
factor p: Wu et al. 2025 (arXiv 2508.05629). Where rows name a channel, the mean of each channel's tokens is logged beside the mean
of all; what is differentiated stays as it is. Accuracies have the names of ms-swift's (4.6, metrics/acc.py), of which samples differ:
here those without a token that carries loss do not count, and tokens without loss make no sample wrong, end to end as padded. Labels
that tie with another token are right, of which in 16 bits there are some more than ms-swift's argmax finds.

Letters: B batch, S sequence, N documents of a micro batch.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core.utils import unwrap_model

from megaswift.data.batches import MicroBatch
from megaswift.models.causal_lm import CausalLM
from megaswift.tasks.answers import document_sums
from megaswift.tasks.task import Loss, RunModel, run_model


class NextToken:
    """The task of `megaswift sft` and `megaswift pt`, for models that note which labels are right."""

    def __init__(
        self, accuracy: "Accuracy", *, by_probability: bool = False, run: RunModel = run_model
    ) -> None:
        """`by_probability` weighs losses by the probability of their tokens."""
        self._by_probability, self._accuracy, self._run = by_probability, accuracy, run
        self._channels: tuple[str, ...] = ()  # of the newest global batch, the same on every rank

    @property
    def metrics(self) -> Sequence[str]:
        """The accuracy, and one for each channel, by number: any text may be a name."""
        return [self._accuracy.name, *(metric_of(number) for number in range(len(self._channels)))]

    def prepare(self, batches: list[MicroBatch], chunks: Sequence[Any]) -> list[MicroBatch]:
        """Return the batches as they are, and remember which channels they may hold."""
        self._channels = batches[0].channel_names
        return batches

    def forward_step(self, data_iterator: Iterator[MicroBatch], model: Any) -> tuple[torch.Tensor, Any]:
        """Run one micro batch; its loss is token_loss."""
        batch = next(data_iterator)
        return self._run(batch, model), partial(self._loss, batch, unwrap_model(model))

    def _loss(self, batch: MicroBatch, model: CausalLM, losses_BS: torch.Tensor) -> Loss:
        if self._by_probability:
            losses_BS = losses_BS * torch.exp(-losses_BS.detach())
        loss_sum, num_tokens, log = token_loss(batch.loss_mask, losses_BS)
        assert model.right_BS is not None, "built for it: models/build.py"
        log[self._accuracy.name] = self._accuracy.of(batch, model.right_BS)
        return loss_sum, num_tokens, log | channel_losses(batch, losses_BS)

    def summary(self, means: dict[str, float]) -> dict[str, float]:
        """Return the accuracy, and the loss of every channel of which a token was there, under the names that ms-swift gives them."""
        names = {metric_of(number): f"loss_{name}" for number, name in enumerate(self._channels)}
        return {names.get(metric, metric): mean for metric, mean in means.items()}


def token_loss(loss_mask_BS: torch.Tensor, losses_BS: torch.Tensor) -> Loss:
    """Return the weighted sum of the token losses, the number of tokens that carry loss, and both for the log.

    The three-tuple is what Megatron's calculate_per_token_loss asks for: it divides by the tokens of the global batch, so
    that every token weighs the same whichever rank saw it. `num_tokens` is int32, as the schedule accumulates it.
    """
    loss_mask_BS = loss_mask_BS.to(losses_BS.device, non_blocking=True)
    loss_sum = (losses_BS * loss_mask_BS).sum()
    num_tokens = (loss_mask_BS != 0).sum(dtype=torch.int32)
    return loss_sum, num_tokens, {"loss": torch.stack([loss_sum.detach().double(), num_tokens.double()])}


def tokens_right(batch: MicroBatch, right_BS: torch.Tensor) -> torch.Tensor:
    """Return [tokens whose label is the likeliest one, tokens], float64, of those that carry loss, whatever they weigh."""
    carries_loss_BS = (batch.loss_mask != 0).to(right_BS.device, non_blocking=True)
    return torch.stack([right_BS.sum(dtype=torch.float64), carries_loss_BS.sum(dtype=torch.float64)])


def samples_right(batch: MicroBatch, right_BS: torch.Tensor) -> torch.Tensor:
    """Return [samples of which every label is the likeliest one, samples], float64, of those with tokens that carry loss.

    Every cp rank calls it alike and counts whole samples, so that their share is that of one rank.
    What moves: 2 numbers a document over cp, whose ranks hold parts of the documents.
    """
    carries_loss_BS = (batch.loss_mask != 0).to(right_BS.device, non_blocking=True)
    sums_N2 = document_sums(torch.stack([right_BS, carries_loss_BS], dim=-1), batch)
    right_N, length_N = sums_N2.unbind(-1)
    has_loss_N = length_N > 0
    is_right_N = has_loss_N & (right_N == length_N)
    return torch.stack([is_right_N.sum(dtype=torch.float64), has_loss_N.sum(dtype=torch.float64)])


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """What share of a global batch is right."""

    name: str  # in the log
    of: Callable[[MicroBatch, torch.Tensor], torch.Tensor]  # (batch, right_BS) -> [right, number]


# acc_strategy -> what is counted
ACCURACIES = {
    "token": Accuracy(name="token_acc", of=tokens_right),
    "seq": Accuracy(name="seq_acc", of=samples_right),
}


def metric_of(channel: int) -> str:
    """Return what the loss of a channel is called among the metrics of a micro batch."""
    return f"channel {channel}"


@torch.no_grad()
def channel_losses(batch: MicroBatch, losses_BS: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return [weighted sum of losses, number of tokens that carry loss] for each channel of a micro batch that has any."""
    if batch.channels is None:
        return {}
    # One sum each: those that add up by number (index_add) come in any order on a GPU, and differ from run to run.
    present = batch.channels[batch.loss_mask != 0].unique().tolist()
    loss_mask_BS, channels_BS = (
        values.to(losses_BS.device, non_blocking=True) for values in (batch.loss_mask, batch.channels)
    )
    weighted_BS = losses_BS * loss_mask_BS
    found = {}
    for number in present:
        own_BS = (channels_BS == number) & (loss_mask_BS != 0)
        loss_sum = torch.where(own_BS, weighted_BS, 0.0).sum(dtype=torch.float64)
        found[metric_of(number)] = torch.stack([loss_sum, own_BS.sum(dtype=torch.float64)])
    return found
