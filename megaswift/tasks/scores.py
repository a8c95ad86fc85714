"""Learning from a few numbers for every document: what reward models and classifiers share.

The numbers are the scores of the last token that is not padding, where transformers' sequence classification reads them
(GenericForSequenceClassification, 5.24).

Letters: B rows, S tokens of a row, T tokens of all rows, N documents of a micro batch, O scores.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.utils import unwrap_model

from megaswift.data.batches import MicroBatch
from megaswift.errors import ConfigError
from megaswift.metadata.meta import ModelMeta
from megaswift.models.causal_lm import CausalLM
from megaswift.tasks.answers import Outcome, document_sums, tokens_here
from megaswift.tasks.preference import rows_loss
from megaswift.tasks.task import Loss, RunModel, run_model

NO_TOKEN = -1  # as a pad_id: every token of a text may be its last
# (micro batch, this rank's chunk of the model, its output) -> the scores of every document, float64 [N, O]
ReadScores = Callable[[MicroBatch, CausalLM, torch.Tensor], torch.Tensor]
# (scores [N, O], what the rows say [rows] or [rows, O], None where they say nothing) -> the loss of every row
ScoresLoss = Callable[[torch.Tensor, torch.Tensor | None], Outcome]


class DocumentScores:
    """A loss of the scores of documents, which `read` finds in what the model returns."""

    def __init__(
        self, loss: ScoresLoss, *, metrics: Sequence[str], read: ReadScores, run: RunModel = run_model
    ) -> None:
        self._loss, self.metrics, self._read, self._run = loss, tuple(metrics), read, run

    def prepare(self, batches: list[MicroBatch], chunks: Sequence[Any]) -> list[MicroBatch]:
        """Return the batches as they are."""
        return batches

    def forward_step(self, data_iterator: Iterator[MicroBatch], model: Any) -> tuple[torch.Tensor, Any]:
        """Run one micro batch; its loss is the sum over its rows."""
        batch = next(data_iterator)
        return self._run(batch, model), partial(self._rows_loss, batch, unwrap_model(model))

    def summary(self, means: dict[str, float]) -> dict[str, float]:
        """Return the means as they are."""
        return means

    def _rows_loss(self, batch: MicroBatch, model: CausalLM, output: torch.Tensor) -> Loss:
        scores_NO = self._read(batch, model, output)
        targets = self._targets(batch, scores_NO.device)
        documents = torch.full((), len(scores_NO)).to(scores_NO, non_blocking=True)
        return rows_loss(self._loss(scores_NO, targets), loss_tokens=documents)

    def _targets(self, batch: MicroBatch, device: torch.device) -> torch.Tensor | None:
        if batch.targets is None:
            return None
        return batch.targets.to(device, torch.float64, non_blocking=True)


def head_scores(batch: MicroBatch, model: CausalLM, scores_BSO: torch.Tensor, *, pad_id: int) -> torch.Tensor:
    """Return the scores that a ScoreHead gives each document, float64 [N, O]; every cp rank calls it alike.

    `pad_id` is the token that does not count as a document's last: the exported model's pad_token_id.
    """
    return last_scores(batch, scores_BSO, pad_id=pad_id)


def last_scores(batch: MicroBatch, scores_BSO: torch.Tensor, *, pad_id: int) -> torch.Tensor:
    """Return the scores of each document's last token that is not `pad_id`, float64 [N, O]; every cp rank calls it alike."""
    is_last_BS1 = last_tokens(batch, pad_id, scores_BSO.device)[..., None]
    return document_sums(torch.where(is_last_BS1, scores_BSO, 0.0), batch)


def last_tokens(batch: MicroBatch, pad_id: int, device: torch.device) -> torch.Tensor:
    """Return which of this rank's tokens is the last of its document that is not `pad_id`, bool [B, S].

    What moves: one number a document over cp, whose ranks hold parts of the documents.
    """
    rows, seq_len = batch.input_ids.shape
    lengths = torch.tensor([seq_len] * rows if batch.cu_seqlens is None else tokens_here(batch))
    document_T = torch.arange(len(lengths)).repeat_interleave(lengths)
    place_T = torch.where(batch.input_ids == pad_id, -1, batch.position_ids).reshape(-1)
    last_N = torch.full((len(lengths),), -1).scatter_reduce(0, document_T, place_T, "amax")
    document_T, place_T, last_N = (
        values.to(device, non_blocking=True) for values in (document_T, place_T, last_N)
    )
    if batch.plan is not None:
        group = parallel_state.get_context_parallel_group()
        dist.all_reduce(last_N, op=dist.ReduceOp.MAX, group=group)
    return ((place_T == last_N[document_T]) & (place_T >= 0)).view(rows, seq_len)


def scoring_model(
    meta: ModelMeta, *, num_labels: int, pad_id: int, problem_type: str | None = None, asked: str
) -> ModelMeta:
    """Return the facts of the model with a ScoreHead, and a config.json that transformers opens for sequence classification.

    Names of labels stay where the model has as many. Raises ConfigError, which names what was `asked` for, where
    transformers has no such class for the model.
    """
    from transformers.models.auto import modeling_auto  # seconds, and only models that score pay them

    name = modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.get(meta.model_type)
    if name is None:
        raise ConfigError(
            f"{asked}: transformers has no sequence classification for model_type={meta.model_type}, so the trained model could "
            "not be opened. Choose another model."
        )
    changes = {
        "architectures": [name],
        "num_labels": num_labels,
        "pad_token_id": pad_id,
        **({} if problem_type is None else {"problem_type": problem_type}),
        **_names_of_labels(meta.raw, num_labels),
    }
    return replace(
        meta,
        scores=num_labels,
        tied_embeddings=False,
        lm_head_bias=False,
        multipliers=replace(meta.multipliers, logits=1.0, logits_softcap=None),
        architecture=name,
        raw={**meta.raw, **changes},
    )


def _names_of_labels(raw: dict[str, Any], num_labels: int) -> dict[str, dict[str, Any]]:
    """Return config.json's two tables of labels."""
    names = raw.get("id2label")
    if not isinstance(names, dict) or len(names) != num_labels:
        names = {str(label): f"LABEL_{label}" for label in range(num_labels)}
    return {"id2label": names, "label2id": {name: int(label) for label, name in names.items()}}
