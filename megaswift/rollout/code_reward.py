"""The reward `code`: the share of a row's test cases that the Python code of an answer passes.

The cases are the column `test_cases`, or `verification_info` with test_cases in it, as open-r1's data sets and ms-swift's example
of a code reward have it; each is statements (`assert add(1, 2) == 3`) or {"input": TEXT, "output": TEXT}, which a program reads
and prints. How far the code is kept in check stands in rollout/run_code.py: it is limits, not a sandbox.
"""

import json
import os
import re
import textwrap
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from megaswift.config.reward import RewardConfig
from megaswift.errors import ConfigError, DataError
from megaswift.launch.environment import rank_env
from megaswift.rollout.run_code import Limits, answers_input, passes_test

FENCED = re.compile(r"```[ \t]*(\w*)[^\n]*\n(.*?)```", re.DOTALL)
PYTHON = ("python", "py", "python3")
GIB = 2**30

Case = str | tuple[str, str]  # statements, or what is read and what is to be printed


class Code:
    """The reward; starts as many processes at once as this process has cores."""

    def __init__(self, chosen: RewardConfig) -> None:
        """Raises ConfigError where not even a program that does nothing runs under these limits."""
        self._limits = Limits(cpu_s=chosen.code_timeout, memory_bytes=int(chosen.code_memory_gib * GIB))
        if not passes_test("", "pass", self._limits):
            raise ConfigError(
                f"reward_funcs=code: Python does not start within code_timeout={chosen.code_timeout:g} seconds and "
                f"code_memory_gib={chosen.code_memory_gib:g}. Raise them."
            )

    def __call__(
        self,
        completions: list[str],
        test_cases: Sequence[Any] | None = None,
        verification_info: Sequence[Any] | None = None,
        **columns: Any,
    ) -> list[float]:
        """Return the share of passed cases of every completion; 0 without code. Raises DataError."""
        given = verification_info if test_cases is None else test_cases
        if given is None:
            raise DataError(
                "code runs the cases of the column test_cases (or verification_info), which the row lacks. Rename one with --columns."
            )
        codes = [python_of(text) for text in completions]
        cases = [cases_of(one) for one in given]
        jobs = [
            (code, case) for code, own in zip(codes, cases, strict=True) if code is not None for case in own
        ]
        with ThreadPoolExecutor(_processors()) as pool:
            passed = pool.map(partial(_passes, limits=self._limits), jobs)
            return [
                0.0 if code is None else sum(next(passed) for _ in own) / len(own)
                for code, own in zip(codes, cases, strict=True)
            ]


def _processors() -> int:
    """Return how many cases run at once: as many as this rank has processors, which the ranks of a node share unless they are pinned."""
    own, rank = len(os.sched_getaffinity(0)), rank_env(os.environ)
    if rank is None or own < (os.cpu_count() or 1):
        return own
    return max(1, own // rank.local_world_size)


def python_of(text: str) -> str | None:
    """Return the last block of Python code that is fenced in a text, or else the last that names no language."""
    blocks = FENCED.findall(text)
    for languages in (PYTHON, ("",)):
        codes: list[str] = [code for language, code in blocks if language.lower() in languages]
        if codes:
            return textwrap.dedent(codes[-1])  # fenced inside a list, it is indented as a whole
    return None


def cases_of(given: Any) -> list[Case]:
    """Return the test cases that a column holds, as they are or as JSON; raises DataError."""
    value = _from_json(given)
    if isinstance(value, dict):
        language = value.get("language") or "python"
        if str(language).lower() not in PYTHON:
            raise DataError(f"language={language} in verification_info is not built: code runs Python.")
        value = _from_json(value.get("test_cases"))
    if not isinstance(value, list) or not value:
        raise DataError(f"test_cases={value!r} is not a list of test cases with one at least.")
    return [_case(one) for one in value]


def _case(one: Any) -> Case:
    if isinstance(one, str):
        return one
    if isinstance(one, dict) and (
        one.get("fn_name") or (one.get("type") or "stdin_stdout") != "stdin_stdout"
    ):
        raise DataError(
            f'a test case calls a function ({one!r}), which is not built. Write it as statements: "assert add(1, 2) == 3".'
        )
    if isinstance(one, dict) and isinstance(one.get("input"), str) and isinstance(one.get("output"), str):
        return one["input"], one["output"]
    raise DataError(
        f'a test case is {one!r}, neither statements ("assert add(1, 2) == 3") nor {{"input": TEXT, "output": TEXT}}.'
    )


def _from_json(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        raise DataError(f"test_cases is a text that is not JSON: {error}.") from error


def _passes(job: tuple[str, Case], limits: Limits) -> bool:
    code, case = job
    return passes_test(code, case, limits) if isinstance(case, str) else answers_input(code, *case, limits)
