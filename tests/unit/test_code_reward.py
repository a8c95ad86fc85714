"""The reward `code`: what passes, what does not, and what code that misbehaves can and cannot do."""

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from megaswift.config.reward import RewardConfig
from megaswift.errors import ConfigError, DataError
from megaswift.rollout.code_reward import Code, cases_of, python_of
from megaswift.rollout.run_code import FILE_BYTES, Limits, output_of, passes_test

LIMITS = Limits(cpu_s=1, memory_bytes=256 * 2**20)
ASSERTS = [
    "assert add(1, 2) == 3",
    "assert add(-1, 1) == 0",
    "assert add('a', 'b') == 'ab'",
    "assert add(0.5, 1) == 1.5",
]


def fenced(code: str, language: str = "python") -> str:
    return f"Here it is:\n```{language}\n{code}\n```\nDone."


def judged(*texts: str, **columns: Any) -> list[float]:
    repeated = {name: [value] * len(texts) for name, value in columns.items()}
    return Code(RewardConfig(code_timeout=1))(list(texts), **repeated)


def test_the_reward_is_the_share_of_asserts_that_hold() -> None:
    texts = (
        fenced("def add(a, b):\n    return a + b"),
        fenced("def add(a, b):\n    return int(a) + int(b)"),
        fenced("def add(a, b):\n    return a +"),
        "def add(a, b): return a + b",
        fenced("import sys\nsys.exit(0)"),
        fenced("import os\nos._exit(0)"),
    )
    assert judged(*texts, test_cases=ASSERTS) == [1.0, 0.5, 0.0, 0.0, 0.0, 0.0]


def test_programs_are_compared_by_what_they_print() -> None:
    cases = [{"input": "3\n1 2 3\n", "output": "6\n1"}, {"input": "1\n5\n", "output": "5\n5\n"}]
    good = "input()\nnumbers = list(map(int, input().split()))\nprint(sum(numbers), '')\nprint(min(numbers))"
    lazy = "print(6)\nprint(1)"
    failing = good + "\nraise SystemExit(1)"
    texts = [fenced(code) for code in (good, lazy, failing)]
    info = {"language": "python", "test_cases": cases}
    assert judged(*texts, verification_info=info) == [1.0, 0.5, 0.0]
    assert judged(
        *texts, verification_info=json.dumps({"language": "python", "test_cases": json.dumps(cases)})
    ) == [1, 0.5, 0]


@pytest.mark.parametrize(
    ("text", "code"),
    [
        (fenced("a = 1") + fenced("b = 2"), "b = 2\n"),
        (fenced("a = 1") + fenced("b = 2", "json"), "a = 1\n"),
        (fenced("a = 1", "py") + fenced("b", ""), "a = 1\n"),
        (fenced("b", ""), "b\n"),
        (fenced("a", "sql"), None),
        ("a = 1", None),
    ],
)
def test_the_last_python_that_is_fenced_counts(text: str, code: str | None) -> None:
    assert python_of(text) == code


@pytest.mark.parametrize(
    "code",
    [
        "while True: pass",
        "import time\ntime.sleep(60)",
        "block = bytearray(2**30)",
        f"with open('big', 'wb') as file:\n    file.write(bytes({FILE_BYTES} + 1))",
        f"print('a' * ({FILE_BYTES} + 1))",
        "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass",
    ],
    ids=["computes", "sleeps", "fills memory", "fills the disk", "prints", "ignores signals"],
)
def test_code_that_reaches_a_limit_does_not_pass(code: str) -> None:
    start = time.monotonic()
    assert not passes_test(code, "pass", LIMITS)
    assert time.monotonic() - start < 20  # of a minute that it would sleep


def test_code_sees_no_variables_and_leaves_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", "secret-of-a-person")
    tell = "import os\nopen('left', 'w').write('x')\nprint(os.getcwd())\nprint(dict(os.environ))"
    printed = output_of(tell, "", LIMITS)
    assert printed is not None
    folder, variables = printed.splitlines()
    assert "secret-of-a-person" not in printed and "SOME_API_KEY" not in variables
    assert not Path(folder).exists() and folder != str(Path.cwd())


def test_children_end_with_the_code() -> None:
    start = "import subprocess, sys\nprint(subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']).pid)"
    printed = output_of(start, "", LIMITS)
    assert printed is not None
    pid = int(printed)
    for _ in range(100):  # whoever adopted it may reap it a moment later
        if not _lives(pid):
            return
        time.sleep(0.1)
    raise AssertionError(f"process {pid} is still there")


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_sets_are_printed_in_the_same_order_every_time() -> None:
    code = "print({'a', 'b', 'c', 'd', 'e', 'f', 'g'})"
    assert output_of(code, "", LIMITS) == output_of(code, "", LIMITS)


def test_code_has_no_open_files_of_this_process(tmp_path: Path) -> None:
    with (tmp_path / "checkpoint").open("wb") as mine:
        os.set_inheritable(mine.fileno(), True)
        printed = output_of(
            "import os\nprint([os.readlink(f'/proc/self/fd/{n}') for n in (0, 1, 2)], len(os.listdir('/proc/self/fd')))",
            "",
            LIMITS,
        )
    assert printed is not None and printed.rstrip().endswith("4")  # three, and that of the folder itself


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({}, "column test_cases .* which the row lacks"),
        ({"test_cases": []}, "is not a list of test cases"),
        ({"test_cases": "assert"}, "is not JSON"),
        ({"test_cases": [{"input": "a"}]}, "a test case is"),
        ({"verification_info": {"language": "rust", "test_cases": ["a"]}}, "language=rust"),
    ],
)
def test_rows_without_cases_are_refused(columns: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        judged(fenced("pass"), **columns)


def test_keys_that_a_table_fills_with_nothing_do_not_matter() -> None:
    assert cases_of([{"input": "a", "output": "b", "type": None, "fn_name": None}]) == [("a", "b")]


def test_cases_that_call_a_function_are_refused() -> None:
    with pytest.raises(DataError, match="calls a function"):
        cases_of([{"fn_name": "add", "type": "function_call", "input": "1\n2", "output": "3"}])


def test_code_in_a_list_is_read_without_its_indent() -> None:
    text = "1. So:\n   ```python\n   def one():\n       return 1\n   ```\n"
    assert python_of(text) == "def one():\n    return 1\n"


def test_limits_under_which_nothing_runs_are_said_at_the_start() -> None:
    with pytest.raises(
        ConfigError, match=r"reward_funcs=code: Python does not start within .*code_memory_gib=0.001"
    ):
        Code(RewardConfig(code_memory_gib=0.001))
