"""Built-in rewards, functions out of files, and what is said of those that fail."""

import math
from pathlib import Path
from typing import Any

import pytest

from megaswift.config.reward import REWARDS, RewardConfig
from megaswift.data.prompts import PromptRow
from megaswift.errors import ConfigError, DataError, TrainingError, UserError
from megaswift.rollout.final_answer import final_answer, same_answer
from megaswift.rollout.rewards import Judged, load_rewards, rewards_of

ROW = PromptRow(
    source="rows.jsonl:7", messages=({"role": "user", "content": "3+4?"},), columns={"solution": "7"}
)


def chosen(*names: str, **more: Any) -> RewardConfig:
    lengths = {"soft_max_length": 10, "soft_cache_length": 4, "cosine_max_len": 10}
    return RewardConfig(**{"reward_funcs": list(names), **lengths, **more})


def judge(
    name: str, *texts: str, row: PromptRow = ROW, lengths: tuple[int, ...] = (), **more: Any
) -> list[float]:
    given = [
        Judged(ids=[0] * length, turns=[{"role": "assistant", "content": text}])
        for text, length in zip(texts, lengths or [1] * len(texts), strict=True)
    ]
    return rewards_of(load_rewards(chosen(name, **more)), row, given)[0]


def test_every_reward_that_is_named_is_built_in() -> None:
    assert list(load_rewards(chosen(*REWARDS))) == list(REWARDS)


def test_accuracy_reads_the_marked_answer_or_else_the_last_number() -> None:
    texts = (
        "It is 7.",
        "7 or 8",
        r"so \boxed{7.0}, not 8",
        "<answer> 7 </answer> of 9",
        "seven",
        "-7",
        "14/2",
    )
    assert judge("accuracy", *texts) == [1, 0, 1, 1, 0, 0, 1]


@pytest.mark.parametrize(
    ("given", "truth", "same"),
    [
        ("1,024", "1024", True), ("0.5", "1/2", True), ("Paris", "paris", True), ("Rome", "Paris", False), ("1/0", "1", False),
        ("#### 1,072", "1072", True), ("It costs $18.", "18", True), (r"\(x = 12\)", "12", True), ("1e-3", "5e-3", False),
        # A fraction of two numbers is one; of other expressions no number is the answer.
        (r"\boxed{-\frac{1}{2}}", "-0.5", True), (r"it is $\frac{1}{2}$.", "1/2", True), (r"\boxed{2}", r"\frac{1}{2}", False),
        (r"\boxed{\frac{5}{4}}", r"\boxed{\frac{3}{4}}", False), (r"\boxed{3}", r"2\sqrt{3}", False), ("2^10", "10", False),
        (r"\boxed{x^2-5x+1}", "1", False), (r"\boxed{ x ^ 2}", "x^2", True), (r"\boxed{B2}", "A2", False), ("H2O", "2", False),
        (r"\boxed{\frac{\sqrt{3}}{2}} as in problem 9", "9", False), ("in 2020, H2O", "2020", False),
        (r"\boxed{72\text{ km}}", "72", True), (r"\boxed{5\%}", "5", True), (r"<answer>\boxed{4}</answer>", "4", True),
        ("<answer>Paris</answer>", "paris", True), ("1,2,3", "123", False),
    ],
)  # fmt: skip
def test_answers_are_compared_as_numbers_or_as_words(given: str, truth: str, same: bool) -> None:
    assert same_answer(final_answer(given), final_answer(truth)) is same


def test_format_wants_thoughts_and_an_answer_and_nothing_else() -> None:
    good = "<think>\n3 and 4\n</think>\n<answer>7</answer>"
    assert judge("format", good, f"Well. {good}", f"{good} Done.", "<answer>7</answer>") == [1, 0, 0, 0]


def test_repetition_costs_the_share_of_repeated_sequences() -> None:
    found = judge("repetition", "a b c a b c", "a b c d", "a b", repetition_max_penalty=-2.0)
    assert found == pytest.approx([-2 * (1 - 3 / 4), 0, 0])


def test_cosine_prefers_short_right_answers_and_long_wrong_ones() -> None:
    """CosFn of the paper at no tokens, half and all of them, and beyond."""
    lengths = (0, 5, 10, 20)
    assert judge("cosine", *["7"] * 4, lengths=lengths) == pytest.approx([1.0, 0.75, 0.5, 0.5])
    assert judge("cosine", *["8"] * 4, lengths=lengths) == pytest.approx([-0.5, -0.25, 0.0, 0.0])
    steep = judge("cosine", "7", lengths=(2,), cosine_max_len_value_correct=0.0)
    assert steep == pytest.approx([(1 + math.cos(math.pi / 5)) / 2])
    bare = PromptRow(source="rows.jsonl:9", messages=ROW.messages, columns={})
    with pytest.raises(DataError, match=r"reward_funcs=cosine at rows.jsonl:9: .*the column solution"):
        judge("cosine", "7", row=bare)


def test_soft_overlong_falls_over_the_last_tokens() -> None:
    assert judge("soft_overlong", *"abcd", lengths=(6, 8, 10, 12)) == [0, -0.5, -1, -1]


def plugin(tmp_path: Path, text: str) -> dict[str, Any]:
    path = tmp_path / "own.py"
    path.write_text(text)
    return {"external_plugins": [str(path)]}


def test_functions_of_a_file_get_the_columns_of_the_row(tmp_path: Path) -> None:
    text = "def own(completions, solution, prompts, completion_ids, **columns):\n"
    text += "    return [len(c) + len(s) + len(p) + len(i) for c, s, p, i in zip(completions, solution, prompts, completion_ids)]\n"
    assert judge("own", "abc", "d", lengths=(2, 5), **plugin(tmp_path, text)) == [
        3 + 1 + 1 + 2,
        1 + 1 + 1 + 5,
    ]


def test_a_file_runs_once_and_may_hold_dataclasses(tmp_path: Path) -> None:
    text = "from __future__ import annotations\nfrom dataclasses import dataclass\nstarts = []\n\n@dataclass\nclass Kept:\n    value: float\n\n"
    text += "def own(completions, **columns):\n    starts.append(Kept(1.0))\n    return [len(starts)] * len(completions)\n"
    config = plugin(tmp_path, text)
    assert [judge("own", "a", **config), judge("own", "a", **config)] == [[1], [2]]


def test_a_function_of_a_file_goes_before_one_that_is_built_in(tmp_path: Path) -> None:
    own = plugin(tmp_path, "def accuracy(completions, **columns):\n    return [5] * len(completions)\n")
    assert judge("accuracy", "8", **own) == [5]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return 1 / 0", "reward_funcs=own fails at rows.jsonl:7: ZeroDivisionError: division by zero"),
        ("return [1.0]", "reward_funcs=own returned [1.0] at rows.jsonl:7, not 2 finite numbers"),
        ("return None", "reward_funcs=own returned None at rows.jsonl:7"),
        ("return ['good', 'bad']", "reward_funcs=own returned ['good', 'bad'] at rows.jsonl:7"),
        ("return [float('nan'), 1.0]", "reward_funcs=own returned [nan, 1.0] at rows.jsonl:7"),
    ],
)
def test_a_function_that_fails_is_named_with_the_row(tmp_path: Path, body: str, message: str) -> None:
    own = plugin(tmp_path, f"def own(completions, **columns):\n    {body}\n")
    with pytest.raises(TrainingError) as caught:
        judge("own", "a", "b", **own)
    assert str(caught.value).startswith(message)


def test_functions_see_the_whole_conversation_and_the_last_answer(tmp_path: Path) -> None:
    text = "def own(completions, messages, **columns):\n"
    text += "    return [10 * len(turns) + len(text) for text, turns in zip(completions, messages)]\n"
    turns = [
        {"role": "assistant", "content": "6?"},
        {"role": "user", "content": "No."},
        {"role": "assistant", "content": "Seven"},
    ]
    functions = load_rewards(chosen("own", **plugin(tmp_path, text)))
    assert rewards_of(functions, ROW, [Judged(ids=[1], turns=turns)]) == [[10 * 4 + 5]]


def test_functions_of_installed_packages_are_found_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "offering.py").write_text(
        "def tall(completions, **columns):\n    return [9] * len(completions)\n"
    )
    facts = tmp_path / "offering-1.0.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: offering\nVersion: 1.0\n")
    (facts / "entry_points.txt").write_text(
        "[megaswift.rewards]\nheight = offering:tall\ngone = offering:short\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert judge("height", "a", "b") == [9, 9]
    with pytest.raises(
        ConfigError, match=r"reward_funcs=gone, the entry point offering:short, fails: AttributeError"
    ):
        load_rewards(chosen("gone"))


def test_a_row_without_the_column_is_named() -> None:
    bare = PromptRow(source="rows.jsonl:9", messages=ROW.messages, columns={})
    with pytest.raises(DataError, match=r"reward_funcs=accuracy at rows.jsonl:9: .*the column solution"):
        judge("accuracy", "7", row=bare)


@pytest.mark.parametrize(
    ("names", "text", "message"),
    [
        (["owm"], "def own(completions, **columns): ...", "reward_funcs=owm is neither built in nor in .* Did you mean own"),
        (["own"], "import nothing_of_that_name", "own.py fails: ModuleNotFoundError"),
        (["own"], None, "own.py is not a Python file"),
    ],
)  # fmt: skip
def test_what_cannot_be_loaded_is_said(
    tmp_path: Path, names: list[str], text: str | None, message: str
) -> None:
    more = plugin(tmp_path, text) if text is not None else {"external_plugins": [str(tmp_path / "own.py")]}
    with pytest.raises(ConfigError, match=message) as caught:
        load_rewards(chosen(*names, **more))
    assert isinstance(caught.value, UserError) and caught.value.exit_code == 2
