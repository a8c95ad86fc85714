"""Sequence classification: labels of a document from the scores of its last token.

With z the scores and y the label of a document, L labels, as transformers has them (ForSequenceClassificationLoss, 5.24):
single_label_classification   -log softmax(z)_y
multi_label_classification    the mean over labels of -y_l log sigmoid(z_l) - (1 - y_l) log sigmoid(-z_l)
regression                    the mean over numbers of (z_l - y_l)^2

Letters: N documents of a micro batch, L labels.
"""

import torch
import torch.nn.functional as F

from megaswift.tasks.answers import Outcome

METRICS = {
    "single_label_classification": ("accuracy",),
    "multi_label_classification": ("accuracy", "exact_match"),
    "regression": ("mse", "mae"),
}


def classification_loss(scores_NL: torch.Tensor, labels: torch.Tensor | None, *, problem: str) -> Outcome:
    """Return the loss of every document; `labels` are [N], or [N, L] where a document has several."""
    assert labels is not None, "rows have labels"
    if problem == "single_label_classification":
        labels_N = labels.long()
        losses_N = F.cross_entropy(scores_NL, labels_N, reduction="none")
        return Outcome(losses_R=losses_N, metrics={"accuracy": (scores_NL.argmax(1) == labels_N).double()})
    labels_NL = labels.view_as(scores_NL)
    if problem == "multi_label_classification":
        losses_NL = F.binary_cross_entropy_with_logits(scores_NL, labels_NL, reduction="none")
        right_NL = (scores_NL > 0) == (labels_NL > 0.5)
        metrics = {"accuracy": right_NL.double().mean(1), "exact_match": right_NL.all(1).double()}
        return Outcome(losses_R=losses_NL.mean(1), metrics=metrics)
    off_NL = scores_NL - labels_NL
    squares_N = off_NL.square().mean(1)
    return Outcome(
        losses_R=squares_N, metrics={"mse": squares_N.detach(), "mae": off_NL.detach().abs().mean(1)}
    )
