"""Optimizer steps with every sequence spread over ranks, against one rank: same weights, same data, same curve."""

import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.test_layouts import LOSS_TOLERANCE, NORM_TOLERANCE, ROWS, Curve
from tests.harness.distributed import run_distributed
from tests.harness.tiny import save_tiny
from tests.harness.training import Case, curves, export_gradients, prepared, temporary_folder

MODES = ("p2p", "a2a", "all_gather", "auto")
SP = {"tp": 2, "sequence_parallel": True}

# layout name -> (ranks, parallel settings)
DENSE: dict[str, tuple[int, dict[str, Any]]] = {
    **{f"cp2 {mode}": (2, {"cp": 2, "cp_comm_type": mode}) for mode in MODES},
    "cp2 a2a tp2 sp": (4, {"cp": 2, "cp_comm_type": "a2a", **SP}),
    "cp2 p2p tp2": (4, {"cp": 2, "cp_comm_type": "p2p", "tp": 2}),
    "cp2 all_gather pp2": (4, {"cp": 2, "cp_comm_type": "all_gather", "pp": 2}),
    "cp2 p2p dp2 distopt": (4, {"cp": 2, "cp_comm_type": "p2p"}),
    "cp4 a2a+p2p": (4, {"cp": 4, "cp_comm_type": "a2a+p2p"}),
    "cp4 p2p": (4, {"cp": 4, "cp_comm_type": "p2p"}),
}
RING_AND_HEADS = {name: DENSE[name] for name in ("cp2 p2p", "cp2 a2a")}
# what is trained -> (model, other settings, layouts)
TRAININGS: dict[str, tuple[str, dict[str, Any], dict[str, tuple[int, dict[str, Any]]]]] = {
    "qwen3": ("qwen3", {}, DENSE),
    "mean of micro batches": ("qwen3", {"training": {"calculate_per_token_loss": False}}, RING_AND_HEADS),
    "window": (
        "mistral-window",
        {},
        {name: DENSE[name] for name in ("cp2 p2p", "cp2 all_gather", "cp4 a2a+p2p")},
    ),
    "latent attention": ("deepseek_v3", {}, {**RING_AND_HEADS, "cp2 a2a tp2 sp": DENSE["cp2 a2a tp2 sp"]}),
    "sinks, window, experts": ("gpt_oss", {}, {**RING_AND_HEADS, "cp2 ep2": (2, {"cp": 2, "ep": 2})}),
    # An epsilon above gradients that are all rounding: Adam would take steps of full size along them.
    "layers of two sizes": ("gemma4_text-dense", {"optimizer": {"adam_eps": 1e-3}}, RING_AND_HEADS),
    "experts": (
        "qwen3_moe",
        {"moe": {"moe_aux_loss_coeff": 0.01, "moe_router_load_balancing_type": "aux_loss"}},
        {"cp2 ep2": (2, {"cp": 2, "ep": 2}), "cp2 tp2 ep2": (4, {"cp": 2, "tp": 2, "ep": 2})},
    ),
    "lora": (
        "llama",
        {"tuner": {"tuner_type": "lora", "lora_dropout": 0.0}, "optimizer": {"lr": 1e-2, "adam_eps": 1e-3}},
        {name: DENSE[name] for name in ("cp2 p2p", "cp2 a2a tp2 sp")},
    ),
}

# Megatron's router losses count padding too, of which a layout needs more or less: here all have as much.
PADDED = {"experts": 8}


def steps_of(training: str, rows: str) -> int:
    """Ten steps of the plain model in every mode; of the others a few, for every gradient is compared as well."""
    return 10 if (training, rows) == ("qwen3", "packed") else 5


@cache
def folder_of(model: str) -> Path:
    return save_tiny(model, temporary_folder())


def cases_of(training: str, ranks: int) -> list[Case]:
    _, settings, layouts = TRAININGS[training]
    cases = []
    for name, (world, parallel) in {"one": (1, {}), **layouts}.items():
        for rows, of_rows in ROWS.items():
            merged: dict[str, Any] = {"parallel": parallel}
            for part in (of_rows, settings, {"training": {"train_iters": steps_of(training, rows)}}):
                for section, values in part.items():
                    merged[section] = {**merged.get(section, {}), **values}
            if world == ranks:
                cases.append(
                    Case(name=f"{name} {rows}", settings=merged, pad_to_multiple=PADDED.get(training, 1))
                )
    return cases


@cache
def all_curves(training: str, ranks: int) -> list[dict[str, Curve]]:
    """Run every layout of so many ranks in one set of processes; return what each rank saw."""
    return run_distributed(curves, ranks, folder_of(TRAININGS[training][0]), cases_of(training, ranks))


@cache
def all_gradients(training: str, ranks: int) -> dict[str, dict[str, torch.Tensor]]:
    """Return the gradients of the first step under every layout of so many ranks, by their weights' names in the file."""
    output, cases = temporary_folder(), cases_of(training, ranks)
    run_distributed(export_gradients, ranks, folder_of(TRAININGS[training][0]), cases, output)
    found = {case.name: load_file(output / case.name / "model.safetensors") for case in cases}
    shutil.rmtree(output)
    return found


@pytest.mark.ranks(4)
@pytest.mark.parametrize(
    ("training", "layout"),
    [(training, name) for training, (_, _, layouts) in TRAININGS.items() for name in layouts],
)
def test_spread_sequences_train_like_whole_ones(training: str, layout: str) -> None:
    for rows in ROWS:
        expected = all_curves(training, 1)[0][f"one {rows}"]
        learned, steps = expected[-1][0] / expected[0][0], steps_of(training, rows)
        assert steps < 20 or learned < 0.95, "the run must learn, or equal curves would say little"
        for rank, seen in enumerate(all_curves(training, TRAININGS[training][2][layout][0])):
            found = seen[f"{layout} {rows}"]
            assert len(found) == steps
            for (loss, norm), (one_loss, one_norm) in zip(found, expected, strict=True):
                assert loss == pytest.approx(one_loss, rel=LOSS_TOLERANCE), f"rank {rank}, {rows}"
                assert norm == pytest.approx(one_norm, rel=NORM_TOLERANCE), f"rank {rank}, {rows}"


@pytest.mark.ranks(4)
@pytest.mark.parametrize(
    ("training", "layout"),
    [
        (training, name)
        for training, (_, settings, layouts) in TRAININGS.items()
        for name in layouts
        if "tuner" not in settings
    ],
)
def test_every_gradient_is_that_of_one_rank(training: str, layout: str) -> None:
    ranks = TRAININGS[training][2][layout][0]
    for rows in ROWS:
        found, wanted = (
            all_gradients(training, count)[f"{name} {rows}"] for count, name in ((ranks, layout), (1, "one"))
        )
        assert found.keys() == wanted.keys()
        largest = max(float(gradient.abs().max()) for gradient in wanted.values())
        for name, gradient in wanted.items():
            # float32 sums in another order, relative to the largest of the tensor, or to a hundredth of the largest of all
            scale = max(float(gradient.abs().max()), largest / 100)
            assert float((found[name] - gradient).abs().max()) <= 1e-5 * scale, (rows, name)


def validate(rank: int, world_size: int, folder: Path, cases: list[Case]) -> dict[str, float]:
    """Return the validation loss of every case before its first step."""
    found = {}
    for case in cases:
        with prepared(folder, case) as trained:
            items = trained.feed.items_per_step
            batches = [trained.feed.batch(0), trained.feed.batch(items)]
            found[case.name] = trained.engine.evaluate(batches).loss
    return found


@pytest.mark.ranks(2)
@pytest.mark.parametrize("training", ["qwen3", "mean of micro batches"])
def test_validation_sees_every_token_once(training: str) -> None:
    folder = folder_of(TRAININGS[training][0])
    (expected,) = run_distributed(validate, 1, folder, cases_of(training, 1))
    for seen in run_distributed(validate, 2, folder, cases_of(training, 2)[:4]):
        for name, loss in seen.items():
            assert loss == pytest.approx(expected[f"one {name.split()[-1]}"], rel=1e-6), name
