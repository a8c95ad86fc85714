"""Sequence classification: the labels of rows, the loss and its gradient, and the settings that it needs."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig
from transformers.loss.loss_utils import ForSequenceClassificationLoss

from megaswift.data.forms import labelled
from megaswift.errors import ConfigError
from megaswift.tasks.classification import METRICS, classification_loss
from tests.unit.test_config_rules import dense, resolved
from tests.unit.test_data_pairs import encoded_rows, text

USER, ANSWER = {"role": "user", "content": "3+4?"}, {"role": "assistant", "content": "8"}
SCORES = [[0.3, -0.4, 1.2], [-1.5, 0.2, 0.1], [2.0, 1.0, -3.0], [0.0, 0.7, 0.6]]
LABELS = {
    "single_label_classification": [2, 0, 0, 1],
    "multi_label_classification": [[1, 0, 1], [0, 0, 0], [1, 1, 0], [0, 1, 1]],
    "regression": [[0.5, -1.0, 2.0], [0.0, 0.0, 0.3], [1.0, 1.5, -2.0], [-0.2, 0.7, 0.6]],
}
# Scores and gradients are of order 1. Central differences of step 1e-4 are wrong by 1e-8 times a third derivative.
TOLERANCE, STEP = 1e-6, 1e-4


def paper(problem: str, scores: list[float], label: object) -> float:
    """Return the loss of one row as tasks/classification.py states it."""
    if problem == "single_label_classification":
        return math.log(sum(math.exp(score) for score in scores)) - scores[label]  # type: ignore[index]  # an int
    pairs = list(zip(scores, label, strict=True))  # type: ignore[call-overload]  # numbers
    if problem == "regression":
        return sum((score - number) ** 2 for score, number in pairs) / len(pairs)
    costs = [
        math.log(1 + math.exp(-score)) if held else math.log(1 + math.exp(score)) for score, held in pairs
    ]
    return sum(costs) / len(pairs)


@pytest.mark.parametrize("problem", LABELS)
def test_loss_and_gradient_are_the_formulas_and_those_of_transformers(problem: str) -> None:
    scores = torch.tensor(SCORES, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor(LABELS[problem], dtype=torch.float64)
    outcome = classification_loss(scores, labels, problem=problem)
    expected = [paper(problem, *row) for row in zip(SCORES, LABELS[problem], strict=True)]
    assert outcome.losses_R.tolist() == pytest.approx(expected, abs=TOLERANCE)
    (gradient,) = torch.autograd.grad(outcome.losses_R.sum(), scores)
    for row, label in enumerate(LABELS[problem]):
        for number in range(3):
            moved = [
                [score + sign * STEP * (place == number) for place, score in enumerate(SCORES[row])]
                for sign in (1, -1)
            ]
            slope = (paper(problem, moved[0], label) - paper(problem, moved[1], label)) / (2 * STEP)
            assert float(gradient[row, number]) == pytest.approx(slope, abs=TOLERANCE)
    config = LlamaConfig(num_labels=3, problem_type=problem)
    theirs = ForSequenceClassificationLoss(
        labels.long() if problem.startswith("single") else labels, scores, config
    )
    assert float(outcome.losses_R.mean()) == pytest.approx(float(theirs), abs=1e-12)
    assert set(outcome.metrics) == set(METRICS[problem])
    assert not any(values.requires_grad for values in outcome.metrics.values())


def test_metrics_count_what_is_right() -> None:
    scores = torch.tensor(SCORES, dtype=torch.float64)
    found = {
        problem: classification_loss(
            scores, torch.tensor(labels, dtype=torch.float64), problem=problem
        ).metrics
        for problem, labels in LABELS.items()
    }
    assert found["single_label_classification"]["accuracy"].tolist() == [1, 0, 1, 1]
    several = found["multi_label_classification"]
    assert several["accuracy"].tolist() == pytest.approx([1, 1 / 3, 1, 1])
    assert several["exact_match"].tolist() == [1, 0, 1, 1]
    assert found["regression"]["mae"].tolist() == pytest.approx([1.6 / 3, 1.9 / 3, 2.5 / 3, 0.2 / 3])


def test_a_row_is_read_up_to_where_an_answer_would_begin(tmp_path: Path) -> None:
    rows = [
        {"messages": [USER], "label": 1},
        {"query": "3+4?", "label": 0},
        {"text": "3+4?", "label": True},
        {"messages": [USER, ANSWER], "label": 2},
    ]
    encoded, report, template = encoded_rows(
        tmp_path, rows, labelled("single_label_classification", num_labels=3)
    )
    assert report.kept == len(encoded) == 4
    assert encoded.targets is not None and encoded.targets.tolist() == [1, 0, 1, 2]
    assert not encoded.loss_weights.any()
    texts = [text(encoded, entry, template) for entry in range(4)]
    assert texts[0] == texts[1] == texts[2]
    assert texts[0].endswith("3+4?<|im_end|>\n<|im_start|>assistant\n")
    assert texts[3].endswith("8<|im_end|>\n"), "an answer that is there is judged, and none is waited for"


def test_several_labels_are_numbers_of_labels_or_floats(tmp_path: Path) -> None:
    rows = [{"messages": [USER], "label": label} for label in ([0, 2], [], [0.0, 1.0, 1.0], "[1]", 2)]
    encoded, report, _ = encoded_rows(tmp_path, rows, labelled("multi_label_classification", num_labels=3))
    assert report.kept == 5
    expected = [[1, 0, 1], [0, 0, 0], [0, 1, 1], [0, 1, 0], [0, 0, 1]]
    assert encoded.targets is not None and np.array_equal(encoded.targets, np.array(expected, np.float32))


@pytest.mark.parametrize(
    ("problem", "num_labels", "label", "reason"),
    [
        ("single_label_classification", 3, 3, "label is 3, not a whole number from 0 to 2"),
        ("single_label_classification", 3, 0.5, "label is 0.5, not a whole number"),
        ("single_label_classification", 3, None, "label is None, not a whole number"),
        (
            "multi_label_classification",
            3,
            [0, 5],
            "not a list of whole numbers from 0 to 2, nor one of 3 floats",
        ),
        ("multi_label_classification", 3, [0.5, 1.0], "not a list of whole numbers"),
        ("regression", 1, [1.0, 2.0], "not a finite number"),
        ("regression", 2, 1.0, "not a list of 2 finite numbers"),
        ("regression", 1, math.nan, "label is nan, not a finite number"),
        ("regression", 1, 1e39, "not a finite number"),  # infinite as float32
        ("regression", 2, [0.5, -math.inf], "not a list of 2 finite numbers"),
    ],
)
def test_a_label_that_does_not_fit_is_reported(
    problem: str, num_labels: int, label: object, reason: str, tmp_path: Path
) -> None:
    good = {"single_label_classification": 0, "multi_label_classification": [0], "regression": 1.0}[problem]
    fits = [good] * num_labels if problem == "regression" and num_labels > 1 else good
    rows = [{"messages": [USER], "label": label}, {"messages": [USER], "label": fits}]
    _, report, _ = encoded_rows(tmp_path, rows, labelled(problem, num_labels=num_labels))
    (bad,) = report.bad
    assert bad.kind == "label" and reason in bad.reason


def test_long_rows_are_cut_where_asked(tmp_path: Path) -> None:
    rows = [{"messages": [{**USER, "content": "long " * 90 + "end"}], "label": 1}]
    form = labelled("single_label_classification", num_labels=2)
    for side in ("left", "right"):
        encoded, report, template = encoded_rows(
            tmp_path, rows, form, max_length=60, truncation_strategy=side
        )
        assert report.kept == 1 and encoded.lengths.tolist() == [60]
        assert ("end" in text(encoded, 0, template)) == (side == "left")


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ("--num_labels 1", "regression"),
        ("--num_labels 3", "single_label_classification"),
        ("--num_labels 3 --problem_type multi_label_classification", "multi_label_classification"),
    ],
)
def test_the_problem_follows_from_the_labels(words: str, problem: str) -> None:
    assert resolved(f"--task_type seq_cls {words}", dense()).config.model.problem == problem


@pytest.mark.parametrize(
    ("words", "task", "message"),
    [
        ("--task_type seq_cls", "sft", "task_type=seq_cls needs num_labels"),
        ("--num_labels 3", "sft", "num_labels=3 is for sequence classification"),
        ("--problem_type regression", "sft", "problem_type=regression is for sequence classification"),
        (
            "--task_type seq_cls --num_labels 3",
            "pt",
            "task_type=seq_cls is for `megaswift sft`, not `megaswift pt`",
        ),
        (
            "--task_type seq_cls --num_labels 1 --problem_type single_label_classification",
            "sft",
            "num_labels=1 is too small for single_label_classification. Give 2 or more",
        ),
        (
            "--task_type seq_cls --num_labels 3 --calculate_per_token_loss false",
            "sft",
            "calculate_per_token_loss=false is for token losses: task_type=seq_cls",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused(words: str, task: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolved(words, dense(), task=task)
