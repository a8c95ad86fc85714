"""The reward `rules`: the share, by weight, of rules that an answer keeps. Rules are those of the column `rules` of a row,
or, for rows without, those of the file --reward_rules: a list of objects, as JSON, each with an optional "weight" (1).

{"match": REGEX}                              the expression (Python's re) is found somewhere in the answer
{"no_match": REGEX}                           it is not
{"number": 7.5, "tolerance": 0.01}            the final number of the answer is this one, give or take (0); "number": "solution" means
                                              the final number of that column of the row
{"json": ["name", "age"]}                     the answer is JSON, an object with these keys; [] or true: any JSON. What counts is what is
                                              fenced as json or stands in <answer> tags, or else the whole answer.
"""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megaswift.config.reward import RewardConfig
from megaswift.errors import ConfigError, DataError
from megaswift.rollout.final_answer import ANSWER, final_answer, number_of

KINDS = ("match", "no_match", "number", "json")
FENCED_JSON = re.compile(r"```json[ \t]*\n(.*?)```", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One rule."""

    kind: str
    asks: Any  # match, no_match: a compiled expression; number: a number or a column; json: a list of keys
    tolerance: float = 0.0
    weight: float = 1.0


class Rules:
    """The reward."""

    def __init__(self, chosen: RewardConfig) -> None:
        """Read --reward_rules; raises ConfigError."""
        self._usual: list[Rule] | None = None
        path = chosen.reward_rules
        if path is not None:
            try:
                self._usual = rules_of(json.loads(Path(path).expanduser().read_text(encoding="utf-8")))
            except (OSError, ValueError) as error:
                raise ConfigError(f"reward_rules={path} holds no rules: {error}.") from error

    def __call__(
        self, completions: list[str], rules: Sequence[Any] | None = None, **columns: Any
    ) -> list[float]:
        """Return the share of the weight of rules that every completion keeps. Raises DataError."""
        found = []
        for number, text in enumerate(completions):
            own = None if rules is None else rules[number]
            row = {name: values[number] for name, values in columns.items()}
            kept = [(rule.weight, keeps(rule, text, row)) for rule in self._of_row(own)]
            found.append(
                sum(weight for weight, is_kept in kept if is_kept) / sum(weight for weight, _ in kept)
            )
        return found

    def _of_row(self, given: Any) -> list[Rule]:
        if given is None:
            if self._usual is None:
                raise DataError(
                    "rules looks at the column rules, which the row lacks. Give --reward_rules FILE.json for such rows."
                )
            return self._usual
        try:
            return rules_of(json.loads(given) if isinstance(given, str) else given)
        except ValueError as error:
            raise DataError(f"the column rules holds no rules: {error}.") from error


def rules_of(given: Any) -> list[Rule]:
    """Return rules out of their JSON form; raises ValueError, which says what is wrong."""
    if not isinstance(given, list) or not given:
        raise ValueError(f"{given!r} is not a list of rules with one at least")
    return [_rule(one) for one in given]


def _rule(given: Any) -> Rule:
    # Tables of rows fill up keys that only some objects have with nulls.
    values = (
        {name: value for name, value in given.items() if value is not None} if isinstance(given, dict) else {}
    )
    kinds = [name for name in values if name in KINDS]
    unknown = set(values) - {*KINDS, "weight", "tolerance"}
    if len(kinds) != 1 or unknown:
        raise ValueError(
            f"{given!r} is not an object with one of {', '.join(KINDS)}, and weight or tolerance beside it"
        )
    (kind,) = kinds
    weight, tolerance = values.get("weight", 1), values.get("tolerance", 0)
    if not _is_number(weight) or weight <= 0:
        raise ValueError(f"weight={weight!r} of {given!r} is not above 0")
    if not _is_number(tolerance) or tolerance < 0 or (tolerance and kind != "number"):
        raise ValueError(f"tolerance={tolerance!r} of {given!r} is not 0 or more, for a number")
    return Rule(kind=kind, asks=_asked(kind, values[kind]), weight=float(weight), tolerance=float(tolerance))


def _asked(kind: str, value: Any) -> Any:
    if kind == "json":
        keys = [] if value is True else value
        if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
            raise ValueError(f"json={value!r} is neither true nor a list of keys")
        return keys
    if kind == "number":
        if not isinstance(value, str) and not _is_number(value):
            raise ValueError(f"number={value!r} is neither a number nor the name of a column")
        return value
    try:
        return re.compile(value)
    except (re.error, TypeError) as error:
        raise ValueError(f"{kind}={value!r} is not a regular expression ({error})") from error


def keeps(rule: Rule, text: str, row: dict[str, Any]) -> bool:
    """Whether an answer keeps a rule; `row` are the columns of its row. Raises DataError."""
    if rule.kind in ("match", "no_match"):
        return (rule.asks.search(text) is not None) == (rule.kind == "match")
    if rule.kind == "number":
        said, wanted = number_of(final_answer(text)), _wanted(rule.asks, row)
        return said is not None and abs(said - wanted) <= rule.tolerance
    marked = FENCED_JSON.findall(text) or ANSWER.findall(text) or [text]
    try:
        value = json.loads(marked[-1])
    except (ValueError, RecursionError):
        return False
    return not rule.asks or (isinstance(value, dict) and all(key in value for key in rule.asks))


def _wanted(asked: str | float, row: dict[str, Any]) -> float:
    if not isinstance(asked, str):
        return float(asked)
    if asked not in row:
        raise DataError(f"a rule compares with the column {asked}, which the row lacks.")
    number = number_of(final_answer(str(row[asked])))
    if number is None:
        raise DataError(f"a rule compares with the column {asked}, which holds no number: {row[asked]!r}.")
    return number


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
