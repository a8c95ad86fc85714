"""The reward `rules`: what rules say, how they weigh, and what is said of those that are none."""

import json
from pathlib import Path
from typing import Any

import pytest

from megaswift.config.reward import RewardConfig
from megaswift.errors import ConfigError, DataError
from megaswift.rollout.rule_reward import Rules, keeps, rules_of


def kept(rule: dict[str, Any], *texts: str, **row: Any) -> list[bool]:
    (one,) = rules_of([rule])
    return [keeps(one, text, row) for text in texts]


def test_expressions_must_or_must_not_be_found() -> None:
    assert kept({"match": r"\bcats?\b"}, "two cats", "category") == [True, False]
    assert kept({"no_match": "(?i)sorry"}, "Sorry, no", "yes") == [False, True]


def test_numbers_are_compared_within_a_tolerance() -> None:
    assert kept({"number": 7.5, "tolerance": 0.25}, r"\boxed{7.75}, not 7.5", "it is 7.76", "none", "15/2") == [
        True, False, False, True,
    ]  # fmt: skip
    assert kept({"number": 1024}, "1,024", "1024.001") == [True, False]
    assert kept({"number": "solution", "tolerance": 1}, "8", "9", solution="so 7") == [True, False]
    with pytest.raises(DataError, match="the column solution, which the row lacks"):
        kept({"number": "solution"}, "8")
    with pytest.raises(DataError, match="the column solution, which holds no number"):
        kept({"number": "solution"}, "8", solution="seven")


def test_json_parses_and_has_keys() -> None:
    good = '{"name": "a", "age": 3}'
    texts = (
        good,
        f"Look:\n```json\n{good}\n```",
        f"<answer>{good}</answer>",
        f"Look: {good}",
        '["name", "age"]',
        '{"name": 1}',
        "[" * 100000,
    )
    assert kept({"json": ["name", "age"]}, *texts) == [True, True, True, False, False, False, False]
    assert kept({"json": True}, *texts) == [True, True, True, False, True, True, False]


def test_the_reward_is_the_share_of_the_weight() -> None:
    rules = [{"match": "a", "weight": 3}, {"no_match": "b", "weight": 0.5}, {"number": 1, "match": None}]
    found = Rules(RewardConfig())(["a 1", "ab 2", "1", "b"], rules=[rules] * 4)
    assert found == pytest.approx([1, 3 / 4.5, 1.5 / 4.5, 0])


def test_rows_have_rules_of_their_own_or_those_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "rules.json"
    path.write_text(json.dumps([{"match": "file"}]))
    rules = Rules(RewardConfig(reward_rules=str(path)))
    assert rules(["file", "row"]) == [1, 0]
    assert rules(["file", "file"], rules=[[{"match": "row"}], None]) == [0, 1]
    assert rules(["row"], rules=['[{"match": "row"}]']) == [1]
    with pytest.raises(DataError, match=r"the column rules, which the row lacks\. Give --reward_rules"):
        Rules(RewardConfig())(["a"])


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([], "is not a list of rules"),
        ({"match": "a"}, "is not a list of rules"),
        ([{"mach": "a"}], "is not an object with one of match, no_match, number, json"),
        ([{"match": "a", "json": True}], "is not an object with one of"),
        ([{"match": "("}], "is not a regular expression"),
        ([{"match": 3}], "is not a regular expression"),
        ([{"number": True}], "is neither a number nor the name of a column"),
        ([{"json": {"a": 1}}], "is neither true nor a list of keys"),
        ([{"match": "a", "weight": 0}], "is not above 0"),
        ([{"match": "a", "tolerance": 1}], "is not 0 or more, for a number"),
        ([{"number": 1, "tolerance": -1}], "is not 0 or more, for a number"),
    ],
)
def test_what_is_no_rule_is_said(tmp_path: Path, rules: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        Rules(RewardConfig())(["a"], rules=[rules])
    path = tmp_path / "rules.json"
    path.write_text(json.dumps(rules))
    with pytest.raises(ConfigError, match=message):
        Rules(RewardConfig(reward_rules=str(path)))


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"reward_rules=.*nothing\.json holds no rules"):
        Rules(RewardConfig(reward_rules=str(tmp_path / "nothing.json")))
