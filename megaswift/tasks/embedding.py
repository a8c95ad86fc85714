"""Embeddings: texts that belong together are pulled together, others apart.

The embedding e of a text is the last hidden state of its last token, of length 1. With s(i, j) = e_i . e_j, for the text q of a
row, its positive p and the texts d that it is compared with (p among them):
infonce            -log exp(s(q, p) / t) / sum_d exp(s(q, d) / t)   van den Oord et al. 2018 (arXiv 1807.03748), eq. 4; other rows'
                   texts as negatives: Karpukhin et al. 2020 (arXiv 2004.04906), eq. 2 and section 3.2
cosine_similarity  (s(q, p) - y)^2, y the label                     Reimers and Gurevych 2019 (arXiv 1908.10084), section 3
contrastive        (y d^2 + (1 - y) max(0, m - d)^2) / 2, d = 1 - s(q, p), m = 0.5   Hadsell et al. 2006, eq. 4; m as sentence-transformers
--mrl_dims        the sum over dims d of w_d x the loss of e cut to its first d numbers and brought to length 1: Kusupati et al. 2022
                   (arXiv 2205.13147), eq. 1

A row is compared with rows of other micro batches and other ranks. So all embeddings of the global batch are computed once
without gradients, and the loss and its gradient by each embedding from them; then micro batch after micro batch only carries
its part of that gradient back: Gao et al. 2021 (arXiv 2101.06983), section 3.2. It is the gradient of the whole, exactly.

Letters: B rows, S tokens of a row, D model size, N texts, R rows of the data, C texts that one is compared with.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from megaswift.config.embedding import EmbeddingConfig
from megaswift.data.batches import MicroBatch
from megaswift.metadata.meta import ModelMeta
from megaswift.tasks import paired
from megaswift.tasks.answers import Outcome
from megaswift.tasks.everyone import of_all_ranks
from megaswift.tasks.paired import HeldBackPairs
from megaswift.tasks.preference import rows_loss
from megaswift.tasks.scores import NO_TOKEN, last_scores
from megaswift.tasks.task import Loss, RunModel, look, run_model

MARGIN = 0.5  # sentence-transformers 5, ContrastiveLoss
METRICS = {
    "infonce": ("accuracy", "similarity/positive", "similarity/negative", "margin"),
    "cosine_similarity": ("similarity/positive",),
    "contrastive": ("similarity/positive",),
}


@dataclass(frozen=True, kw_only=True)
class Pull:
    """What the global batch says about one micro batch."""

    outcome: Outcome
    gradient_ND: torch.Tensor  # of the sum of all losses by each embedding, float64


class Embedding:
    """The task of `megaswift sft --task_type embedding`, for a model that returns hidden states."""

    def __init__(self, loss_type: str, settings: EmbeddingConfig, *, run: RunModel = run_model) -> None:
        self._loss_type, self._settings, self._run = loss_type, settings, run
        self._pairs = None if loss_type == "infonce" else HeldBackPairs()
        self.metrics = METRICS[loss_type] + (paired.METRICS if self._pairs else ())

    def prepare(self, batches: list[MicroBatch], chunks: Sequence[Any]) -> list[MicroBatch]:
        """Return the batches with their part of the global batch's loss and gradient."""
        trains = torch.is_grad_enabled()
        held_back = None if trains else self._pairs
        if held_back is not None:
            held_back.begin(next(chunks[0].parameters()).device)
        with _same_random_numbers():
            found = look(chunks, batches, embeddings_of, run=self._run, training=trains)
        if not found:
            return batches
        group = parallel_state.get_data_parallel_group()
        everyone_ND, first = of_all_ranks(torch.cat(found), group)
        labels_R = None
        if batches[0].targets is not None:
            own = torch.cat([batch.targets for batch in batches if batch.targets is not None])
            labels_R, _ = of_all_ranks(own.to(everyone_ND), group)
            if held_back is not None:
                held_back.add(everyone_ND, labels_R)
        with torch.enable_grad():
            outcome = embedding_loss(
                everyone_ND.requires_grad_(), labels_R, loss_type=self._loss_type, settings=self._settings
            )
            (gradient_ND,) = torch.autograd.grad(outcome.losses_R.sum(), everyone_ND)
        texts = len(everyone_ND) // len(outcome.losses_R)  # of a row
        prepared = []
        for batch, embeddings_ND in zip(batches, found, strict=True):
            last = first + len(embeddings_ND)
            rows = slice(first // texts, last // texts)
            mine = Outcome(
                losses_R=outcome.losses_R.detach()[rows],
                metrics={name: values[rows] for name, values in outcome.metrics.items()},
            )
            prepared.append(replace(batch, prepared=Pull(outcome=mine, gradient_ND=gradient_ND[first:last])))
            first = last
        return prepared

    def forward_step(self, data_iterator: Iterator[MicroBatch], model: Any) -> tuple[torch.Tensor, Any]:
        """Run one micro batch; what is differentiated is embeddings x their gradients."""
        batch = next(data_iterator)
        return self._run(batch, model), partial(self._pulled, batch)

    def summary(self, means: dict[str, float]) -> dict[str, float]:
        """Return the means, and after a validation the correlations of pairs with labels; every rank of the world calls it."""
        return means if self._pairs is None else means | self._pairs.end()

    def _pulled(self, batch: MicroBatch, states_BSD: torch.Tensor) -> Loss:
        pull = batch.prepared
        assert isinstance(pull, Pull), "the last stage has prepared its batches"
        embeddings_ND = embeddings_of(batch, states_BSD)
        texts = torch.full((), len(embeddings_ND)).to(embeddings_ND, non_blocking=True)
        _, number, log = rows_loss(pull.outcome, loss_tokens=texts)
        return (embeddings_ND * pull.gradient_ND).sum().float(), number, log


def embeddings_of(batch: MicroBatch, states_BSD: torch.Tensor) -> torch.Tensor:
    """Return the embedding of every text of a micro batch, float64 [N, D]; every cp rank calls it alike."""
    return F.normalize(last_scores(batch, states_BSD, pad_id=NO_TOKEN), dim=1)


def embedding_loss(
    embeddings_ND: torch.Tensor, labels_R: torch.Tensor | None, *, loss_type: str, settings: EmbeddingConfig
) -> Outcome:
    """Return the loss of every row, given the texts of each row one after the other: itself, its positive, its negatives."""
    if not settings.mrl_dims:
        return _loss_of_whole(embeddings_ND, labels_R, loss_type=loss_type, settings=settings)
    parts = {
        int(dim): _loss_of_whole(
            F.normalize(embeddings_ND[:, : int(dim)], dim=1), labels_R, loss_type=loss_type, settings=settings
        )
        for dim in settings.mrl_dims
    }
    losses_PR = torch.stack([settings.mrl_dims[str(dim)] * part.losses_R for dim, part in parts.items()])
    return Outcome(losses_R=losses_PR.sum(0), metrics=parts[max(parts)].metrics)


def _loss_of_whole(
    embeddings_ND: torch.Tensor, labels_R: torch.Tensor | None, *, loss_type: str, settings: EmbeddingConfig
) -> Outcome:
    texts = 2 + settings.infonce_hard_negatives
    groups_RND = embeddings_ND.unflatten(0, (-1, texts))
    anchors_RD, others_RCD = groups_RND[:, 0], groups_RND[:, 1:]
    positive_R = (anchors_RD * others_RCD[:, 0]).sum(1)
    metrics = {"similarity/positive": positive_R.detach()}
    if loss_type != "infonce":
        assert labels_R is not None, "rows have labels"
        if loss_type == "cosine_similarity":
            return Outcome(losses_R=(positive_R - labels_R).square(), metrics=metrics)
        apart_R = 1 - positive_R
        near_R, far_R = apart_R.square(), (MARGIN - apart_R).relu().square()
        return Outcome(losses_R=(labels_R * near_R + (1 - labels_R) * far_R) / 2, metrics=metrics)
    if settings.infonce_use_batch:
        scores_RC = anchors_RD @ others_RCD.flatten(0, 1).T
        positive = torch.arange(len(scores_RC), device=scores_RC.device) * (texts - 1)
    else:
        scores_RC = torch.einsum("rd,rcd->rc", anchors_RD, others_RCD)
        positive = torch.zeros(len(scores_RC), dtype=torch.long, device=scores_RC.device)
    metrics["accuracy"] = (scores_RC.argmax(1) == positive).double()
    negatives = scores_RC.shape[1] - 1
    if negatives:  # else there is nothing to compare with
        best_R = scores_RC.detach().scatter(1, positive[:, None], -torch.inf).amax(1)
        metrics["margin"] = positive_R.detach() - best_R
        metrics["similarity/negative"] = (scores_RC.sum(1) - positive_R).detach() / negatives
    losses_R = F.cross_entropy(scores_RC / settings.infonce_temperature, positive, reduction="none")
    return Outcome(losses_R=losses_R, metrics=metrics)


def embedding_model(meta: ModelMeta) -> ModelMeta:
    """Return the facts of the model without its output layer: transformers' AutoModel opens what is exported."""
    from transformers.models.auto import modeling_auto  # seconds, and only embeddings pay them

    name = modeling_auto.MODEL_MAPPING_NAMES.get(meta.model_type)
    architecture = name if isinstance(name, str) else meta.architecture
    return replace(
        meta,
        scores=0,
        tied_embeddings=False,
        lm_head_bias=False,
        multipliers=replace(meta.multipliers, logits=1.0, logits_softcap=None),
        architecture=architecture,
        raw={**meta.raw, "architectures": [architecture]},
    )


@contextmanager
def _same_random_numbers() -> Iterator[None]:
    """Let what comes after draw the random numbers that are drawn within: dropout then falls on the same elements."""
    states = get_cuda_rng_tracker().get_states()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        yield
    get_cuda_rng_tracker().set_states(states)
