"""Training in emulated FP8: it learns as float32 does, on any layout, with adapters, experts and recomputation."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.test_layouts import Curve
from tests.harness.distributed import run_distributed
from tests.harness.tiny import save_tiny
from tests.harness.training import Case, curves, temporary_folder

RECIPES = ("delayed", "tensorwise", "blockwise", "mxfp8")
PACKS = {
    "data": {"packing": True, "packing_length": 64},
    "training": {"micro_batch_size": 1, "global_batch_size": 4, "train_iters": 12},
    "optimizer": {"lr": 3e-4},
}
FULL_RECOMPUTE = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}


def case_of(name: str, recipe: str | None, **settings: dict[str, Any]) -> Case:
    merged = {
        section: {**PACKS.get(section, {}), **settings.get(section, {})} for section in {*PACKS, *settings}
    }
    if recipe is not None:
        merged["precision"] = {"fp8_format": "hybrid", "fp8_recipe": recipe}
    return Case(name=name, settings=merged)


@cache
def folder_of(model: str) -> Path:
    return save_tiny(model, temporary_folder())


@cache
def on_one_rank() -> dict[str, Curve]:
    cases = [case_of("float32", None), *(case_of(recipe, recipe) for recipe in RECIPES)]
    cases += [
        case_of("recomputed", "delayed", training=FULL_RECOMPUTE),
        case_of(
            "lora", "tensorwise", tuner={"tuner_type": "lora", "lora_dropout": 0.0}, optimizer={"lr": 1e-2}
        ),
    ]
    (found,) = run_distributed(curves, 1, folder_of("llama"), cases)
    return found


@pytest.mark.ranks(1)
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_learns_as_float32_does(recipe: str) -> None:
    plain, ours = on_one_rank()["float32"], on_one_rank()[recipe]
    assert plain[-1][0] < 0.97 * plain[0][0], "the run must learn, or equal curves would say little"
    for (loss, _), (plain_loss, _) in zip(ours, plain, strict=True):
        assert loss == pytest.approx(plain_loss, rel=0.01)
        assert loss != plain_loss, "something is quantised"


@pytest.mark.ranks(1)
def test_recomputation_reads_the_same_scales() -> None:
    assert on_one_rank()["recomputed"][0] == on_one_rank()["delayed"][0]
    for (loss, _), (plain_loss, _) in zip(on_one_rank()["recomputed"], on_one_rank()["delayed"], strict=True):
        assert loss == pytest.approx(plain_loss, rel=0.01)


@pytest.mark.ranks(1)
def test_adapters_learn_beside_weights_in_fp8() -> None:
    losses = [loss for loss, _ in on_one_rank()["lora"]]
    assert losses[-1] < 0.98 * losses[0]


@pytest.mark.ranks(2)
def test_ranks_share_their_scales() -> None:
    layouts = {
        "tp2 sp": {"tp": 2, "sequence_parallel": True},
        "cp2": {"cp": 2, "cp_comm_type": "a2a"},
        "dp2": {},
    }
    cases = [case_of(name, "delayed", parallel=parallel) for name, parallel in layouts.items()]
    for seen in run_distributed(curves, 2, folder_of("llama"), cases):
        for name, curve in seen.items():
            for (loss, _), (one_loss, _) in zip(curve, on_one_rank()["delayed"], strict=True):
                # Numbers between two codes fall to either side as sums differ in their last bit.
                assert loss == pytest.approx(one_loss, rel=5e-3), name


@pytest.mark.ranks(2)
def test_experts_learn_in_fp8_on_ranks_of_their_own() -> None:
    cases = [case_of("ep2", "delayed", parallel={"ep": 2}), case_of("plain", None, parallel={"ep": 2})]
    for seen in run_distributed(curves, 2, folder_of("qwen3_moe"), cases):
        for (loss, _), (plain_loss, _) in zip(seen["ep2"], seen["plain"], strict=True):
            assert loss == pytest.approx(plain_loss, rel=0.02)  # a near tie of two experts may flip
