"""Held-back rows as questions: what is asked, what the answer is compared with, and what is turned away."""

from pathlib import Path

import numpy as np
import pytest

from megaswift.config.data import DataConfig
from megaswift.data.questions import QUESTIONS, Questions, questions_of
from megaswift.data.read import read_datasets
from megaswift.errors import DataError
from tests.unit.test_data_pairs import encoded_rows, text

USER, ANSWER = {"role": "user", "content": "3+4?"}, {"role": "assistant", "content": "7"}
LAST = {"role": "assistant", "content": "seven, as before"}
CALL = {"id": "c", "type": "function", "function": {"name": "add", "arguments": {"a": 3, "b": 4}}}


def test_the_last_answer_is_compared_and_all_before_it_is_asked(tmp_path: Path) -> None:
    rows = [{"messages": [USER, ANSWER]}, {"messages": [USER, ANSWER, USER, LAST]}]
    _, _, template = encoded_rows(tmp_path, rows, QUESTIONS)
    config = DataConfig(dataset=[str(tmp_path / "rows.jsonl")])
    found = questions_of(read_datasets(config).train, template, config)
    assert found.answers == ("7", "seven, as before")
    asked = "<|im_start|>user\n3+4?<|im_end|>\n<|im_start|>assistant\n"
    assert text(found.prompts, 1, template).endswith(f"{asked}7<|im_end|>\n{asked}")
    found.save(tmp_path / "saved")
    kept, first = Questions.load(tmp_path / "saved"), found.first(1)
    assert (kept.answers, kept.sources) == (found.answers, found.sources)
    assert np.array_equal(kept.prompts.input_ids, found.prompts.input_ids)
    assert (first.answers, len(first.prompts), first.sources) == (("7",), 1, found.sources[:1])
    assert text(first.prompts, 0, template) == text(found.prompts, 0, template)
    assert found.first(9).answers == found.answers


def test_rows_that_nothing_can_be_compared_with_are_reported(tmp_path: Path) -> None:
    rows = [
        {"messages": [USER, ANSWER]},
        {"messages": [USER]},
        {"text": "no question"},
        {"messages": [USER, {**ANSWER, "reasoning_content": "3 and 4"}]},
        {"messages": [USER, {"role": "assistant", "content": "", "tool_calls": [CALL]}]},
        {"messages": [{**USER, "content": "long " * 90}, ANSWER]},
    ]
    encoded, report, _ = encoded_rows(tmp_path, rows, QUESTIONS, max_length=60)
    assert encoded.samples.tolist() == [0]
    assert [(row.source.rpartition(":")[2], row.kind) for row in report.bad] == [
        ("2", "no answer"),
        ("3", "no prompt"),
        ("4", "no answer"),
        ("5", "no answer"),
        ("6", "too long"),
    ]


def test_a_set_without_a_question_is_an_error(tmp_path: Path) -> None:
    _, _, template = encoded_rows(tmp_path, [{"messages": [USER, ANSWER]}], QUESTIONS)
    config = DataConfig(dataset=[str(tmp_path / "rows.jsonl")])
    (tmp_path / "rows.jsonl").write_text('{"messages": [{"role": "user", "content": "3+4?"}]}\n')
    with pytest.raises(DataError, match="No row of the prompts of the validation rows is left"):
        questions_of(read_datasets(config).train, template, config)
