"""Rows as prompts: what is asked, what is left to the rewards, and what is turned away."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megaswift.config.data import DataConfig
from megaswift.config.reward import RewardConfig
from megaswift.data.encode import encode_samples
from megaswift.data.forms import CONVERSATIONS, PROMPTS
from megaswift.data.load import with_prompts
from megaswift.data.prompts import PromptRows, save_rows
from megaswift.data.read import read_datasets
from megaswift.data.sample import Sample
from megaswift.data.template import Template
from megaswift.errors import DataError
from megaswift.rollout.rewards import Judged, load_rewards, rewards_of
from tests.unit.test_data_pairs import encoded_rows, text

SYSTEM = {"role": "system", "content": "be brief"}
USER, ANSWER = {"role": "user", "content": "3+4?"}, {"role": "assistant", "content": "8"}


def test_a_prompt_waits_for_the_answer_and_carries_no_loss(tmp_path: Path) -> None:
    rows = [
        {"messages": [SYSTEM, USER], "solution": "7"},
        {"messages": [SYSTEM, USER, ANSWER], "solution": "7"},
        {"query": "3+4?", "solution": "7"},
        {"prompt": [USER], "solution": "7", "level": 2},
    ]
    encoded, report, template = encoded_rows(tmp_path, rows, PROMPTS)
    assert report.kept == len(encoded) == 4
    assert not encoded.loss_weights.any()
    prompts = [text(encoded, entry, template) for entry in range(4)]
    assert prompts[0] == prompts[1], "an answer of the row is no part of the prompt"
    assert prompts[2] == prompts[3]
    assert prompts[2].endswith("<|im_start|>user\n3+4?<|im_end|>\n<|im_start|>assistant\n")
    assert "be brief" in prompts[0]


def test_rows_keep_every_other_column_for_the_rewards(tmp_path: Path) -> None:
    rows = [
        {"messages": [USER, ANSWER], "solution": "7", "tags": ["sum"]},
        {"query": "3+4?", "solution": "7", "level": 2},
    ]
    encoded_rows(tmp_path, rows, PROMPTS)
    samples = read_datasets(DataConfig(dataset=[str(tmp_path / "rows.jsonl")])).train
    save_rows(tmp_path / "saved", samples)
    kept = PromptRows(tmp_path / "saved")
    assert len(kept) == 2
    assert kept[1].columns == {"solution": "7", "level": 2}
    assert kept[0].columns == {"solution": "7", "tags": ["sum"]}
    assert kept[0].messages == kept[1].messages == (USER,)
    assert kept[1].source.endswith("rows.jsonl:2")


def test_another_conversation_of_a_row_has_its_tools_and_variables(tmp_path: Path) -> None:
    tool = {"type": "function", "function": {"name": "add", "description": "Add.", "parameters": {}}}
    given = Sample(
        source="r:1", messages=(SYSTEM, USER, ANSWER), tools=(tool,), template_kwargs={"thinks": False}
    )
    save_rows(tmp_path, [given])
    kept = PromptRows(tmp_path)[0]
    assert kept.sample((USER,)) == replace(given, messages=(USER,))


def test_test_cases_and_rules_of_rows_reach_their_rewards(tmp_path: Path) -> None:
    cases = [{"input": "3 4", "output": "7"}, "assert True"]
    rows = [
        {
            "prompt": "add",
            "test_cases": cases,
            "rules": [{"match": "a"}, {"number": "solution"}],
            "solution": "7",
        },
        {"messages": [USER], "verification_info": {"language": "python", "test_cases": cases}},
    ]
    encoded_rows(tmp_path, rows, PROMPTS)
    save_rows(tmp_path / "saved", read_datasets(DataConfig(dataset=[str(tmp_path / "rows.jsonl")])).train)
    kept = PromptRows(tmp_path / "saved")
    given = [Judged(ids=[1], turns=[{"role": "assistant", "content": "```python\nprint(7)\n```"}])]
    functions = load_rewards(RewardConfig(reward_funcs=["code", "rules"]))
    assert rewards_of(functions, kept[0], given) == [[1.0], [0.5]]
    assert rewards_of({"code": functions["code"]}, kept[1], given) == [[1.0]]


def test_rows_without_a_question_or_too_long_are_reported(tmp_path: Path) -> None:
    rows = [{"messages": [USER]}, {"text": "no question"}, {"messages": [{**USER, "content": "long " * 90}]}]
    encoded, report, template = encoded_rows(tmp_path, rows, PROMPTS, max_length=60)
    assert len(encoded) == 1
    assert [(row.source.rpartition(":")[2], row.kind) for row in report.bad] == [
        ("2", "no prompt"),
        ("3", "too long"),
    ]
    again, _ = encode_samples(
        read_datasets(DataConfig(dataset=[str(tmp_path / "rows.jsonl")])).train, template, form=PROMPTS
    )
    assert again.samples.tolist() == [0]


def test_conversations_have_their_prompts_beside_them_and_rows_without_are_left_out(tmp_path: Path) -> None:
    long = {"role": "user", "content": "long " * 30}
    rows = [
        {"messages": [USER, ANSWER]},
        {"messages": [long, ANSWER]},
        {"messages": [USER, ANSWER, USER, ANSWER]},
    ]
    encoded, report, template = encoded_rows(tmp_path, rows, CONVERSATIONS)
    assert report.kept == 3
    config = DataConfig(dataset=[str(tmp_path / "rows.jsonl")])
    samples = read_datasets(config).train
    short = Template(template.tokenizer, max_length=60)
    conversations, prompts = with_prompts(encoded, samples, short, config)
    assert conversations.samples.tolist() == prompts.samples.tolist() == [0, 2]
    for entry in range(2):
        whole, prompt = text(conversations, entry, template), text(prompts, entry, template)
        assert whole.startswith(prompt) and "8" not in prompt.rpartition("user")[2]
        assert not prompts.loss_weights.any()
    with pytest.raises(DataError, match="No training row has a prompt that can be used"):
        with_prompts(encoded.take(np.array([1])), samples, short, config)
    with pytest.raises(DataError, match="too long"):
        with_prompts(encoded, samples, short, DataConfig(dataset=config.dataset, strict=True))


@pytest.mark.parametrize("use_chat_template", [True, False])
def test_prompts_that_are_no_unicode_are_reported(tmp_path: Path, use_chat_template: bool) -> None:
    rows = [{"messages": [USER]}, {"messages": [{**USER, "content": "half a pair \ud83d"}]}]
    _, report, _ = encoded_rows(tmp_path, rows, PROMPTS, use_chat_template=use_chat_template)
    (bad,) = report.bad
    assert report.kept == 1 and bad.source.endswith(":2") and bad.kind == "encoding"
