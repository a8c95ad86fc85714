"""Where log lines go on this machine: logging.jsonl, TensorBoard, and the terminal. Rank 0 alone writes."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from megaswift.logs import get_logger

logger = get_logger(__name__)

LOG_FILE = "logging.jsonl"


class Reporter(Protocol):
    """Something that takes log lines."""

    def report(self, line: Mapping[str, Any]) -> None:
        """Take one line; "step" is in every line."""
        ...

    def close(self) -> None:
        """Finish what is buffered."""
        ...


class JsonLines:
    """logging.jsonl or another file: one JSON object a line, appended; floats keep every bit."""

    def __init__(self, output_dir: Path, *, resumed_step: int, name: str = LOG_FILE) -> None:
        """Cut off what an interrupted run logged after `resumed_step`: those steps are made again."""
        self._path = output_dir / name
        output_dir.mkdir(parents=True, exist_ok=True)
        _cut_back(self._path, resumed_step)
        self._file = self._path.open("a", encoding="utf-8")

    def report(self, line: Mapping[str, Any]) -> None:
        """Append one line; a process that is killed later does not take it along."""
        self._file.write(json.dumps(line, ensure_ascii=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class TensorBoard:
    """Scalars for TensorBoard."""

    def __init__(self, folder: Path, *, resumed_step: int) -> None:
        """Open `folder`; points after `resumed_step` are superseded."""
        from torch.utils.tensorboard import SummaryWriter  # a second or two that ranks without it do not pay

        self._writer = SummaryWriter(str(folder), purge_step=resumed_step + 1)

    def report(self, line: Mapping[str, Any]) -> None:
        """Write every number of the line."""
        for name, value in scalars(line).items():
            self._writer.add_scalar(name, value, line["step"])

    def close(self) -> None:
        """Write what is buffered."""
        self._writer.close()


def scalars(line: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a line but its step, in the groups train/ and eval/."""
    return {
        f"{'eval' if name.startswith('eval_') else 'train'}/{name}": value
        for name, value in line.items()
        if name != "step" and isinstance(value, int | float)
    }


class PlainLines:
    """One readable line each on the log, for files and batch systems."""

    def __init__(self, *, total_steps: int) -> None:
        self._total = total_steps

    def report(self, line: Mapping[str, Any]) -> None:
        """Log the line, unless a person reads nothing in it."""
        if readable(line):
            logger.info("step %d/%d  %s", line["step"], self._total, readable(line))

    def close(self) -> None:
        """Nothing is buffered."""


class ProgressBar:
    """A bar with the newest figures, for a person at a terminal."""

    def __init__(self, *, total_steps: int, start: int) -> None:
        from rich.console import Console  # costs start-up time that only a terminal needs to pay
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._progress = Progress(
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}"),
            console=Console(stderr=True),
        )
        self._task = self._progress.add_task("training", total=total_steps, completed=start, figures="")
        self._progress.start()  # while it is live, rich stands in for sys.stderr: other lines go above the bar

    def report(self, line: Mapping[str, Any]) -> None:
        """Move the bar; a validation is a line of its own above it."""
        if "eval_loss" in line:
            self._progress.console.print(f"step {line['step']}  {readable(line)}", highlight=False)
        elif readable(line):
            self._progress.update(self._task, completed=line["step"], figures=readable(line))

    def close(self) -> None:
        """Leave the last state of the bar on the terminal."""
        self._progress.stop()


# How a person reads a figure; others stay in logging.jsonl.
FIGURES = (
    ("loss", "loss {:.4f}"),
    ("eval_loss", "eval_loss {:.4f}"),
    ("reward", "reward {:.3f}"),
    ("grad_norm", "grad_norm {:.3f}"),
    ("lr", "lr {:.3g}"),
    ("tokens_per_s", "{:.0f} tokens/s"),
    ("model_tflops_per_s", "{:.3g} TFLOP/s"),
    ("memory_gib", "{:.2f} GiB"),
    ("epoch", "epoch {:.2f}"),
)


def readable(line: Mapping[str, Any]) -> str:
    """Return the figures of a line for a person."""
    return "  ".join(form.format(line[name]) for name, form in FIGURES if line.get(name) is not None)


def _cut_back(path: Path, step: int) -> None:
    if not path.exists():
        return
    kept = [line for line in path.read_text(encoding="utf-8").split("\n") if _step_of(line) <= step]
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
    os.replace(temporary, path)


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")  # the torn last line of a killed process
