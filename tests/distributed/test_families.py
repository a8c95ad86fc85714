"""A few optimizer steps of every family cut over tp, sequence, pp and ep, against one rank."""

from functools import cache
from typing import Any

import pytest

from tests.distributed.test_layouts import LOSS_TOLERANCE, NORM_TOLERANCE, ROWS, Curve, folder_of
from tests.harness.distributed import run_distributed
from tests.harness.training import Case, curves

# One of each kind of norm, placement, activation, bias and multiplier.
DENSE = (
    "apertus",
    "cohere2",
    "exaone4",
    "gemma2",
    "gemma3_text",
    "gemma4_text-dense",
    "glm4",
    "granite",
    "hunyuan_v1_dense",
    "llama-mlp-bias",
    "olmo2-odd-heads",
    "olmo3-yarn",
    "phi3-long",
    "qwen3_5_text",
    "seed_oss",
    "starcoder2",
)
# One of each kind of router, of attention and of packing.
EXPERTS = (
    "deepseek_v2-groups",
    "deepseek_v3",
    "dots1-groups",
    "ernie4_5_moe",
    "gemma4_text",
    "gpt_oss",
    "granitemoeshared",
    "llama4_text",
    "minimax_m2",
    "qwen3_next",
)
# families, their layouts of two ranks, and how many steps
GROUPS: tuple[tuple[tuple[str, ...], dict[str, dict[str, Any]], int], ...] = (
    (DENSE, {"tp2": {"tp": 2}, "tp2 sp": {"tp": 2, "sequence_parallel": True}, "pp2": {"pp": 2}}, 4),
    (("gemma4_text-small",), {"tp2": {"tp": 2}, "tp2 sp": {"tp": 2, "sequence_parallel": True}, "cp2": {"cp": 2}}, 3),
    (EXPERTS, {"tp2 sp": {"tp": 2, "sequence_parallel": True}, "ep2": {"ep": 2}, "pp2": {"pp": 2}}, 3),
)
CASES = {family: (layouts, steps) for families, layouts, steps in GROUPS for family in families}


@cache
def all_curves(family: str, ranks: int) -> list[dict[str, Curve]]:
    """Run every layout of so many ranks in one set of processes; return what each rank saw."""
    layouts, steps = CASES[family]
    rows = ROWS["packed"]
    # Some gradients are zero but for rounding, which differs between processors: with its usual eps Adam would follow it.
    still = {"adam_eps": 1e-3}
    settings = {**rows, "training": {**rows["training"], "train_iters": steps}, "optimizer": still}
    chosen = {"one": {}} if ranks == 1 else layouts
    cases = [
        Case(name=name, settings={**settings, "parallel": parallel}) for name, parallel in chosen.items()
    ]
    return run_distributed(curves, ranks, folder_of(family), cases)


@pytest.mark.ranks(2)
@pytest.mark.parametrize(
    ("family", "layout"), [(family, layout) for family, (layouts, _) in CASES.items() for layout in layouts]
)
def test_family_trains_like_one_rank(family: str, layout: str) -> None:
    expected = all_curves(family, 1)[0]["one"]
    for rank, seen in enumerate(all_curves(family, 2)):
        assert len(seen[layout]) == CASES[family][1]
        for (loss, norm), (one_loss, one_norm) in zip(seen[layout], expected, strict=True):
            assert loss == pytest.approx(one_loss, rel=LOSS_TOLERANCE), f"rank {rank}"
            assert norm == pytest.approx(one_norm, rel=NORM_TOLERANCE), f"rank {rank}"
