"""Dynamic fine-tuning: loss and gradient are those of the formula on transformers' model, under every layout."""

from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.harness.distributed import run_distributed
from tests.harness.tiny import save_tiny
from tests.harness.training import Case, prepared, synthetic_set, temporary_folder

TOLERANCE = 1e-5  # float32 sums in another order
ROWS = 8
# layout -> (ranks, parallel settings)
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "dp2": (2, {}),
    "tp2 sp": (2, {"tp": 2, "sequence_parallel": True}),
    "cp2": (2, {"cp": 2}),
    "tp2 pp2": (4, {"tp": 2, "pp": 2}),
}


@cache
def folder() -> Path:
    return save_tiny("llama", temporary_folder())


def first_steps(rank: int, world_size: int, model: Path, cases: list[Case]) -> dict[str, tuple[float, float]]:
    """Return loss and gradient norm of the first step, on all rows."""
    found = {}
    for case in cases:
        with prepared(model, case, encoded=synthetic_set(entries=ROWS)) as trained:
            result = trained.engine.train_step(trained.feed.batch(0))
            assert result.grad_norm is not None
            found[case.name] = (result.loss, result.grad_norm)
    return found


@cache
def seen(ranks: int) -> list[dict[str, tuple[float, float]]]:
    rows = {"global_batch_size": ROWS, "micro_batch_size": 2, "train_iters": 1, "enable_dft_loss": True}
    cases = [
        Case(name=name, settings={"parallel": parallel, "training": rows})
        for name, (world, parallel) in LAYOUTS.items()
        if world == ranks
    ]
    return run_distributed(first_steps, ranks, folder(), cases)


@cache
def expected() -> tuple[float, float]:
    """-p log p of every token that carries loss, a mean over them, in float64; no gradient through the factor p."""
    model = AutoModelForCausalLM.from_pretrained(folder(), dtype=torch.float64)
    encoded, parts = synthetic_set(entries=ROWS), []
    for start, end in pairwise(encoded.starts.tolist()):
        ids = torch.tensor(encoded.input_ids[start:end].tolist())
        carries = torch.tensor(encoded.loss_weights[start + 1 : end].tolist()) != 0
        log_p = model(ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[carries, 0]
        parts.append(-log_p.exp().detach() * log_p)
    loss = torch.cat(parts).mean()
    loss.backward()
    norms = [weight.grad.norm() for weight in model.parameters() if weight.grad is not None]
    return float(loss.detach()), float(torch.stack(norms).norm())


@pytest.mark.ranks(4)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_has_the_loss_and_gradient_of_dynamic_fine_tuning(layout: str) -> None:
    for rank in seen(LAYOUTS[layout][0]):
        assert rank[layout] == pytest.approx(expected(), rel=TOLERANCE)
