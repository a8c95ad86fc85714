"""How well the similarities of two texts follow the labels of their rows: correlations over all rows of a validation.

Pearson's r is that of the values; Spearman's is Pearson's of their ranks, equal values having the mean of theirs. A correlation is no
mean over batches, so that similarities and labels of all rows are kept until the validation ends. Names are those of ms-swift 4.6
(swift/metrics/embedding.py); distances count as similarities with a minus.

Letters: N texts, D model size, R rows, K kinds of similarity.
"""

import math

import torch
import torch.distributed as dist

SIMILARITIES = ("cosine", "euclidean", "manhattan", "dot_product")
METRICS = tuple(f"{kind}_{name}" for kind in ("pearson", "spearman") for name in SIMILARITIES)


class HeldBackPairs:
    """What the pairs of a validation are like, collected batch by batch on the last stage."""

    def __init__(self) -> None:
        self._device: torch.device | None = None  # while a validation goes on
        self._similarities_KR: list[torch.Tensor] = []
        self._labels_R: list[torch.Tensor] = []

    def begin(self, device: torch.device) -> None:
        """A validation is going on; every rank says so, once or more."""
        self._device = device

    def add(self, embeddings_ND: torch.Tensor, labels_R: torch.Tensor) -> None:
        """Take the rows of a global batch, those of all data-parallel ranks."""
        self._similarities_KR.append(similarities(embeddings_ND))
        self._labels_R.append(labels_R)

    def end(self) -> dict[str, float]:
        """Return METRICS of the validation that went on, but those without a variance; nothing where none did.

        Every rank of the world calls it alike. What moves: 8 numbers from the world's last rank, which is one of the last stage.
        """
        if self._device is None:
            return {}
        values = torch.full((len(METRICS),), math.nan, dtype=torch.float64, device=self._device)
        if self._labels_R:
            values = correlations(torch.cat(self._similarities_KR, dim=1), torch.cat(self._labels_R))
        dist.broadcast(values, src=dist.get_world_size() - 1)
        self._device, self._similarities_KR, self._labels_R = None, [], []
        found = dict(zip(METRICS, values.tolist(), strict=True))
        return {name: value for name, value in found.items() if math.isfinite(value)}


def similarities(embeddings_ND: torch.Tensor) -> torch.Tensor:
    """Return SIMILARITIES of the two texts of every row [K, R], which follow each other and whose embeddings have length 1."""
    first_RD, second_RD = embeddings_ND.unflatten(0, (-1, 2)).unbind(1)
    cosine_R, apart_RD = (first_RD * second_RD).sum(1), first_RD - second_RD
    return torch.stack([cosine_R, -apart_RD.norm(dim=1), -apart_RD.abs().sum(1), cosine_R])


def correlations(similarities_KR: torch.Tensor, labels_R: torch.Tensor) -> torch.Tensor:
    """Return METRICS, float64; not finite where all labels or all similarities are the same."""
    by_rank = [pearson(ranks(values_R), ranks(labels_R)) for values_R in similarities_KR]
    return torch.stack([*(pearson(values_R, labels_R) for values_R in similarities_KR), *by_rank])


def pearson(x_R: torch.Tensor, y_R: torch.Tensor) -> torch.Tensor:
    """Return Pearson's correlation of two float64 tensors."""
    x_R, y_R = x_R - x_R.mean(), y_R - y_R.mean()
    return x_R @ y_R / (x_R.norm() * y_R.norm())


def ranks(values_R: torch.Tensor) -> torch.Tensor:
    """Return the place of each value in their order, float64, from 1; equal values share the mean of theirs."""
    _, place_R, count = values_R.unique(return_inverse=True, return_counts=True)
    return (count.cumsum(0) - (count - 1).double() / 2)[place_R]
