"""Which validation is the best, by which figure, and how many came after it."""

import logging
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from megaswift.checkpoint.store import Checkpoint, Criterion
from megaswift.config.run import RunConfig
from megaswift.errors import ConfigError
from megaswift.tasks.paired import METRICS as PAIRED
from megaswift.training.validations import Validations, check_metric, criterion_of, resumed_validations
from tests.unit.test_checkpoint_store import manifest
from tests.unit.test_config_rules import dense, resolved

HELD_BACK = "--val_dataset v.jsonl"
ACCURACY = Criterion(metric="token_acc", greater_is_better=True)


def test_the_lowest_loss_may_be_named_without_validations() -> None:
    run = resolved("--metric_for_best_model eval_loss --greater_is_better false", dense()).config
    assert criterion_of(run) == Criterion()


def run_by(words: str, **options: Any) -> RunConfig:
    return resolved(f"{HELD_BACK} {words}", dense(), **options).config


@pytest.mark.parametrize(
    ("words", "metric", "greater"),
    [
        ("", "loss", False),
        ("--metric_for_best_model eval_loss", "loss", False),
        ("--metric_for_best_model eval_loss_math --enable_channel_loss true", "loss_math", False),
        ("--metric_for_best_model eval_token_acc", "token_acc", True),
        ("--metric_for_best_model token_acc --greater_is_better false", "token_acc", False),
        ("--greater_is_better true", "loss", True),
    ],
)
def test_the_greatest_is_best_unless_it_is_a_loss(words: str, metric: str, greater: bool) -> None:
    assert criterion_of(run_by(words)) == Criterion(metric=metric, greater_is_better=greater)


@pytest.mark.parametrize(
    ("words", "options", "known"),
    [
        ("", {}, "loss, token_acc."),
        ("--acc_strategy seq", {}, "loss, seq_acc."),
        ("--task_type seq_cls --num_labels 1 --problem_type regression", {}, "loss, mse, mae."),
        ("--task_type embedding", {}, "loss, accuracy, similarity/positive, similarity/negative, margin."),
        ("--task_type embedding --loss_type contrastive", {}, f"loss, similarity/positive, {', '.join(PAIRED)}."),
        ("--rlhf_type kto", {"task": "rlhf"}, "loss, rewards/chosen, rewards/rejected, logps/chosen, logps/rejected, kl, rewards/margins."),
        ("--rlhf_type gkd --teacher_model t --lmbda 0", {"task": "rlhf"}, "loss."),
        (
            "--rlhf_type grpo --reward_funcs format",
            {"task": "rlhf"},
            "reward, rewards/format/mean, completions/mean_length, completions/max_length, completions/clipped_ratio.",
        ),
        ("--rlhf_type gkd --teacher_model t --lmbda 0 --sft_alpha 0.5", {"task": "rlhf"}, "loss, sft_loss."),
    ],
)  # fmt: skip
def test_a_figure_that_nobody_reports_is_an_error_that_lists_them(
    words: str, options: dict[str, Any], known: str
) -> None:
    run = run_by(f"{words} --metric_for_best_model eval_bleu", **options)
    meta = replace(dense(), raw={"pad_token_id": 0})
    with pytest.raises(ConfigError) as caught:
        check_metric(run, meta)
    assert f"metric_for_best_model=bleu is not what validations report here. Choose from {known}" in str(
        caught.value
    )
    for name in known.strip(".").split(", "):
        check_metric(replace(run, logging=replace(run.logging, metric_for_best_model=name)), meta)


def test_generated_answers_have_figures_to_choose_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megaswift.config.report_rules._is_installed", lambda name: True)
    check_metric(run_by("--predict_with_generate true --metric_for_best_model rouge-l"), dense())
    with pytest.raises(ConfigError, match=r"Choose from .*, rouge-1, rouge-2, rouge-l, bleu-4\."):
        check_metric(run_by("--predict_with_generate true --metric_for_best_model rouge_l"), dense())


def test_patience_follows_the_figure_that_counts(caplog: pytest.LogCaptureFixture) -> None:
    found = Validations(criterion=ACCURACY)
    for step, accuracy in enumerate((0.5, 0.75, 0.75, float("nan")), start=1):
        assert not found.are_enough(2)
        found.add(step, {"loss": 1 / step, "token_acc": accuracy})
    assert (found.best, found.since, found.are_enough(2)) == (0.75, 2, True)
    with caplog.at_level(logging.WARNING, logger="megaswift"):
        found.add(5, {"loss": 0.1})  # says nothing either way
    assert (found.step, found.best, found.since) == (5, 0.75, 2)


def resumed(words: str, validations: dict[str, Any] | None) -> Validations:
    return resumed_validations(
        run_by(words), Checkpoint(folder=Path("c"), manifest=manifest(7, validations=validations))
    )


def test_a_resumed_run_counts_on() -> None:
    assert resumed("", None) == Validations()
    found = Validations(criterion=ACCURACY)
    for step, accuracy in enumerate((0.75, 0.5), start=1):
        found.add(step, {"loss": 1 / step, "token_acc": accuracy})
    assert resumed("--metric_for_best_model token_acc", asdict(found)) == found
    # A manifest of before there was a choice.
    older = resumed("", {"step": 6, "loss": 2.0, "lowest": 1.5, "since": 1})
    assert older == Validations(step=6, figures={"loss": 2.0}, best=1.5, since=1)


def test_a_run_that_is_resumed_by_another_figure_counts_from_the_newest() -> None:
    stored = asdict(Validations(step=6, figures={"loss": 2.0, "token_acc": 0.5}, best=1.5, since=3))
    by_accuracy = resumed("--metric_for_best_model token_acc", stored)
    assert (by_accuracy.best, by_accuracy.since, by_accuracy.step) == (0.5, 0, 6)
    older = resumed("--metric_for_best_model token_acc", {"step": 6, "loss": 2.0, "lowest": 1.5, "since": 3})
    assert (older.best, older.since) == (None, 0)
