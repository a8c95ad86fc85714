"""Correlations that validations of embeddings report: those of transformers' embeddings over all rows, under every layout."""

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core import parallel_state
from transformers import AutoModel

from megaswift.data.batches import ValidationData
from megaswift.data.encode import EncodedSet
from megaswift.tasks.paired import METRICS
from megaswift.training.feed import ValidationFeed
from tests.distributed.test_accuracy import LAYOUTS
from tests.harness.distributed import run_distributed
from tests.harness.tiny import save_tiny
from tests.harness.training import Case, prepared, synthetic_set, temporary_folder

TOLERANCE = 1e-5  # float32 embeddings on both sides
ROWS, GLOBAL_BATCH = 14, 4  # two rows fill no global batch: some micro batches are empty
# how rows become batches -> the loss
FORMS = {"rows": "cosine_similarity", "packs": "contrastive"}


@cache
def folder() -> Path:
    return save_tiny("llama", temporary_folder())


def rows() -> EncodedSet:
    """Return pairs of random texts with labels, of which several are the same."""
    labels = (np.random.default_rng(3).integers(0, 3, ROWS) / 2).astype(np.float32)
    return replace(synthetic_set(entries=2 * ROWS), per_row=2, targets=labels)


@cache
def expected() -> dict[str, float]:
    """Return numpy's correlations of what transformers' model makes of each text alone."""
    model, encoded = AutoModel.from_pretrained(folder(), dtype=torch.float64), rows()
    with torch.no_grad():
        states = [
            model(torch.from_numpy(encoded.input_ids[start:end].astype(np.int64))[None]).last_hidden_state[
                0, -1
            ]
            for start, end in zip(encoded.starts, encoded.starts[1:], strict=False)
        ]
    texts = np.stack([(state / state.norm()).numpy() for state in states])
    one, other, labels = texts[0::2], texts[1::2], encoded.targets
    assert labels is not None
    cosine, apart = (one * other).sum(1), one - other
    found = {}
    for name, similarity in (
        ("cosine", cosine),
        ("euclidean", -np.sqrt((apart**2).sum(1))),
        ("manhattan", -np.abs(apart).sum(1)),
        ("dot_product", cosine),
    ):
        assert np.diff(np.sort(similarity)).min() > 1e-5, "no rounding decides on an order"
        places = [np.mean(np.flatnonzero(np.sort(labels) == label)) for label in labels]
        found[f"pearson_{name}"] = float(np.corrcoef(similarity, labels)[0, 1])
        found[f"spearman_{name}"] = float(np.corrcoef(similarity.argsort().argsort(), places)[0, 1])
    return found


def validations(
    rank: int, world_size: int, model: Path, cases: list[Case]
) -> dict[str, list[dict[str, float]]]:
    """Return what a validation, a step that moves little, and another validation log."""
    found: dict[str, list[dict[str, float]]] = {}
    for case in cases:
        with prepared(model, case, encoded=rows()) as trained:
            dp_rank, dp = parallel_state.get_data_parallel_rank(), trained.layout.dp
            settings = trained.feed.data.settings
            held_back = ValidationFeed(ValidationData(rows(), settings), dp_rank=dp_rank, dp=dp)
            first = trained.engine.evaluate(held_back.batches()).metrics
            step = trained.engine.train_step(trained.feed.batch(0)).metrics
            found[case.name] = [first, step, trained.engine.evaluate(held_back.batches()).metrics]
    return found


@cache
def seen(ranks: int) -> list[dict[str, list[dict[str, float]]]]:
    packs: dict[str, Any] = {"data": {"packing": True, "packing_length": 100, "max_length": 40}}
    cases = [
        Case(
            name=f"{layout}: {form}",
            settings={
                "model": {"task_type": "embedding", "model": str(folder()), "torch_dtype": "float32"},
                "preference": {"loss_type": loss},
                "parallel": LAYOUTS[layout][1],
                "optimizer": {"lr": 1e-9, "lr_decay_style": "constant"},
                "training": {"global_batch_size": GLOBAL_BATCH},
                **(packs if form == "packs" else {}),
            },
        )
        for layout in LAYOUTS
        for form, loss in FORMS.items()
        if LAYOUTS[layout][0] == ranks
    ]
    return run_distributed(validations, ranks, folder(), cases)


@pytest.mark.ranks(4)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_reports_the_correlations_of_all_rows(layout: str, form: str) -> None:
    ranks = [rank[f"{layout}: {form}"] for rank in seen(LAYOUTS[layout][0])]
    assert all(rank == ranks[0] for rank in ranks), "early ends are decided by each rank for itself"
    first, step, second = ranks[0]
    assert step.keys() == {"similarity/positive"}
    for found in (first, second):
        assert found.keys() == {"similarity/positive", *METRICS}
        assert {name: found[name] for name in METRICS} == pytest.approx(expected(), abs=TOLERANCE)
