"""Reward functions: built-in ones, plain Python functions out of files, and those that installed packages offer.

A function takes `completions`, a list of texts, and as keywords what belongs to each of them: `prompts` (the messages), `messages`
(the whole conversation with what was completed), `completion_ids`, of environments `rollout_infos` (rollout/episodes.py), and every
other column of the row. It returns as many numbers.
"""

import hashlib
import importlib.util
import math
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from megaswift.config.reward import RewardConfig
from megaswift.config.reward_rules import REWARD_GROUP
from megaswift.data.prompts import PromptRow
from megaswift.data.sample import Message
from megaswift.errors import ConfigError, DataError, TrainingError, nearest
from megaswift.rollout.code_reward import Code
from megaswift.rollout.final_answer import final_answer, same_answer
from megaswift.rollout.rule_reward import Rules

RewardFunction = Callable[..., Sequence[float]]

# The form that DeepSeek-R1 was taught (arXiv 2501.12948, table 1): thoughts, then the answer, and nothing around them.
THOUGHTFUL = re.compile(r"\s*<think>.*?</think>\s*<answer>.*?</answer>\s*", re.DOTALL)


def load_rewards(chosen: RewardConfig) -> dict[str, RewardFunction]:
    """Return the reward functions of a resolved run by name, in their order; raises ConfigError."""
    built_in: dict[str, Callable[[RewardConfig], RewardFunction]] = {
        "accuracy": lambda chosen: accuracy,
        "format": lambda chosen: thoughtful,
        "cosine": _cosine,
        "repetition": _repetition,
        "soft_overlong": _soft_overlong,
        "code": Code,
        "rules": Rules,
    }
    own: dict[str, RewardFunction] = {}
    for path in chosen.external_plugins:
        own |= functions_of(Path(path).expanduser(), asked="external_plugins")
    offered = entry_points(group=REWARD_GROUP)
    known = [*own, *built_in, *offered.names]
    found: dict[str, RewardFunction] = {}
    for name in chosen.reward_funcs:
        if name not in known:
            raise ConfigError(
                f"reward_funcs={name} is neither built in nor in {' '.join(chosen.external_plugins)}.{nearest(name, known)}"
            )
        if name in own:
            found[name] = own[name]
        elif name in built_in:
            found[name] = built_in[name](chosen)
        else:
            found[name] = loaded(offered[name], asked="reward_funcs")
    return found


def function_named(text: str, *, asked: str, group: str) -> Callable[..., Any]:
    """Return what FILE.py:NAME, or the name of an entry point of `group`, stands for; raises ConfigError, which says what was `asked` for."""
    file, _, name = text.rpartition(":")
    if not file:
        return loaded(entry_points(group=group)[name], asked=asked)
    own = functions_of(Path(file).expanduser(), asked=asked)
    if name not in own:
        raise ConfigError(f"{asked}={text}: {file} has no {name}.{nearest(name, own)}")
    return own[name]


def loaded(offered: EntryPoint, *, asked: str) -> Callable[..., Any]:
    """Return what an installed package offers under a name; raises ConfigError, which says what was `asked` for."""
    try:
        value: Callable[..., Any] = offered.load()
    except Exception as error:  # whatever a person's package raises is his to mend
        raise ConfigError(
            f"{asked}={offered.name}, the entry point {offered.value}, fails: {type(error).__name__}: {error}. Mend it."
        ) from error
    return value


def functions_of(path: Path, *, asked: str) -> dict[str, Callable[..., Any]]:
    """Return functions and classes of a Python file by name; raises ConfigError, which says what was `asked` for."""
    return {name: value for name, value in contents_of(path, asked=asked).items() if callable(value)}


def contents_of(path: Path, *, asked: str) -> dict[str, Any]:
    """Return what a Python file names, without a leading underscore; raises ConfigError, which says what was `asked` for."""
    digest = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]
    spec = importlib.util.spec_from_file_location(f"megaswift_plugin_{path.stem}_{digest}", path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise ConfigError(f"{asked}={path} is not a Python file. Give a .py file that exists.")
    # Run once, whoever asks: rewards and environments of one file may share what it keeps, and dataclasses look their module up.
    module = sys.modules.get(spec.name)
    if module is None:
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except Exception as error:  # whatever a person's file raises is his to mend
            del sys.modules[spec.name]
            raise ConfigError(f"{asked}={path} fails: {type(error).__name__}: {error}. Mend it.") from error
    return {name: value for name, value in vars(module).items() if not name.startswith("_")}


@dataclass(frozen=True, kw_only=True)
class Judged:
    """A completion as reward functions see it."""

    ids: list[int]  # that the model wrote, in all its turns
    turns: list[Message]  # that follow the prompt: the model's, and those of an environment between them
    asked: tuple[Message, ...] | None = None  # what they follow; None: the row's conversation
    record: dict[str, Any] | None = None  # of an environment: Episode.record

    @property
    def text(self) -> str:
        """What the model wrote last."""
        return str(self.turns[-1]["content"])


def rewards_of(
    functions: dict[str, RewardFunction], row: PromptRow, given: Sequence[Judged]
) -> list[list[float]]:
    """Return each function's reward of every completion of one row [functions, completions].

    Raises DataError or TrainingError, which name the function and the row.
    """
    texts = [one.text for one in given]
    columns = {name: [value] * len(texts) for name, value in row.columns.items()}
    asked = [list(row.messages if one.asked is None else one.asked) for one in given]
    columns |= {
        "prompts": asked,
        "messages": [[*first, *one.turns] for first, one in zip(asked, given, strict=True)],
        "completion_ids": [one.ids for one in given],
    }
    if all(one.record is not None for one in given):
        columns["rollout_infos"] = [one.record for one in given]
    found = []
    for name, function in functions.items():
        try:
            values = function(texts, **columns)
        except DataError as error:
            raise DataError(f"reward_funcs={name} at {row.source}: {error}") from error
        except Exception as error:  # whatever a person's function raises is his to mend
            raise TrainingError(
                f"reward_funcs={name} fails at {row.source}: {type(error).__name__}: {error}. Mend the function or the row."
            ) from error
        found.append(_numbers(name, values, row, len(texts)))
    return found


def _numbers(name: str, values: Any, row: PromptRow, wanted: int) -> list[float]:
    try:
        numbers = [float(value) for value in values]
    except (TypeError, ValueError):
        numbers = []
    if len(numbers) != wanted or not all(map(math.isfinite, numbers)):
        raise TrainingError(
            f"reward_funcs={name} returned {values!r} at {row.source}, not {wanted} finite numbers: one for each completion. "
            "Mend the function."
        )
    return numbers


def accuracy(completions: list[str], solution: Sequence[Any] | None = None, **columns: Any) -> list[float]:
    """1 where the final answer is that of the column `solution`: what is boxed or tagged as answer, or else the last number."""
    if solution is None:
        raise DataError(
            "accuracy compares with the column solution, which the row lacks. Rename one with --columns."
        )
    return [
        float(same_answer(final_answer(text), final_answer(str(truth))))
        for text, truth in zip(completions, solution, strict=True)
    ]


def thoughtful(completions: list[str], **columns: Any) -> list[float]:
    """1 where a completion is <think>...</think><answer>...</answer> and nothing else."""
    return [float(THOUGHTFUL.fullmatch(text) is not None) for text in completions]


def _cosine(chosen: RewardConfig) -> RewardFunction:
    """Accuracy by length, from no tokens to the most along half a cosine: Yeo et al. 2025 (arXiv 2502.03373), their cosine reward,

    CosFn(t, T, least, most) = least + (most - least) (1 + cos(t pi / T)) / 2. What is longer than T counts as T, as in ms-swift.
    """
    longest = chosen.cosine_max_len
    assert longest is not None, "resolved"
    ends = {  # right or wrong: the values at no tokens and at the most
        1.0: (chosen.cosine_min_len_value_correct, chosen.cosine_max_len_value_correct),
        0.0: (chosen.cosine_min_len_value_wrong, chosen.cosine_max_len_value_wrong),
    }

    def cosine(
        completions: list[str],
        completion_ids: Sequence[Sequence[int]],
        solution: Sequence[Any] | None = None,
        **columns: Any,
    ) -> list[float]:
        found = []
        for right, ids in zip(accuracy(completions, solution), completion_ids, strict=True):
            short, long = ends[right]
            found.append(long + (short - long) * (1 + math.cos(math.pi * min(len(ids) / longest, 1.0))) / 2)
        return found

    return cosine


def _repetition(chosen: RewardConfig) -> RewardFunction:
    """max_penalty * the share of n-grams of words that were there before (Yeo et al. 2025, arXiv 2502.03373, appendix)."""
    size, worst = chosen.repetition_n_grams, chosen.repetition_max_penalty

    def repetition(completions: list[str], **columns: Any) -> list[float]:
        found = []
        for text in completions:
            words = text.lower().split()
            grams = [tuple(words[start : start + size]) for start in range(len(words) - size + 1)]
            found.append(worst * (1 - len(set(grams)) / len(grams)) if grams else 0.0)
        return found

    return repetition


def _soft_overlong(chosen: RewardConfig) -> RewardFunction:
    """0 up to a length, -1 beyond another, falling between: Yu et al. 2025, DAPO (arXiv 2503.14476), eq. 13."""
    longest, falling = chosen.soft_max_length, chosen.soft_cache_length
    assert longest is not None and falling is not None, "resolved"

    def soft_overlong(
        completions: list[str], completion_ids: Sequence[Sequence[int]], **columns: Any
    ) -> list[float]:
        return [min(0.0, max(-1.0, (longest - falling - len(ids)) / falling)) for ids in completion_ids]

    return soft_overlong
