"""How many labels are the likeliest tokens: as transformers' argmax has it, under every layout, packed or not; no loss depends on it."""

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
from megaswift.data.encode import EncodedSet
from megaswift.training.feed import ValidationFeed
from tests.distributed.test_channel_loss import FORMS as OF_CHANNELS
from tests.distributed.test_channel_loss import ROWS
from tests.harness.distributed import run_distributed
from tests.harness.tiny import save_tiny
from tests.harness.training import Case, prepared, synthetic_set, temporary_folder

CLEAR = 1e-4  # of logits around 1: by how much those of labels differ from the others at least, far above what float32 rounds
# layout -> (ranks, parallel settings)
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "dp2": (2, {}),
    "tp2 sp": (2, {"tp": 2, "sequence_parallel": True}),
    "pp2": (2, {"pp": 2}),
    "pp2 vpp2": (2, {"pp": 2, "vpp": 2}),
    "cp2": (2, {"cp": 2}),
    "tp2 cp2": (4, {"tp": 2, "cp": 2}),
}
FORMS = {name: settings for name, settings in OF_CHANNELS.items() if name != "by probability"}  # a loss alone


@dataclass(frozen=True, kw_only=True)
class Seen:
    loss: float
    grad_norm: float | None
    eval_loss: float
    metrics: dict[str, float]
    eval_metrics: dict[str, float]


@cache
def folder() -> Path:
    return save_tiny("llama", temporary_folder())


@cache
def answers() -> tuple[EncodedSet, dict[str, float]]:
    """Return rows whose tokens the model itself finds likeliest, but for some, and the accuracies by transformers' argmax.

    Rows are right as a whole, but for their last token, which one cp rank holds, or in part, and one carries no loss; weights are
    not whole numbers.
    """
    model = AutoModelForCausalLM.from_pretrained(folder(), dtype=torch.float64)
    encoded = synthetic_set(entries=ROWS)
    ids = torch.from_numpy(encoded.input_ids.astype(np.int64))
    weights = encoded.loss_weights * np.where(np.arange(len(ids)) % 3, 1.0, 0.25).astype(np.float32)
    weights[encoded.starts[1:] - 1] = 1
    weights[encoded.starts[-2] :] = 0
    tokens, samples = [], []
    for row, (start, end) in enumerate(pairwise(encoded.starts.tolist())):
        with torch.no_grad():
            for place in range(start + 1, end):
                if (True, place < end - 1, place % 2)[row % 3]:
                    ids[place] = model(ids[None, start:place]).logits[0, -1].argmax()
            logits_TV = model(ids[None, start:end]).logits[0, :-1]
        labels_T, carries = ids[start + 1 : end], torch.from_numpy(weights[start + 1 : end]) != 0
        others = logits_TV.scatter(1, labels_T[:, None], float("-inf")).amax(1)
        margins = logits_TV.gather(1, labels_T[:, None])[:, 0] - others
        assert bool((margins.abs() > CLEAR)[carries].all()), "no rounding decides"
        right = (logits_TV.argmax(-1) == labels_T)[carries]
        tokens += right.tolist()
        samples += [bool(right.all())] if len(right) else []
    accuracies = {"token_acc": sum(tokens) / len(tokens), "seq_acc": sum(samples) / len(samples)}
    assert len(samples) == ROWS - 1 and all(0.2 < share < 0.95 for share in accuracies.values()), accuracies
    return replace(encoded, input_ids=ids.numpy().astype(np.int32), loss_weights=weights), accuracies


def first_steps(
    rank: int, world_size: int, model: Path, encoded: EncodedSet, cases: list[Case]
) -> dict[str, Seen]:
    """Return what a validation and the first step after it log."""
    found = {}
    for case in cases:
        with prepared(model, case, encoded=encoded) as trained:
            dp_rank, dp = parallel_state.get_data_parallel_rank(), trained.layout.dp
            # A batch that the rows do not fill: some micro batches are empty.
            settings = replace(trained.feed.data.settings, global_batch_size=12)
            held_back = ValidationFeed(ValidationData(encoded, settings), dp_rank=dp_rank, dp=dp)
            valid = trained.engine.evaluate(held_back.batches())
            result = trained.engine.train_step(trained.feed.batch(0))
            found[case.name] = Seen(
                loss=result.loss,
                grad_norm=result.grad_norm,
                eval_loss=valid.loss,
                metrics=result.metrics,
                eval_metrics=valid.metrics,
            )
    return found


@cache
def seen(ranks: int) -> list[dict[str, Seen]]:
    cases = [
        Case(
            name=f"{layout}: {form}: {strategy}",
            settings={"parallel": LAYOUTS[layout][1], **FORMS[form], "logging": {"acc_strategy": strategy}},
        )
        for layout in LAYOUTS
        for form in FORMS
        for strategy in ("token", "seq")
        if LAYOUTS[layout][0] == ranks
    ]
    return run_distributed(first_steps, ranks, folder(), answers()[0], cases)


@pytest.mark.ranks(4)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_logs_the_accuracy_that_argmax_has(layout: str, form: str) -> None:
    _, wanted = answers()
    for rank in seen(LAYOUTS[layout][0]):
        for strategy in ("token", "seq"):
            found, name = rank[f"{layout}: {form}: {strategy}"], f"{strategy}_acc"
            assert found.metrics == {name: wanted[name]} == found.eval_metrics


@pytest.mark.ranks(4)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_loss_and_gradient_are_alike_to_the_bit_whatever_is_counted(layout: str, form: str) -> None:
    for rank in seen(LAYOUTS[layout][0]):
        token, seq = (rank[f"{layout}: {form}: {strategy}"] for strategy in ("token", "seq"))
        assert (token.loss, token.grad_norm, token.eval_loss) == (seq.loss, seq.grad_norm, seq.eval_loss)
