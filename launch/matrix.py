"""A table of runs: every combination of the values that a YAML file lists for some flags."""

from itertools import product
from pathlib import Path
from typing import Any

import yaml

from megaswift.errors import ConfigError

MAX_RUNS = 1000  # slurm's default MaxArraySize allows 1001 tasks


def read_matrix(path: str) -> dict[str, list[Any]]:
    """Return flag -> values of a file of `flag: [value, ...]` lines; raises ConfigError."""
    try:
        content = yaml.safe_load(Path(path).expanduser().read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"matrix={path} cannot be read: {error}.") from None
    if not isinstance(content, dict) or not all(
        isinstance(values, list) and values for values in content.values()
    ):
        raise ConfigError(f"matrix={path} is not a table of `flag: [value, ...]` lines.")
    return {str(name).replace("-", "_"): values for name, values in content.items()}


def expand_matrix(
    task: str, argv: list[str], matrix: dict[str, list[Any]], output_dir: str
) -> list[tuple[list[str], str]]:
    """Return (arguments of `megaswift`, output folder) of every run, the last flag moving fastest.

    The flag `task` chooses the command. A run's folder is its number and its values below `output_dir`.
    """
    runs = []
    combinations = list(product(*matrix.values()))
    if len(combinations) > MAX_RUNS:
        raise ConfigError(
            f"the matrix has {len(combinations)} runs, and a job array holds {MAX_RUNS}. Split it."
        )
    for number, values in enumerate(combinations):
        chosen = dict(zip(matrix, values, strict=True))
        folder = f"{output_dir}/{number:03d}-{'-'.join(_short(value) for value in values)}"
        words = [
            word for name, value in chosen.items() if name != "task" for word in (f"--{name}", *_words(value))
        ]
        runs.append(([str(chosen.get("task", task)), *argv, *words, "--output_dir", folder], folder))
    return runs


def _words(value: Any) -> list[str]:
    if isinstance(value, bool):
        return ["true" if value else "false"]
    return [str(one) for one in value] if isinstance(value, list) else [str(value)]


def _short(value: Any) -> str:
    """Return a value as part of a folder's name: the last part of a path, without what a shell would have to quote."""
    text = "+".join(Path(word).name for word in _words(value))
    return "".join(letter if letter.isalnum() or letter in "._+-" else "_" for letter in text)[:40]
