"""Forms of GRPO's loss that look beyond a token, in whole runs: what they log is what the completions of the run say."""

import math
from typing import Any

import pytest

from tests.distributed.test_grpo_runs import LOSS_TOLERANCE, figures, table

GROUP = 4


def groups_of(rows: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    return [rows[first : first + GROUP] for first in range(0, len(rows), GROUP)]


@pytest.mark.slow
def test_the_first_loss_of_labels_counts_them() -> None:
    """The model is still the one that wrote the completions, so that all scores, and the divergence, are 0."""
    rows, lines = table("labels", "one", "completions.jsonl"), figures("labels", "one")
    expected = []
    for group in groups_of(rows[:8]):
        better = sum(row["advantage"] > 0 for row in group)
        expected.append(math.log(1 + better) + math.log(1 + GROUP - better) if better else 0.0)
    assert any(expected)
    assert lines[0]["loss"] == pytest.approx(sum(expected) / len(expected), rel=LOSS_TOLERANCE)
    assert lines[1]["loss"] < lines[0]["loss"], "the second use of the same completions"


@pytest.mark.slow
def test_weights_follow_from_what_the_model_has_become() -> None:
    lines = figures("future", "one")
    assert lines[0]["fipo/influence_weight_mean"] == pytest.approx(1, rel=LOSS_TOLERANCE)
    assert abs(lines[1]["fipo/influence_weight_mean"] - 1) > 1e-3
    rows = table("future", "one", "completions.jsonl")[:8]
    advantages = [row["advantage"] for row in rows]
    assert sum(advantages) == pytest.approx(0, abs=1e-5), "of the batch, not of each group alone"
    for name in ("near", "brief"):
        assert any(len({row["rewards"][name] for row in group}) > 1 for group in groups_of(rows))
