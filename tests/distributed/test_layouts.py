"""Optimizer steps under every layout against one rank: same weights, same data, same curve."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.harness.distributed import run_distributed
from tests.harness.tiny import save_tiny
from tests.harness.training import Case, curves, temporary_folder

Curve = list[tuple[float, float]]

# float32 sums in another order; after ten Adam steps the losses have moved apart by less than this.
LOSS_TOLERANCE = 1e-5
NORM_TOLERANCE = 1e-4

ROWS: dict[str, dict[str, dict[str, Any]]] = {
    "padded": {"data": {"padding_free": False}, "training": {"micro_batch_size": 2}},
    "packed": {
        "data": {"packing": True, "packing_length": 64},
        "training": {"micro_batch_size": 1, "global_batch_size": 4},
    },
}

# layout name -> (ranks, parallel settings)
DENSE: dict[str, tuple[int, dict[str, Any]]] = {
    "dp2": (2, {"use_distributed_optimizer": False}),
    "dp2 distopt": (2, {}),
    "dp2 distopt overlap": (2, {"overlap_grad_reduce": True, "overlap_param_gather": True}),
    "tp2": (2, {"tp": 2}),
    "tp2 sp": (2, {"tp": 2, "sequence_parallel": True}),
    "pp2": (2, {"pp": 2}),
    "pp2 vpp2": (2, {"pp": 2, "vpp": 2}),
    "pp2 uneven": (2, {"pp": 2, "pp_first": 1}),
    "tp2 pp2 sp": (4, {"tp": 2, "pp": 2, "sequence_parallel": True}),
    "dp2 tp2 distopt": (4, {"tp": 2}),
}
EXPERTS: dict[str, tuple[int, dict[str, Any]]] = {
    "dp2": (2, {}),
    "ep2": (2, {"ep": 2, "use_distributed_optimizer": False}),
    "ep2 distopt": (2, {"ep": 2}),
    "tp2 etp2": (2, {"tp": 2, "etp": 2}),
    "tp2 etp1": (2, {"tp": 2}),
    "tp2 ep2": (2, {"tp": 2, "ep": 2}),
    "pp2": (2, {"pp": 2}),
    "ep2 pp2 distopt": (4, {"ep": 2, "pp": 2}),
    "tp2 ep2 dp2 distopt": (4, {"tp": 2, "ep": 2}),
}
LORA: dict[str, tuple[int, dict[str, Any]]] = {
    name: DENSE[name]
    for name in ("dp2 distopt", "dp2 distopt overlap", "tp2", "tp2 sp", "pp2 vpp2", "tp2 pp2 sp")
}
EXPERTS_LORA: dict[str, tuple[int, dict[str, Any]]] = {
    name: EXPERTS[name] for name in ("ep2 distopt", "tp2 etp2", "tp2 etp1", "tp2 ep2", "tp2 ep2 dp2 distopt")
}
# What trains where a part of the model is frozen, whose four layers are on two stages: nothing below the last layer, nothing
# above the first, and parts of layers.
EVERYTHING = {"freeze_parameters_ratio": 1.0}
FROZEN: dict[str, dict[str, Any]] = {
    "late": {**EVERYTHING, "trainable_parameters": ["model.layers.3", "model.norm"]},
    "early": {**EVERYTHING, "trainable_parameters": ["model.layers.0"]},
    "ends": {**EVERYTHING, "trainable_parameters": ["model.embed_tokens", "lm_head"]},
    "parts": {
        "freeze_parameters": ["model.embed_tokens"],
        "freeze_parameters_regex": r"[13]\.mlp|self_attn.*\.bias",
    },
    "experts": {**EVERYTHING, "trainable_parameters_regex": r"layers\.[12]\..*experts\."},
}
# Adapters on the second stage alone.
REGEX = r"model\.layers\.(2\.self_attn\.[qkv]|[23]\.mlp\.(gate|up|down))_proj"
# With lora-ga vectors of close singular values differ by 1e-4, and in the ninth step a token goes to another expert.
STEPS = dict.fromkeys(("full", "lora", "dora", "pissa", "olora", "regex", "saved", *FROZEN), 10) | {
    "lora-ga": 8
}
# what is trained -> (model, tuner, layouts)
TRAININGS: dict[str, tuple[str, str, dict[str, tuple[int, dict[str, Any]]]]] = {
    "qwen2-tied": ("qwen2-tied", "full", DENSE),
    "qwen3": ("qwen3", "full", {name: DENSE[name] for name in ("pp2 vpp2", "tp2 pp2 sp", "dp2 tp2 distopt")}),
    "llama-odd-heads": ("llama-odd-heads", "full", {name: DENSE[name] for name in ("tp2", "tp2 pp2 sp")}),
    "llama-odd-heads lora": ("llama-odd-heads", "dora", {name: DENSE[name] for name in ("tp2", "tp2 sp")}),
    "qwen2_moe": ("qwen2_moe", "full", EXPERTS),
    "llama lora": ("llama", "lora", LORA),
    "llama pissa": ("llama", "pissa", {name: DENSE[name] for name in ("dp2 distopt", "tp2 sp", "pp2 vpp2")}),
    "llama lora-ga": (
        "llama",
        "lora-ga",
        {name: DENSE[name] for name in ("dp2 distopt overlap", "tp2 sp", "tp2 pp2 sp")},
    ),
    "qwen3_moe lora-ga": (
        "qwen3_moe",
        "lora-ga",
        {name: EXPERTS[name] for name in ("ep2 distopt", "tp2 etp2")},
    ),
    "llama olora": ("llama", "olora", {"tp2 sp": DENSE["tp2 sp"]}),
    "llama regex": ("llama", "regex", {"pp2": DENSE["pp2"]}),
    "qwen2-tied saved": (
        "qwen2-tied",
        "saved",
        {name: DENSE[name] for name in ("pp2", "tp2 sp", "dp2 distopt")},
    ),
    "qwen3_moe lora": ("qwen3_moe", "lora", EXPERTS_LORA),
    "llama late": ("llama", "late", {name: DENSE[name] for name in ("pp2", "pp2 vpp2", "tp2 sp")}),
    "llama early": ("llama", "early", {name: DENSE[name] for name in ("pp2", "dp2 distopt overlap")}),
    "qwen2-tied ends": ("qwen2-tied", "ends", {"pp2": DENSE["pp2"]}),
    "qwen2 parts": ("qwen2", "parts", {"tp2 pp2 sp": DENSE["tp2 pp2 sp"]}),
    "qwen3_moe experts": ("qwen3_moe", "experts", {"ep2 pp2 distopt": EXPERTS["ep2 pp2 distopt"]}),
}


# Layouts of padded rows: what is parallel does not depend on them, but shapes and masks do on each way to be so.
PADDED = {"one", "dp2", "tp2 sp", "pp2", "tp2 pp2 sp", "tp2 etp2", "ep2 pp2 distopt"}


def rows_of(tuner: str, layout: str) -> dict[str, dict[str, dict[str, Any]]]:
    """Return the kinds of rows to train on: what is frozen does not depend on them."""
    alike = tuner in (*FROZEN, "regex", "saved", "olora", "lora-ga")
    return {"packed": ROWS["packed"]} if alike or layout not in PADDED else ROWS


@cache
def folder_of(model: str) -> Path:
    return save_tiny(model, temporary_folder())


@cache
def all_curves(training: str, ranks: int) -> list[dict[str, Curve]]:
    """Run every layout of so many ranks in one set of processes; return what each rank saw."""
    model, tuner, layouts = TRAININGS[training]
    fully = tuner == "full" or tuner in FROZEN
    # Adapters, and parts of a model, need larger steps to learn as much; dropout would draw other numbers under every layout. A gradient
    # that is zero but for rounding has a random direction, which Adam would follow: a larger eps keeps such weights still.
    adapted = {
        "tuner": {
            "tuner_type": "full" if fully else "lora",
            "target_regex": REGEX if tuner == "regex" else None,
            "modules_to_save": ["embed_tokens", "norm"] if tuner == "saved" else [],
            "lora_dropout": 0.0,
            "use_dora": tuner == "dora",
            "init_weights": tuner if tuner in ("pissa", "olora", "lora-ga") else "true",
        },
        "freeze": FROZEN.get(tuner, {}),
        "optimizer": {"lr": 1e-3 if tuner == "full" else 1e-2, "adam_eps": 1e-8 if tuner == "full" else 1e-3},
    }
    cases = [
        Case(
            name=f"{name} {rows}",
            settings={
                **of_rows,
                **adapted,
                "parallel": parallel,
                "training": {**of_rows["training"], "train_iters": STEPS[tuner]},
            },
        )
        for name, (world, parallel) in {"one": (1, {}), **layouts}.items()
        if world == ranks
        for rows, of_rows in rows_of(tuner, name).items()
    ]
    return run_distributed(curves, ranks, folder_of(model), cases)


@pytest.mark.ranks(4)
@pytest.mark.parametrize(
    ("training", "layout", "rows"),
    [
        (training, name, rows)
        for training, (_, tuner, layouts) in TRAININGS.items()
        for name in layouts
        for rows in rows_of(tuner, name)
    ],
)
def test_layout_trains_like_one_rank(training: str, layout: str, rows: str) -> None:
    expected = all_curves(training, 1)[0][f"one {rows}"]
    assert expected[-1][0] < 0.9 * expected[0][0], "the run must learn, or equal curves would say little"
    for rank, seen in enumerate(all_curves(training, TRAININGS[training][2][layout][0])):
        found = seen[f"{layout} {rows}"]
        assert len(found) == STEPS[TRAININGS[training][1]]
        for (loss, norm), (one_loss, one_norm) in zip(found, expected, strict=True):
            assert loss == pytest.approx(one_loss, rel=LOSS_TOLERANCE), f"rank {rank}"
            assert norm == pytest.approx(one_norm, rel=NORM_TOLERANCE), f"rank {rank}"
