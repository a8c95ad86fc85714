"""Conversations of several turns: token ids are kept, what an environment says carries no loss, and what goes wrong is named."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megaswift.config.rollout import RolloutConfig
from megaswift.data.prompts import PromptRow
from megaswift.data.template import Template
from megaswift.errors import ConfigError, TrainingError
from megaswift.rollout.engine import Answer, Prompt, Sampling
from megaswift.rollout.rollout import Completions, joined
from megaswift.rollout.turns import Talked, Talks, load_scheduler
from tests.harness.tiny_run import CHAT_TEMPLATE
from tests.unit.small_tokenizers import small_tokenizer

TOKENIZER = small_tokenizer(CHAT_TEMPLATE, special=["<|user|>", "<|assistant|>"])
EOS = TOKENIZER.eos_token_id
QUESTION = ({"role": "user", "content": "3+4?"},)
ROW = PromptRow(source="rows.jsonl:7", messages=QUESTION, columns={"solution": "7"})
SAMPLING = Sampling(temperature=1.0, top_p=1.0, top_k=0, max_tokens=20, stop_ids=(EOS,))
PROMPT = Prompt(
    ids=np.array(TOKENIZER.apply_chat_template(QUESTION, add_generation_prompt=True).input_ids), key=(1, 2, 3)
)


def ids_of(text: str) -> list[int]:
    return [*TOKENIZER(text, add_special_tokens=False).input_ids, EOS]


class Model:
    """Says what it is told to, and remembers what it was asked."""

    def __init__(self, *texts: str, stops: bool = True, logps: bool = False) -> None:
        self.asked: list[Prompt] = []
        self._texts, self._stops, self._logps = list(texts), stops, logps

    def __call__(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Answer]:
        self.asked += prompts
        answers = []
        for _ in prompts:
            ids = ids_of(self._texts.pop(0))
            ids = ids if self._stops else ids[:-1]
            answers.append(
                Answer(ids=ids, stopped=self._stops, logps=[-1.0] * len(ids) if self._logps else None)
            )
        return answers


def talks(scheduler: Callable[..., Any], **more: Any) -> Talks:
    settings: dict[str, Any] = {"max_turns": None, "max_length": 1000, **more}
    return Talks(
        scheduler=scheduler,
        template=Template(TOKENIZER),
        decode=lambda ids: TOKENIZER.decode(ids, skip_special_tokens=True),
        **settings,
    )


def talked(model: Model, scheduler: Callable[..., Any], **more: Any) -> Talked:
    return talks(scheduler, **more).lead([PROMPT], [ROW], model, SAMPLING)[0]


def until_right(messages: list[dict[str, Any]], completion: str, solution: str, **columns: Any) -> str | None:
    return None if completion == solution else f"No, not {completion}."


def test_ids_are_those_of_the_template_and_only_the_models_carry_loss() -> None:
    model = Model("6", "8", "7")
    found = talked(model, until_right)
    assert [turn["content"] for turn in found.turns] == ["6", "No, not 6.", "8", "No, not 8.", "7"]
    whole = TOKENIZER.apply_chat_template([*QUESTION, *found.turns]).input_ids
    assert [*PROMPT.ids, *found.ids] == whole
    assert found.own is not None and found.stopped and found.logps is None
    assert [token for token, own in zip(found.ids, found.own, strict=True) if own] == ids_of("6") + ids_of(
        "8"
    ) + ids_of("7")
    completions = Completions(**joined([PROMPT.ids], [found]))
    assert completions.encoded.loss_weights.tolist() == [0] * len(PROMPT.ids) + [
        int(own) for own in found.own
    ]
    assert completions.lengths.tolist() == [sum(found.own)]


def test_each_turn_is_asked_for_on_top_of_the_kept_ids_and_draws_anew() -> None:
    model = Model("6", "7")
    found = talked(model, until_right)
    assert [prompt.key for prompt in model.asked] == [(1, 2, 3), (1, 2, 3, 1)]
    second = model.asked[1].ids.tolist()
    assert [*PROMPT.ids, *found.ids][: len(second)] == second and len(second) == len(PROMPT.ids) + len(
        found.ids
    ) - len(ids_of("7"))


def test_conversations_end_on_their_own() -> None:
    model = Model("6", "7", "7")
    one, two = talks(until_right).lead([PROMPT, PROMPT], [ROW, ROW], model, SAMPLING)
    assert [len(one.turns), len(two.turns)] == [3, 1]


@pytest.mark.parametrize(("more", "stops", "turns"), [({"max_turns": 2}, True, 3), ({}, False, 1)])
def test_turns_end_at_the_limit_and_where_an_answer_is_cut_off(
    more: dict[str, Any], stops: bool, turns: int
) -> None:
    found = talked(Model("1", "2", "3", "7", stops=stops), until_right, **more)
    assert (len(found.turns), found.stopped) == (turns, stops)


def test_a_turn_begins_only_where_a_whole_answer_has_room() -> None:
    second = Model("1", "7")
    talked(second, until_right)
    needed = len(second.asked[1].ids) + SAMPLING.max_tokens
    for room, turns in ((needed, 3), (needed - 1, 1)):
        assert len(talked(Model("1", "7"), until_right, max_length=room).turns) == turns


def test_log_probabilities_of_an_engine_stay_beside_their_tokens() -> None:
    found = talked(Model("6", "7", logps=True), until_right)
    assert found.own is not None and found.logps == [-1.0 if own else 0.0 for own in found.own]


def test_schedulers_may_return_messages() -> None:
    said = [{"role": "tool", "content": "7"}, {"role": "user", "content": "So?"}]
    found = talked(
        Model("add(3, 4)", "7"), lambda messages, completion, **columns: said if len(messages) == 1 else None
    )
    assert found.turns[1:3] == said
    assert [*PROMPT.ids, *found.ids] == TOKENIZER.apply_chat_template([*QUESTION, *found.turns]).input_ids


def test_variables_of_the_row_reach_every_turn() -> None:
    template = CHAT_TEMPLATE.replace(
        "<|assistant|>{% endif", "<|assistant|>{% if hurry %}So: {% endif %}{% endif"
    )
    tokenizer = small_tokenizer(template, special=["<|user|>", "<|assistant|>"])
    hurried = replace(talks(until_right), template=Template(tokenizer))
    (found,) = hurried.lead(
        [PROMPT], [replace(ROW, template_kwargs={"hurry": True})], Model("6", "7"), SAMPLING
    )
    between = [token for token, own in zip(found.ids, found.own or (), strict=True) if not own]
    assert tokenizer.decode(between) == "<|user|>No, not 6.</s><|assistant|>So: "


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (7, "multi_turn_scheduler returned 7 at rows.jsonl:7, not a text"),
        ({"role": "assistant", "content": "I"}, "multi_turn_scheduler returned {'role': 'assistant'"),
        ({"role": "user"}, "multi_turn_scheduler returned {'role': 'user'} at rows.jsonl:7"),
        (
            ZeroDivisionError("by zero"),
            "multi_turn_scheduler fails at rows.jsonl:7: ZeroDivisionError: by zero",
        ),
    ],
)
def test_what_a_scheduler_does_wrong_is_named_with_the_row(value: Any, message: str) -> None:
    def scheduler(*given: Any, **columns: Any) -> Any:
        if isinstance(value, Exception):
            raise value
        return value

    with pytest.raises(TrainingError) as caught:
        talked(Model("6"), scheduler)
    assert str(caught.value).startswith(message)


def test_functions_and_objects_of_classes_come_out_of_files(tmp_path: Path) -> None:
    path = tmp_path / "own.py"
    path.write_text(
        "def again(*given, **columns):\n    return 'Again.'\n\n\nclass Env:\n    def __call__(self, *given, **columns):\n        return 'Env.'\n"
    )
    for name, said in (("again", "Again."), ("Env", "Env.")):
        scheduler = load_scheduler(RolloutConfig(multi_turn_scheduler=f"{path}:{name}"))
        assert scheduler is not None and scheduler([], "") == said
    with pytest.raises(ConfigError, match=r"own.py has no agian. Did you mean again"):
        load_scheduler(RolloutConfig(multi_turn_scheduler=f"{path}:agian"))
    with pytest.raises(ConfigError, match=r"multi_turn_scheduler=.*other.py is not a Python file"):
        load_scheduler(RolloutConfig(multi_turn_scheduler=f"{tmp_path / 'other.py'}:again"))
    assert load_scheduler(RolloutConfig()) is None


def test_schedulers_of_installed_packages_are_found_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "teaching.py").write_text("def teacher(*given, **columns):\n    return 'Again.'\n")
    facts = tmp_path / "teaching-1.0.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: teaching\nVersion: 1.0\n")
    (facts / "entry_points.txt").write_text("[megaswift.multi_turn]\nschool = teaching:teacher\n")
    monkeypatch.syspath_prepend(tmp_path)
    scheduler = load_scheduler(RolloutConfig(multi_turn_scheduler="school"))
    assert scheduler is not None and scheduler([], "") == "Again."
