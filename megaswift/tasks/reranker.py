"""Rerankers: how well a document fits a query, learnt from which documents of a row do.

With s_0 the score of the positive document of a group and s_1 ... those of its negatives:
pointwise_reranker   -log sigmoid(s_0) of the positive, -log sigmoid(-s_i) of each negative; a mean over documents
listwise_reranker    -log exp(s_0 / t) / sum_i exp(s_i / t); a mean over groups: Cao et al. 2007 (ICML), ListNet's top-one
                     probabilities, section 4, where one document is relevant
Logged beside it, r being the place of the positive when its group is sorted by score, ties against it: mrr 1 / r, and ndcg
1 / log2(1 + r): Jarvelin and Kekalainen 2002 (ACM TOIS 20), of one relevant document.

The score comes from a head (tasks/scores.py), or it is by how much the logit of the answer yes is above that of no behind the
question (data/forms.py): the log-odds of yes among the two.

Letters: B rows, S tokens of a row, D model size, N documents of a micro batch, G groups, C documents of the largest group,
L last tokens that this rank holds.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from megaswift.config.reranker import RerankerConfig
from megaswift.data.batches import MicroBatch
from megaswift.models.causal_lm import CausalLM
from megaswift.tasks.answers import Outcome, document_sums
from megaswift.tasks.scores import NO_TOKEN, DocumentScores, ReadScores, last_tokens
from megaswift.tasks.task import RunModel, run_model

METRICS = ("accuracy", "mrr", "ndcg")


class Reranker(DocumentScores):
    """The task of `megaswift sft --task_type reranker` and `generative_reranker`; a row says how large its groups are."""

    def __init__(
        self, loss_type: str, settings: RerankerConfig, *, read: ReadScores, run: RunModel = run_model
    ) -> None:
        def loss(scores_N1: torch.Tensor, sizes: torch.Tensor | None) -> Outcome:
            assert sizes is not None, "rows have groups"
            return reranker_loss(
                scores_N1[:, 0],
                [int(size) for size in sizes.flatten().tolist() if size],
                loss_type=loss_type,
                temperature=settings.listwise_reranker_temperature,
            )

        super().__init__(loss, metrics=METRICS, read=read, run=run)

    def _targets(self, batch: MicroBatch, device: torch.device) -> torch.Tensor | None:
        return batch.targets  # sizes cut tensors: they are needed on the host


def reranker_loss(
    scores_N: torch.Tensor, sizes: Sequence[int], *, loss_type: str, temperature: float = 1.0
) -> Outcome:
    """Return the loss of every document or of every group, given the scores of one group after the other, its positive first."""
    if not sizes:
        return Outcome(losses_R=scores_N, metrics={name: scores_N.detach() for name in METRICS})
    groups_GC = pad_sequence(list(scores_N.split(list(sizes))), batch_first=True, padding_value=-torch.inf)
    place_G = 1 + (groups_GC[:, 1:] >= groups_GC[:, :1]).sum(1)
    if loss_type == "pointwise_reranker":
        labels = torch.cat([torch.arange(size) == 0 for size in sizes])
        labels_N = labels.to(scores_N, non_blocking=True)
        losses_R = F.binary_cross_entropy_with_logits(scores_N, labels_N, reduction="none")
        right = (scores_N > 0) == (labels_N > 0)
    else:
        first_G = torch.zeros(len(sizes), dtype=torch.long, device=scores_N.device)
        losses_R = F.cross_entropy(groups_GC / temperature, first_G, reduction="none")
        right = place_G == 1
    metrics = {
        "accuracy": right.double(),
        "mrr": place_G.double().reciprocal(),
        "ndcg": (1.0 + place_G.double()).log2().reciprocal(),
    }
    return Outcome(losses_R=losses_R, metrics=metrics)


def answer_scores(
    batch: MicroBatch, model: CausalLM, states_BSD: torch.Tensor, *, words: tuple[int, int]
) -> torch.Tensor:
    """Return by how much the logit of words[0] is above that of words[1] behind each document, float64 [N, 1].

    Two rows of the output layer meet the last token of each document: no other logit is formed. Every rank of tp and cp calls
    it alike.
    """
    is_last_BS = last_tokens(batch, NO_TOKEN, states_BSD.device)
    logits_L2 = states_BSD[is_last_BS].double() @ model.output_rows(words).double().T
    cap = model.multipliers.logits_softcap
    if cap is not None:
        logits_L2 = cap * torch.tanh(logits_L2 / cap)
    scores_BS = torch.zeros(is_last_BS.shape, dtype=torch.float64, device=states_BSD.device)
    scores_BS = scores_BS.masked_scatter(is_last_BS, logits_L2[:, 0] - logits_L2[:, 1])
    return document_sums(scores_BS[..., None], batch)
