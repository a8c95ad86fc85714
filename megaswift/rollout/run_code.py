"""Runs Python code that a model wrote, under limits.

What this is: a process of its own, in a folder of its own that is deleted, without the variables of this environment (where keys
and tokens of services are), with at most so many seconds of CPU, twice as many by the clock, so much memory and so long files;
at the end its whole process group is killed. It protects a run from code that hangs, fills memory or fails.

What this is not: a sandbox. The code runs as the user who trains. It may read and delete his files, use the network, and start
a process in a session of its own that outlives its limits. Who does not trust a model that far trains in a container or on a
machine without anything of value, or rewards by a function of his own that asks a service which isolates code.
"""

import json
import math
import os
import secrets
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile

from megaswift.launch.environment import library_path

FILE_BYTES = 16 * 2**20  # of each file that the code writes, and of what it prints
LIMITED = Path(__file__).with_name("limited.py")
# Runs code and then a test; says a word that the code was not told. Code that leaves early, as by sys.exit(0), has not passed.
TESTING = """
import json, sys
job = json.loads(sys.stdin.read())
names = {"__name__": "__main__"}
exec(compile(job["code"], "answer.py", "exec"), names)
exec(compile(job["test"], "test.py", "exec"), names)
print(job["word"])
"""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What code may use up."""

    cpu_s: float
    memory_bytes: int


def passes_test(code: str, test: str, limits: Limits) -> bool:
    """Whether statements of a test run to their end behind the code, in the names that it has defined."""
    word = secrets.token_hex(16)
    printed = output_of(TESTING, json.dumps({"code": code, "test": test, "word": word}), limits)
    return printed is not None and printed.endswith(word + "\n")


def answers_input(code: str, given: str, expected: str, limits: Limits) -> bool:
    """Whether the code as a program prints what is expected when it reads what is given; blanks at ends of lines do not count."""
    printed = output_of(code, given, limits)
    return printed is not None and _lines(printed) == _lines(expected)


def output_of(program: str, given: str, limits: Limits) -> str | None:
    """Return what a Python program prints when it reads what is given; None where it fails or reaches a limit."""
    with (
        TemporaryDirectory(prefix="megaswift-code-", ignore_cleanup_errors=True) as folder,
        TemporaryFile() as reads,
        TemporaryFile() as prints,
    ):
        script = Path(folder) / "program.py"
        script.write_bytes(_bytes(program))
        reads.write(_bytes(given))
        reads.seek(0)
        sizes = [str(number) for number in (math.ceil(limits.cpu_s), limits.memory_bytes, FILE_BYTES)]
        child = subprocess.Popen(
            [sys.executable, "-I", str(LIMITED), *sizes, str(script)],
            stdin=reads,
            stdout=prints,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env=_surroundings(folder),
            start_new_session=True,
        )
        try:
            failed = child.wait(timeout=2 * limits.cpu_s) != 0
        except subprocess.TimeoutExpired:
            failed = True
        finally:
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        if failed:
            return None
        prints.seek(0)
        return prints.read().decode(errors="replace")


def _surroundings(folder: str) -> dict[str, str]:
    """Return all that the program sees of an environment."""
    libraries = library_path()
    return {
        "PATH": os.defpath,
        "HOME": folder,
        "TMPDIR": folder,
        "LANG": "C.UTF-8",
        "PYTHONHASHSEED": "0",  # sets have the same order in every run
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",  # each of its threads takes address space
        **({} if libraries is None else {"LD_LIBRARY_PATH": libraries}),
    }


def _bytes(text: str) -> bytes:
    return text.encode(errors="replace")  # a decoded completion may hold half a character


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.strip().splitlines()]
