"""Learning from judged answers: what DPO, ORPO, SimPO, CPO and KTO share.

A micro batch goes through the model as in fine-tuning; the token losses are summed to log-probabilities of answers
(tasks/answers.py), and a loss of those (one file each) is divided by the rows of the global batch.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megaswift.config.preference import PreferenceConfig
from megaswift.data.batches import MicroBatch
from megaswift.models.lora import adapters_off
from megaswift.tasks.answers import Answers, Outcome, answers_of
from megaswift.tasks.kto import METRICS as KTO_METRICS
from megaswift.tasks.kto import kto_loss, with_margin
from megaswift.tasks.task import MAXIMUM, Loss, RunModel, look, run_model


class Preference:
    """A loss over the answers of pairs, maybe against a reference model."""

    def __init__(
        self,
        settings: PreferenceConfig,
        loss: Callable[[Answers, PreferenceConfig], Outcome],
        *,
        metrics: Sequence[str],
        compares: bool,
        reference: Sequence[Any] | None = None,
        run: RunModel = run_model,
    ) -> None:
        """`compares`: the loss needs log-probabilities under a reference. They come with the batches (computed once to
        disk), or from the chunks of `reference`, or from the trained model without its adapters."""
        self._settings, self._loss, self.metrics = settings, loss, tuple(metrics)
        self._compares, self._reference, self._run = compares, reference, run

    def prepare(self, batches: list[MicroBatch], chunks: Sequence[Any]) -> list[MicroBatch]:
        """Return the batches with their log-probabilities under the reference, where the loss needs them."""
        if not self._compares or batches[0].references is not None:
            return batches
        found = self._reference_logps(batches, chunks)
        return (
            [replace(batch, references=logps) for batch, logps in zip(batches, found, strict=True)]
            if found
            else batches
        )

    def forward_step(self, data_iterator: Iterator[MicroBatch], model: Any) -> tuple[torch.Tensor, Any]:
        """Run one micro batch; its loss is the sum over its rows."""
        batch = next(data_iterator)
        return self._run(batch, model), partial(self._rows_loss, batch)

    def summary(self, means: dict[str, float]) -> dict[str, float]:
        """Return the means as they are."""
        return means

    def _reference_logps(self, batches: list[MicroBatch], chunks: Sequence[Any]) -> list[torch.Tensor]:
        keep = partial(answer_logps, ld_alpha=self._settings.ld_alpha)
        if self._reference is not None:
            return look(self._reference, batches, keep, run=self._run)
        with adapters_off(chunks):
            return look(chunks, batches, keep, run=self._run)

    def _rows_loss(self, batch: MicroBatch, losses_BS: torch.Tensor) -> Loss:
        answers = answers_of(batch, losses_BS, ld_alpha=self._settings.ld_alpha)
        return rows_loss(self._loss(answers, self._settings), loss_tokens=answers.lengths_N.sum())


class Kto(Preference):
    """KTO: each answer is judged by itself, against a divergence that is estimated over the global batch."""

    def __init__(
        self, settings: PreferenceConfig, *, reference: Sequence[Any] | None = None, run: RunModel = run_model
    ) -> None:
        super().__init__(
            settings, self._kto_loss, metrics=KTO_METRICS, compares=True, reference=reference, run=run
        )
        self._divergence = torch.zeros((), dtype=torch.float64)

    def prepare(self, batches: list[MicroBatch], chunks: Sequence[Any]) -> list[MicroBatch]:
        """Return the batches with their references, and estimate the divergence for the loss to come."""
        others = [
            batch.mismatched
            for batch in batches
            if batch.mismatched is not None and self._settings.calculate_kl
        ]
        total = torch.zeros(2, dtype=torch.float64, device=next(chunks[0].parameters()).device)
        if others:
            logps = look(chunks, others, answer_logps, run=self._run)
            references = [batch.references for batch in others]
            if references[0] is None:
                references = list(self._reference_logps(others, chunks))
            for mine, theirs in zip(logps, references, strict=False):  # only the last stage has any
                assert theirs is not None, "all batches of a set come with references, or none"
                total += torch.stack([(mine - theirs.to(mine)).sum(), torch.full_like(mine, 1).sum()])
            dist.all_reduce(total, group=parallel_state.get_data_parallel_group())
        self._divergence = (total[0] / total[1].clamp(min=1)).clamp(min=0)
        return super().prepare(batches, chunks)

    def summary(self, means: dict[str, float]) -> dict[str, float]:
        """Return the means with the margin of the rewards."""
        return with_margin(means)

    def _kto_loss(self, answers: Answers, settings: PreferenceConfig) -> Outcome:
        return kto_loss(answers, settings, divergence=self._divergence)


def answer_logps(
    batch: MicroBatch, losses_BS: torch.Tensor, *, ld_alpha: float | None = None
) -> torch.Tensor:
    """Return the log-probabilities of a micro batch's answers, float64 [documents]."""
    return answers_of(batch, losses_BS, ld_alpha=ld_alpha).logps_N


def rows_loss(outcome: Outcome, *, loss_tokens: torch.Tensor, by_tokens: bool = False) -> Loss:
    """Return the sum of the rows' losses, the number of rows, and the log: Megatron divides by the rows of the global batch.

    With `by_tokens` it divides by the loss tokens.

    All cp ranks have the same rows: the first one counts them.
    """
    losses_R = outcome.losses_R
    counts = int(parallel_state.get_context_parallel_rank() == 0)
    number = loss_tokens if by_tokens else torch.full_like(loss_tokens, losses_R.numel())
    log = {name: counts * _entry(name, values) for name, values in outcome.metrics.items()}
    log["loss"] = counts * torch.stack([losses_R.detach().sum(), number])
    log["loss_tokens"] = counts * torch.stack([loss_tokens, loss_tokens])
    return losses_R.sum().float(), (counts * number).int(), log


def _entry(name: str, values: torch.Tensor) -> torch.Tensor:
    if name.endswith(MAXIMUM):
        value, number = values.max() if values.numel() else values.new_zeros(()), 1
    else:
        value, number = values.sum(), values.numel()
    return torch.stack([value, values.new_tensor(number)])
