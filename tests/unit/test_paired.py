"""Correlations of similarities with labels: those of the textbook, with ties, and of no mean of batches."""

import math

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megaswift.tasks.paired import METRICS, HeldBackPairs, correlations, pearson, ranks, similarities


def values(*numbers: float) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def random_pairs(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings of length 1, two a row, and labels of which several are the same."""
    generator = torch.Generator().manual_seed(3)
    embeddings_ND = torch.randn(2 * rows, 5, generator=generator, dtype=torch.float64)
    labels_R = torch.randint(0, 4, (rows,), generator=generator).double() / 3
    return embeddings_ND / embeddings_ND.norm(dim=1, keepdim=True), labels_R


def test_equal_values_share_the_mean_of_their_places() -> None:
    assert ranks(values(0.5, 0.1, 0.5, 0.9, 0.5)).tolist() == [3, 1, 3, 5, 3]
    assert ranks(values(2, 2, 1, 1)).tolist() == [3.5, 3.5, 1.5, 1.5]
    assert ranks(values(7)).tolist() == [1]


def test_spearman_is_that_of_the_textbook() -> None:
    """Without ties 1 - 6 sum d^2 / (n (n^2 - 1)); with them Pearson's of the mean places, by hand."""
    x, y = values(106, 100, 86, 101, 99, 103, 97, 113, 112, 110), values(7, 27, 2, 50, 28, 29, 20, 12, 6, 17)
    assert float(pearson(ranks(x), ranks(y))) == pytest.approx(1 - 6 * 194 / (10 * 99), abs=1e-12)
    # places 1.5 1.5 3 4 and 1 2 3.5 3.5: deviations -1 -1 .5 1.5 and -1.5 -.5 1 1
    found = pearson(ranks(values(1, 1, 2, 3)), ranks(values(0, 1, 5, 5)))
    assert float(found) == pytest.approx((1.5 + 0.5 + 0.5 + 1.5) / 4.5, abs=1e-12)


def test_figures_are_those_of_numpy_for_each_similarity() -> None:
    embeddings_ND, labels_R = random_pairs(30)
    one, other = embeddings_ND.numpy()[0::2], embeddings_ND.numpy()[1::2]
    by_name = {
        "cosine": (one * other).sum(1) / np.linalg.norm(one, axis=1) / np.linalg.norm(other, axis=1),
        "euclidean": -np.sqrt(((one - other) ** 2).sum(1)),
        "manhattan": -np.abs(one - other).sum(1),
        "dot_product": np.array([np.dot(a, b) for a, b in zip(one, other, strict=True)]),
    }
    found = dict(zip(METRICS, correlations(similarities(embeddings_ND), labels_R).tolist(), strict=True))
    for name, similarity in by_name.items():
        assert found[f"pearson_{name}"] == pytest.approx(np.corrcoef(similarity, labels_R)[0, 1], abs=1e-12)
        order = [sorted(similarity).index(value) for value in similarity]  # no ties among these
        places = [np.mean(np.flatnonzero(np.sort(labels_R) == label)) for label in labels_R]
        assert found[f"spearman_{name}"] == pytest.approx(np.corrcoef(order, places)[0, 1], abs=1e-12)


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "broadcast", lambda values, src: None)
    monkeypatch.setattr(dist, "get_world_size", lambda: 1)


@pytest.mark.usefixtures("alone")
def test_batches_are_one_set_and_each_validation_begins_anew() -> None:
    embeddings_ND, labels_R = random_pairs(9)
    pairs, cpu = HeldBackPairs(), torch.device("cpu")
    assert pairs.end() == {}  # after a training step
    expected = correlations(similarities(embeddings_ND), labels_R).tolist()
    for _ in range(2):
        for rows in (slice(0, 4), slice(4, 9), slice(9, 9)):
            pairs.begin(cpu)
            pairs.add(embeddings_ND[2 * rows.start : 2 * rows.stop], labels_R[rows])
        assert list(pairs.end().values()) == pytest.approx(expected, abs=1e-15)
        assert pairs.end() == {}


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("rows", [1, 3])
def test_what_does_not_vary_has_no_correlation(rows: int) -> None:
    pairs = HeldBackPairs()
    pairs.begin(torch.device("cpu"))
    embeddings_ND, _ = random_pairs(rows)
    pairs.add(embeddings_ND, torch.ones(rows, dtype=torch.float64))
    assert math.isnan(float(pearson(values(1, 2), values(3, 3)))) and pairs.end() == {}
