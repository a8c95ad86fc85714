"""Distillation: the student learns the teacher's distribution of every token of the answers.

The loss of a token is the generalised Jensen-Shannon divergence of both distributions: Agarwal et al. 2023 (arXiv 2306.13649),
eq. 1 and 2; a mean over the tokens of the global batch, as in TRL 1.16. Whose answers these are is algorithm 1's lambda
(training/distillation_feed.py). Completions are sampled at --temperature; both distributions are taken at 1, as in TRL.
With --sft_alpha the cross-entropy of the tokens that the student did not write itself is added, so weighted: ms-swift 4.6.
With --gkd_logits_topk they are those among the teacher's likeliest tokens alone, as in ms-swift 4.6.
Both models end at their last hidden states, and chunks of their logits are formed together (kernels/linear_divergence); a
teacher behind HTTP tells the log-probabilities of these tokens instead (training/teachers.py).

Letters: B batch, S sequence, T tokens that carry loss, K likeliest tokens, D model size, E that of the teacher.
"""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region
from megatron.core.utils import unwrap_model

from megaswift.config.preference import PreferenceConfig
from megaswift.data.batches import MicroBatch
from megaswift.kernels.linear_cross_entropy.ops import linear_cross_entropy
from megaswift.kernels.linear_divergence.ops import Likeliest, OutputLayer, linear_divergence
from megaswift.models.causal_lm import CausalLM
from megaswift.tasks.task import CallIn, Loss, RunModel, look, run_model


class Distillation:
    """The task of `megaswift rlhf --rlhf_type gkd`, for models that return hidden states."""

    def __init__(
        self,
        settings: PreferenceConfig,
        *,
        teacher: Sequence[CausalLM] | None,
        call_in: CallIn = nullcontext,
        run: RunModel = run_model,
    ) -> None:
        """`teacher` are the chunks of a frozen model under the same layout; None: the batches hold what it says. Outside the context
        of `call_in` its output layer alone needs to be there."""
        assert settings.beta is not None, "resolved"
        self._beta, self._top_k, self._sft_alpha = settings.beta, settings.gkd_logits_topk, settings.sft_alpha
        self.metrics: tuple[str, ...] = ("sft_loss",) if self._sft_alpha else ()
        self._teacher, self._call_in, self._run = teacher, call_in, run

    def prepare(self, batches: list[MicroBatch], chunks: Sequence[Any]) -> list[MicroBatch]:
        """Return the batches with the last hidden states [T, E] of a teacher in memory, on the last stage."""
        if self._teacher is None:
            return batches
        with self._call_in():
            found = look(self._teacher, batches, states_with_loss, run=self._run)
        if not found:
            return batches
        return [replace(batch, prepared=states_TE) for batch, states_TE in zip(batches, found, strict=True)]

    def forward_step(self, data_iterator: Iterator[MicroBatch], model: Any) -> tuple[torch.Tensor, Any]:
        """Run one micro batch; its loss is the sum over the tokens of answers."""
        batch = next(data_iterator)
        return self._run(batch, model), partial(self._divergence, batch, unwrap_model(model))

    def summary(self, means: dict[str, float]) -> dict[str, float]:
        """Return the means as they are."""
        return means

    def _divergence(self, batch: MicroBatch, student: CausalLM, states_BSD: torch.Tensor) -> Loss:
        group = student.output_layer.tp_group
        hidden_TD = copy_to_tensor_model_parallel_region(  # sums the gradient over tp
            states_with_loss(batch, states_BSD), group=group
        )
        weights_T = batch.loss_mask[batch.loss_mask != 0].to(hidden_TD.device, non_blocking=True)
        shared: dict[str, Any] = {
            "vocab_size": student.logical_vocab_size,
            "group": group if group.size() > 1 else None,
        }
        softcap = student.multipliers.logits_softcap
        loss = linear_divergence(
            OutputLayer(hidden=hidden_TD, weight=student.output_weight, softcap=softcap),
            self._taught(batch, hidden_TD.device),
            weights_T,
            beta=self._beta,
            top_k=None if self._teacher is None else self._top_k,
            **shared,
        )
        number = torch.full((), len(weights_T), dtype=torch.int32).to(loss.device, non_blocking=True)
        log = {}
        if self._sft_alpha and not batch.is_own:
            labels_T = batch.labels[batch.loss_mask != 0].to(hidden_TD.device, non_blocking=True)
            losses_T = linear_cross_entropy(
                hidden_TD,
                student.output_weight,
                labels_T,
                loss_weights_T=weights_T,
                softcap=softcap,
                **shared,
            )
            sft_loss = (losses_T * weights_T).sum()
            loss = loss + self._sft_alpha * sft_loss
            log["sft_loss"] = torch.stack([sft_loss.detach().double(), number.double()])
        return loss, number, {"loss": torch.stack([loss.detach().double(), number.double()]), **log}

    def _taught(self, batch: MicroBatch, device: torch.device) -> OutputLayer | Likeliest:
        """Return what the teacher says of the tokens that carry loss."""
        if self._teacher is None:
            assert batch.teacher_ids is not None and batch.teacher_logps is not None, "training/teachers.py"
            ids_TK, logps_TK = (
                values[batch.loss_mask != 0].to(device, non_blocking=True)
                for values in (batch.teacher_ids, batch.teacher_logps)
            )
            return Likeliest(ids=ids_TK, logps=logps_TK)
        assert isinstance(batch.prepared, torch.Tensor), "the last stage has prepared its batches"
        teacher = self._teacher[-1]
        softcap = teacher.multipliers.logits_softcap
        return OutputLayer(hidden=batch.prepared, weight=teacher.output_weight, softcap=softcap)


def states_with_loss(batch: MicroBatch, states_BSD: torch.Tensor) -> torch.Tensor:
    """Return the hidden states of the tokens that carry loss [T, D]."""
    return states_BSD[(batch.loss_mask != 0).to(states_BSD.device, non_blocking=True)]
