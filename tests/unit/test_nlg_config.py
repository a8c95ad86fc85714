"""--predict_with_generate: what it goes with, and what it is told otherwise."""

import pytest

from megaswift.config import report_rules
from megaswift.config.rules import ResolvedRun
from megaswift.errors import ConfigError
from tests.unit.test_config_rules import dense, resolved

PREDICT = "--predict_with_generate true --val_dataset v.jsonl "


def predicting(words: str = "") -> ResolvedRun:
    return resolved(PREDICT + words, dense())


@pytest.mark.parametrize("metric", ["", "--eval_metric nlg", "--eval_metric acc"])
def test_either_metric_goes_with_generated_answers(metric: str) -> None:
    assert predicting(metric).config.logging.predict_with_generate


def test_the_longest_answer_has_the_name_of_ms_swift_too() -> None:
    words = "--max_new_tokens 64 --repetition_penalty 1.1 --log_completions true"
    assert predicting(words).config.rollout.max_completion_length == 64


@pytest.mark.parametrize(
    ("words", "task", "message"),
    [
        ("--predict_with_generate true", "sft", "predict_with_generate=true needs validations. Give --val_dataset or"),
        (PREDICT + "--eval_iters 0", "sft", "predict_with_generate=true needs validations"),
        (PREDICT, "pt", "predict_with_generate=true is for `megaswift sft` of language models, not `megaswift pt`. Leave"),
        (PREDICT + "--rlhf_type gkd --teacher_model t", "rlhf", "language models, not `megaswift rlhf`. Leave"),
        (PREDICT + "--task_type seq_cls --num_labels 2", "sft", "models, not `megaswift sft --task_type seq_cls`. Leave"),
        (PREDICT + "--task_type embedding --eval_metric infonce", "sft", "`megaswift sft --task_type embedding`"),
        (PREDICT + "--streaming true --train_iters 3", "sft", "predict_with_generate=true is not built for streaming=true"),
        (PREDICT + "--truncation_strategy right", "sft", "Choose delete or left, or leave predict_with_generate out."),
        (PREDICT + "--max_length 512", "sft", "max_completion_length=512 leaves no room for a prompt in max_length=512"),
        (PREDICT + "--max_new_tokens 0", "sft", "max_completion_length=0 is too small"),
        (PREDICT + "--temperature 0.5", "sft", "temperature=0.5 is for completions that are drawn, and predict_with_generate"),
        (PREDICT + "--top_k 5", "sft", "top_k=5 is for completions that are drawn"),
        (PREDICT + "--num_generations 4", "sft", "num_generations=4 is for `megaswift rlhf --rlhf_type grpo`. Leave"),
        ("--eval_metric nlg --val_dataset v", "sft", "eval_metric=nlg needs generated answers. Add --predict_with_generate true."),
        ("--eval_metric nlg", "pt", "eval_metric=nlg is not built for this task: validations report the loss and eval_metric=acc."),
        ("--eval_metric nlg --task_type seq_cls --num_labels 2", "sft", "eval_metric=nlg is not built for this task"),
        ("--max_new_tokens 64", "sft", "max_completion_length=64 is for `megaswift rlhf --rlhf_type grpo, or gkd with --lmbda above 0`, or "
         "--predict_with_generate true. Leave"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(words: str, task: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolved(words, dense(), task=task)
    assert message in str(caught.value)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report_rules, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs jieba, rouge, nltk, .*pip install 'megaswift\[nlg\]'"):
        predicting()
