"""Environments: they begin conversations, answer the model, and say what its turns are worth; and all of them are closed."""

import asyncio
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megaswift.config.reward import RewardConfig
from megaswift.config.rollout import RolloutConfig
from megaswift.data.prompts import PromptRow, PromptRows, save_rows
from megaswift.data.sample import Sample
from megaswift.errors import ConfigError, DataError, TrainingError
from megaswift.rollout.engine import Answer
from megaswift.rollout.environments import Env, Environments, Request, load_environments
from megaswift.rollout.rollout import Completions, joined
from megaswift.rollout.turns import Talked
from megaswift.tasks.advantages import advantages
from megaswift.training.judge import Judge
from tests.unit.test_turns import EOS, PROMPT, SAMPLING, TOKENIZER, Model, ids_of, talks

PLACEHOLDER = ({"role": "user", "content": "<placeholder>"},)


class Guess(Env):
    """Guess a number: 1 for a right guess, -0.25 for each wrong one."""

    closed = 0

    def __init__(self, env_config: dict[str, Any]) -> None:
        super().__init__(env_config)
        made.append(self)

    def reset(self, config: Request) -> Any:
        self.wanted = self.env_config["number"]
        return f"Guess, {config.data_dict['who']}!", {"wanted": self.wanted}, "You guess."

    def step(self, action: list[dict[str, Any]]) -> Any:
        assert [one["role"] for one in action[:2]] == ["system", "user"]
        guess = int(action[-1]["content"])
        if guess == self.wanted:
            return "Yes!", 1.0, True, {"guess": guess}
        return ("More." if guess < self.wanted else "Less."), -0.25, False, {"guess": guess}

    def close(self) -> None:
        self.closed += 1


class Awaited(Guess):
    """The same in the shape of ms-swift's: every method is async."""

    async def reset(self, config: Request) -> Any:
        await asyncio.sleep(0)
        return super().reset(config)

    async def step(self, action: list[dict[str, Any]]) -> Any:
        await asyncio.sleep(0)
        return super().step(action)

    async def close(self) -> None:
        super().close()


made: list[Guess] = []


@pytest.fixture(autouse=True)
def _nothing_is_made() -> None:
    made.clear()


def row(number: int = 5, **more: Any) -> PromptRow:
    columns = {"env_config": {"number": number, **more}, "who": "Ada"}
    return PromptRow(source="rows.jsonl:3", messages=PLACEHOLDER, columns=columns)


def played(
    model: Model, *rows: PromptRow, env: type = Guess, others: dict[str, type] | None = None, **more: Any
) -> list[Talked]:
    environments = Environments(
        own={"guess": env, **(others or {})},
        offered=load_environments(RewardConfig()).offered,
        default="guess",
    )
    some = rows or (row(),)
    return talks(None, environments=environments, **more).lead([PROMPT] * len(some), some, model, SAMPLING)


@pytest.mark.parametrize("env", [Guess, Awaited])
def test_a_conversation_is_the_environments_and_only_the_models_tokens_carry_loss(env: type) -> None:
    model = Model("3", "7", "5")
    (found,) = played(model, env=env)
    assert found.asked == (
        {"role": "system", "content": "You guess."},
        {"role": "user", "content": "Guess, Ada!"},
    )
    assert [turn["content"] for turn in found.turns] == ["3", "More.", "7", "Less.", "5"]
    whole = TOKENIZER.apply_chat_template([*found.asked, *found.turns]).input_ids
    assert [*found.prompt, *found.ids] == whole
    assert model.asked[0].ids.tolist() == found.prompt.tolist() and model.asked[0].key == PROMPT.key
    completions = Completions(**joined([found.prompt], [found]))
    carry = [token for token, weight in zip(whole, completions.encoded.loss_weights, strict=True) if weight]
    assert carry == ids_of("3") + ids_of("7") + ids_of("5")
    assert found.record == {
        "total_reward": 0.5,
        "step_rewards": [-0.25, -0.25, 1.0],
        "gym_done": True,
        "num_turns": 3,
        "infos": [{"wanted": 5}, {"guess": 3}, {"guess": 7}, {"guess": 5}],
    }
    assert [one.closed for one in made] == [1]


def test_each_completion_has_its_own_environment_by_its_row() -> None:
    class Words(Guess):
        def reset(self, config: Request) -> Any:
            super().reset(config)
            self.env_config["number"] = config.data_dict["who"] = None  # nobody else sees it
            return "Number?", None, "Hurry."

    one = row(5)
    found = played(Model("5", "5", "8", "9"), one, one, row(8, name="words"), row(9), others={"words": Words})
    assert [talk.record["total_reward"] for talk in found if talk.record] == [1.0] * 4
    assert [talk.asked[1]["content"] for talk in found] == [
        "Guess, Ada!",
        "Guess, Ada!",
        "Number?",
        "Guess, Ada!",
    ]
    assert [type(env) for env in made] == [Guess, Guess, Words, Guess] and all(
        env.closed == 1 for env in made
    )


def test_the_last_answer_counts_also_where_turns_end_or_it_is_cut_off_or_nothing_has_room() -> None:
    (few,) = played(Model("3", "5", "7"), max_turns=2)
    assert few.record and few.record["step_rewards"] == [-0.25, 1.0]
    (fewer,) = played(Model("3", "4", "7"), max_turns=2)
    assert fewer.record and (fewer.record["total_reward"], fewer.record["gym_done"]) == (-0.5, False)
    assert [turn["content"] for turn in fewer.turns] == ["3", "More.", "4"]
    (cut,) = played(Model("3", stops=False))
    assert cut.record and cut.record["step_rewards"] == [-0.25] and not cut.stopped and len(cut.turns) == 1
    room = len(few.prompt) + SAMPLING.max_tokens
    (tight,) = played(Model("3"), max_length=room)
    assert tight.record and tight.record["step_rewards"] == [-0.25] and len(tight.turns) == 1
    with pytest.raises(
        TrainingError,
        match=rf"gym_env=guess begins with {len(few.prompt)} tokens at rows.jsonl:3, and max_length={room - 1}",
    ):
        played(Model("3"), max_length=room - 1)
    assert all(env.closed == 1 for env in made)


def test_a_rows_own_conversation_and_system_message_stay_where_there_are_no_others() -> None:
    system = {"role": "system", "content": "Be brief."}
    own = PromptRow(source="rows.jsonl:3", messages=(system, *PLACEHOLDER), columns={})

    class Answers(Guess):
        def step(self, action: list[dict[str, Any]]) -> Any:
            return None, len(action), True

    class Silent(Answers):
        def reset(self, config: Request) -> Any:
            return None

    class Plain(Answers):
        def reset(self, config: Request) -> Any:
            return f"{len(config.messages)} messages at {config.source}"

    (found,) = played(Model("3"), own, env=Silent)
    assert found.asked == own.messages and found.prompt.tolist() == PROMPT.ids.tolist()
    assert found.record and found.record["total_reward"] == 3.0
    (found,) = played(Model("3"), own, env=Plain)
    assert found.asked == (system, {"role": "user", "content": "2 messages at rows.jsonl:3"})


def test_rewards_join_those_of_functions_and_reach_advantages() -> None:
    """A group of four, by hand: one reward is the same for all, and twice the sums of steps are apart from their mean 0.5625."""
    sums = [1.0, 0.75, -0.5, 1.0]
    found = played(Model("5", "3", "9", "5", "5", "7"), *[row()] * 4, max_turns=2)
    assert [talk.record["total_reward"] for talk in found if talk.record] == sums
    seen: dict[str, Any] = {}

    def words(completions: list[str], **columns: Any) -> list[float]:
        seen.update(columns)
        return [float(len(columns["messages"][0]))] * len(completions)

    judge = Judge(rewards={"words": words}, tokenizer=TOKENIZER)
    completions = judge.judged(row(), found)
    rewards = np.array([one.rewards for one in completions])
    assert rewards[:, 1].tolist() == sums
    assert [one["total_reward"] for one in seen["rollout_infos"]] == rewards[:, 1].tolist()
    assert seen["prompts"][0] == list(found[0].asked)
    totals = torch.from_numpy(rewards @ np.array([0.5, 2.0])).view(1, -1)
    chosen = RolloutConfig(scale_rewards="none")
    assert advantages(totals, chosen)[0].tolist() == [0.875, 0.375, -2.125, 0.875]
    alone = Judge(rewards={}, tokenizer=TOKENIZER).judged(row(), found)
    assert [one.rewards for one in alone] == [[one] for one in sums]
    plain = Judge(rewards={}, tokenizer=TOKENIZER).judged(row(), [Answer(ids=ids_of("1"), stopped=True)])
    assert plain[0].rewards == [] and plain[0].prompt(PROMPT.ids) is PROMPT.ids


def failing(method: str, value: Any, env: type = Guess) -> type:
    """Return an environment one of whose methods raises or returns a value."""

    def answer(self: Any, *given: Any) -> Any:
        self.closed += method == "close"
        if isinstance(value, Exception):
            raise value
        return value

    async def awaited(self: Any, *given: Any) -> Any:
        return answer(self, *given)

    return type("Failing", (env,), {method: awaited if env is Awaited else answer})


@pytest.mark.parametrize("env", [Guess, Awaited])
@pytest.mark.parametrize(
    ("method", "value", "message"),
    [
        ("reset", KeyError("seed"), "gym_env=bad fails at rows.jsonl:3 in reset: KeyError: 'seed'. Mend the environment or the row."),
        ("step", ValueError("a move?"), "gym_env=bad fails at rows.jsonl:3 in step: ValueError: a move?"),
        ("close", OSError("gone"), "gym_env=bad fails at rows.jsonl:3 in close: OSError: gone"),
        ("reset", 7, "gym_env=bad returned 7 from reset at rows.jsonl:3, not a text, or"),
        ("reset", ("Go.", {}, "Hm.", 1), "gym_env=bad returned ('Go.', {}, 'Hm.', 1) from reset"),
        ("step", "More.", "gym_env=bad returned 'More.' from step at rows.jsonl:3, not a text, a finite reward"),
        ("step", ("More.", float("nan"), False, {}), "gym_env=bad returned ('More.', nan, False, {}) from step"),
        ("step", ("More.", None, False), "gym_env=bad returned ('More.', None, False) from step"),
        ("step", (7, 1.0, False), "gym_env=bad returned 7 at rows.jsonl:3, not a text, messages"),
        ("step", ({"role": "assistant", "content": "I"}, 1.0, False), "gym_env=bad returned {'role': 'assistant'"),
    ],
)  # fmt: skip
def test_what_an_environment_does_wrong_is_named_with_the_row_and_all_are_closed(
    env: type, method: str, value: Any, message: str
) -> None:
    with pytest.raises(TrainingError) as caught:
        played(
            Model("5", "5", "5"),
            row(),
            row(name="bad"),
            row(),
            others={"bad": failing(method, value, env)},
            env=env,
        )
    assert str(caught.value).startswith(message)
    assert [one.closed for one in made] == [1, 1, 1]


def test_the_first_failure_is_told_also_where_closing_fails() -> None:
    both = failing("close", OSError("gone"), failing("step", ValueError("a move?")))
    with pytest.raises(TrainingError, match="in step: ValueError: a move"):
        played(Model("5"), env=both)
    broken = failing("__init__", KeyError("size"))
    with pytest.raises(
        TrainingError, match=r"gym_env=bad fails at rows.jsonl:3 in __init__: KeyError: 'size'"
    ):
        played(Model("5"), row(), row(name="bad"), others={"bad": broken})
    assert [one.closed for one in made] == [1, 1], "what was made before is closed"


def test_an_engine_that_fails_leaves_no_environment_open() -> None:
    with pytest.raises(IndexError):
        played(Model())
    assert [one.closed for one in made] == [1]


FILE = """
class Own:
    def __init__(self, env_config): self.env_config = env_config
    def reset(self, config): return "Go."
    def step(self, action): return "On.", 1.0, False, {}
    def close(self): pass


class Half:
    def reset(self, config): return "Go."


envs = {"short": Own}
"""


def test_environments_are_classes_of_files_by_their_names_or_those_of_a_catalogue(tmp_path: Path) -> None:
    path = tmp_path / "own.py"
    path.write_text(FILE)
    plugins = [str(path)]
    for chosen in (
        RewardConfig(gym_env=f"{path}:Own"),
        RewardConfig(gym_env="short", external_plugins=plugins),
        RewardConfig(gym_env="Own", external_plugins=plugins),
    ):
        environments = load_environments(chosen)
        name, make, config = environments.of(row())
        assert (name, make({}).reset(None), config) == (environments.default, "Go.", {"number": 5})
        assert environments.of(row(name="short"))[0] == "short"
    with pytest.raises(
        ConfigError,
        match=r"gym_env=.*own.py:Half: .*own.py has no environment Half, a class with reset, step, close",
    ):
        load_environments(RewardConfig(gym_env=f"{path}:Half"))
    with pytest.raises(ConfigError, match=r"gym_env=Onw: .* has no environment Onw, .*Did you mean Own"):
        load_environments(RewardConfig(gym_env="Onw", external_plugins=plugins))
    with pytest.raises(ConfigError, match=r"gym_env=.*other.py is not a Python file"):
        load_environments(RewardConfig(gym_env=f"{tmp_path / 'other.py'}:Own"))


def test_rows_whose_environment_is_not_there_are_named_before_anything_is_written(tmp_path: Path) -> None:
    path = tmp_path / "own.py"
    path.write_text(FILE)
    environments = load_environments(RewardConfig(external_plugins=[str(path)]))

    def rows(*configs: Any) -> PromptRows:
        samples = [
            Sample(source=f"r.jsonl:{number}", messages=PLACEHOLDER, extras={"env_config": config})
            for number, config in enumerate(configs, 1)
        ]
        save_rows(tmp_path / "rows", samples)
        return PromptRows(tmp_path / "rows")

    environments.check(rows({"name": "Own"}, {"name": "short", "seed": 1}))
    for config, message in (
        (
            {"name": "shrot"},
            "env_config at r.jsonl:2 names shrot, which is no environment of .* Did you mean short",
        ),
        ({"seed": 1}, "env_config at r.jsonl:2 has no name of an environment"),
        (None, "env_config at r.jsonl:2 has no name"),
        ("Own", "env_config='Own' at r.jsonl:2 is not an object"),
    ):
        with pytest.raises(DataError, match=message):
            environments.check(rows({"name": "Own"}, config))


def test_environments_of_installed_packages_are_found_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gaming.py").write_text(FILE)
    facts = tmp_path / "gaming-1.0.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: gaming\nVersion: 1.0\n")
    (facts / "entry_points.txt").write_text(
        "[megaswift.environments]\nchess = gaming:Own\nbroken = gaming:Gone\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    environments = load_environments(RewardConfig(gym_env="chess"))
    assert environments.of(row())[1]({}).reset(None) == "Go."
    with pytest.raises(ConfigError, match="gym_env=broken, the entry point gaming:Gone, fails"):
        environments.of(row(name="broken"))


def test_infos_travel_as_json_has_them() -> None:
    class Odd(Guess):
        def reset(self, config: Request) -> Any:
            super().reset(config)
            return "Go.", {"path": Path("a"), 1: {2}}, "S"

    (found,) = played(Model("5"), env=Odd)
    assert found.record and json.loads(json.dumps(found.record)) == found.record
    assert found.record["infos"][0] == {"path": "a", "1": "{2}"} and found.ids[-1] == EOS


class Host(Guess):
    """It has a word for the system only."""

    def reset(self, config: Request) -> Any:
        super().reset(config)
        return None, None, "You guess."

    def step(self, action: list[dict[str, Any]]) -> Any:
        return "", 0.0, True, {}


def test_a_system_message_may_join_what_the_row_asks() -> None:
    (found,) = played(Model("3"), env=Host)
    assert found.asked == ({"role": "system", "content": "You guess."}, *PLACEHOLDER)
