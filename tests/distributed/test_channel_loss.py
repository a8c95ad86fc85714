"""The loss of each channel: what a hand adds up from transformers' losses, under every layout, packed or not; and nothing else changes."""

from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core import parallel_state
from transformers import AutoModelForCausalLM

from megaswift.data.batches import ValidationData
from megaswift.data.channels import Channels
from megaswift.data.encode import EncodedSet
from megaswift.training.feed import ValidationFeed
from tests.harness.distributed import run_distributed
from tests.harness.tiny import save_tiny
from tests.harness.training import Case, prepared, synthetic_set, temporary_folder

TOLERANCE = 1e-5  # float32 sums in another order
ROWS = 8
NAMES = ["code", "tokens of math/max", "code", "rare", "code", "tokens of math/max", "code", "silent"]
# layout -> (ranks, parallel settings)
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "dp2": (2, {}),
    "tp2 sp": (2, {"tp": 2, "sequence_parallel": True}),
    "pp2": (2, {"pp": 2}),
    "cp2": (2, {"cp": 2}),
    "tp2 pp2": (4, {"tp": 2, "pp": 2}),
}
FORMS: dict[str, dict[str, dict[str, Any]]] = {
    "rows end to end": {"training": {"micro_batch_size": 2, "global_batch_size": ROWS}},
    "padded": {
        "data": {"padding_free": False},
        "training": {"micro_batch_size": 2, "global_batch_size": ROWS},
    },
    "packed": {"data": {"packing": True, "packing_length": 64}, "training": {"global_batch_size": 4}},
    "mean of micro batches": {
        "training": {"micro_batch_size": 2, "global_batch_size": ROWS, "calculate_per_token_loss": False}
    },
    "by probability": {
        "training": {"micro_batch_size": 2, "global_batch_size": ROWS, "enable_dft_loss": True}
    },
}


# Other losses meet ranks that hold parts of documents; whole documents are counted as above.
CASES = [
    (layout, form)
    for layout in LAYOUTS
    for form in FORMS
    if form not in ("mean of micro batches", "by probability") or layout in ("one", "cp2")
]


@dataclass(frozen=True, kw_only=True)
class Seen:
    loss: float
    grad_norm: float | None
    metrics: dict[str, float]
    eval_loss: float
    eval_metrics: dict[str, float]


@cache
def folder() -> Path:
    return save_tiny("llama", temporary_folder())


def rows_of_channels() -> EncodedSet:
    """Return rows of four channels: one with a single row, one without a token that carries loss; weights are not whole numbers."""
    encoded = synthetic_set(entries=ROWS)
    weights = encoded.loss_weights * np.where(np.arange(len(encoded.input_ids)) % 3, 1.0, 0.25)
    weights[encoded.starts[-2] :] = 0
    return replace(encoded, loss_weights=weights.astype(np.float32), channels=Channels.of(NAMES))


def first_steps(rank: int, world_size: int, model: Path, cases: list[Case]) -> dict[str, list[Seen]]:
    """Return what the first step on all rows and a validation before it log: with channels, and without."""
    found: dict[str, list[Seen]] = {}
    for case in cases:
        for encoded in (rows_of_channels(), replace(rows_of_channels(), channels=None)):
            with prepared(model, case, encoded=encoded) as trained:
                dp_rank, dp = parallel_state.get_data_parallel_rank(), trained.layout.dp
                # A batch that the rows do not fill: some micro batches are empty.
                settings = replace(trained.feed.data.settings, global_batch_size=12)
                held_back = ValidationFeed(ValidationData(encoded, settings), dp_rank=dp_rank, dp=dp)
                valid = trained.engine.evaluate(held_back.batches())
                result = trained.engine.train_step(trained.feed.batch(0))
                found.setdefault(case.name, []).append(
                    Seen(
                        loss=result.loss,
                        grad_norm=result.grad_norm,
                        metrics=result.metrics,
                        eval_loss=valid.loss,
                        eval_metrics=valid.metrics,
                    )
                )
    return found


@cache
def seen(ranks: int) -> list[dict[str, list[Seen]]]:
    cases = [
        Case(name=f"{name}: {form}", settings={"parallel": LAYOUTS[name][1], **FORMS[form]})
        for name, form in CASES
        if LAYOUTS[name][0] == ranks
    ]
    return run_distributed(first_steps, ranks, folder(), cases)


@cache
def expected(*, by_probability: bool = False) -> dict[str, float]:
    """Weighted losses of the tokens of each channel, a mean over those that carry any, in float64."""
    model = AutoModelForCausalLM.from_pretrained(folder(), dtype=torch.float64)
    encoded, sums = rows_of_channels(), {}
    for name, (start, end) in zip(NAMES, pairwise(encoded.starts.tolist()), strict=True):
        ids = torch.tensor(encoded.input_ids[start:end].tolist())
        weights = torch.tensor(encoded.loss_weights[start + 1 : end].tolist(), dtype=torch.float64)
        with torch.no_grad():
            losses = -model(ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
        if by_probability:
            losses = losses * torch.exp(-losses)
        so_far, number = sums.get(name, (0.0, 0))
        sums[name] = (so_far + float((losses * weights).sum()), number + int((weights != 0).sum()))
    return {f"loss_{name}": total / number for name, (total, number) in sums.items() if number}


@pytest.mark.ranks(4)
@pytest.mark.parametrize(("layout", "form"), CASES)
def test_layout_logs_the_loss_of_each_channel(layout: str, form: str) -> None:
    wanted = expected(by_probability=form == "by probability")
    assert set(wanted) == {"loss_code", "loss_tokens of math/max", "loss_rare"}
    for rank in seen(LAYOUTS[layout][0]):
        found, _ = rank[f"{layout}: {form}"]
        for metrics in (found.metrics, found.eval_metrics):
            of_channels = {name: mean for name, mean in metrics.items() if name != "token_acc"}
            assert of_channels == pytest.approx(wanted, rel=TOLERANCE)


@pytest.mark.ranks(4)
@pytest.mark.parametrize(("layout", "form"), CASES)
def test_loss_and_gradient_are_those_without_channels_to_the_bit(layout: str, form: str) -> None:
    for rank in seen(LAYOUTS[layout][0]):
        found, plain = rank[f"{layout}: {form}"]
        assert (found.loss, found.grad_norm, found.eval_loss) == (
            plain.loss,
            plain.grad_norm,
            plain.eval_loss,
        )
        assert plain.metrics.keys() == {"token_acc"} == plain.eval_metrics.keys()
