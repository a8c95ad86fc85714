"""Room for those who write completions: the trainer's memory is free meanwhile, and training goes on as if nothing had been."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from megaswift.training.set_aside import SetAside
from tests.harness.distributed import run_distributed
from tests.harness.tiny import save_tiny
from tests.harness.training import Case, prepared, synthetic_set, temporary_folder

ROWS = {"global_batch_size": 4, "micro_batch_size": 2, "train_iters": 3}
# what is trained -> settings
TRAININGS: dict[str, dict[str, dict[str, Any]]] = {
    "full": {},
    "bfloat16": {"model": {"torch_dtype": "bfloat16"}},
    "no distributed optimizer": {"parallel": {"use_distributed_optimizer": False}},
    "lora": {"tuner": {"tuner_type": "lora", "lora_dropout": 0.0}},
    "galore": {"optimizer": {"use_galore": True, "galore_rank": 4}},
}
# what is set aside -> (model, optimizer)
PARTS = {"nothing": (False, False), "model": (True, False), "optimizer": (False, True), "both": (True, True)}


def memory(trained: Any) -> tuple[int, int]:
    """Return the bytes of weights with their gradients, and of Adam's state, of the parameters that train."""
    chunks, optimizer = trained.engine.chunks, trained.engine.optimizer
    state = [
        value
        for one in getattr(optimizer, "chained_optimizers", [optimizer])
        for values in one.optimizer.state.values()
        for value in values.values()
        if isinstance(value, torch.Tensor)
    ]
    weights = [one for chunk in chunks for one in chunk.parameters()]
    weights += [one.grad_data for chunk in chunks for one in chunk.buffers]
    return sum(x.untyped_storage().nbytes() for x in weights), sum(
        x.untyped_storage().nbytes() for x in state
    )


def curves(rank: int, world_size: int, model: Path) -> dict[tuple[str, str], Any]:
    """Return (loss, gradient norm) of three steps with completions in between, and what memory there was meanwhile."""
    found = {}
    for name, settings in TRAININGS.items():
        for part, (weights, state) in PARTS.items():
            case = Case(name=name, settings={"training": ROWS, **settings})
            with prepared(model, case, encoded=synthetic_set(entries=12)) as trained:
                aside, curve, meanwhile = (
                    SetAside(trained.engine, model=weights, optimizer=state),
                    [],
                    (0, 0),
                )
                for step in range(3):
                    with aside():
                        meanwhile = memory(trained)
                    result = trained.engine.train_step(trained.feed.batch(step * 4))
                    curve.append((result.loss, result.grad_norm))
                found[name, part] = curve, meanwhile, memory(trained)
    return found


@cache
def seen() -> dict[tuple[str, str], Any]:
    (found,) = run_distributed(curves, 1, save_tiny("llama", temporary_folder()))
    return found


@pytest.mark.parametrize("part", [part for part in PARTS if part != "nothing"])
@pytest.mark.parametrize("training", TRAININGS)
def test_what_is_set_aside_is_gone_meanwhile_and_then_the_same(training: str, part: str) -> None:
    model, optimizer = PARTS[part]
    expected, _, held = seen()[training, "nothing"]
    curve, meanwhile, after = seen()[training, part]
    assert curve == expected
    assert after == held and min(held) > 0
    assert (meanwhile[0] == 0) == model
    assert meanwhile[1] < held[1] / 10 if optimizer else meanwhile[1] == held[1]
