"""The folder of a run's checkpoints, in which a checkpoint is complete or not there.

output_dir/
    checkpoint-500/            complete: its manifest.json names every file and its size, and was written last
    checkpoint-600.partial/    a save that is under way, or that was cut short; the next start removes it
    latest                     the name of the newest complete checkpoint, for people and scripts
    best                       that of the one whose figures of the held-back rows are the best, where there are any

A save writes everything into the .partial folder, syncs it, writes the manifest, syncs that, and only then renames. Rank 0
alone calls what changes the folder. No torch here.
"""

import json
import math
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megaswift.errors import CheckpointError
from megaswift.logs import get_logger

logger = get_logger(__name__)

MANIFEST = "manifest.json"
POINTER, BEST = "latest", "best"
FORMAT = 1  # of the manifest and of what it describes
FINISHED = re.compile(r"checkpoint-(\d+)")


@dataclass(frozen=True, kw_only=True)
class Criterion:
    """Which figure of the held-back rows says what is best."""

    metric: str = "loss"
    greater_is_better: bool = False

    def figure(self, figures: Mapping[str, float]) -> float | None:
        """Return the figure among others; None where it is absent or not a number."""
        figure = figures.get(self.metric)
        return figure if figure is not None and math.isfinite(figure) else None

    def is_better(self, figure: float, *, than: float | None) -> bool:
        """Return whether a figure is better than another; any is better than none."""
        return than is None or (figure > than if self.greater_is_better else figure < than)


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a checkpoint holds; manifest.json."""

    step: int  # optimizer steps done
    updates: int  # of which changed the weights: all but the float16 overflows
    consumed_samples: int  # items (samples or packs) taken from the training data
    resumable: bool  # optimizer and random states are there
    layout: dict[str, Any]  # parallel/layout.py's Layout
    identity: dict[str, Any]  # what a resumed run must have in common: model, adapters, dtype
    seed: int
    versions: dict[str, str] = field(default_factory=dict)
    loss_scale: dict[str, float] | None = None  # of float16, and its counters
    resumed_from: str | None = None  # the folder that --resume named, if it named one
    validations: dict[str, Any] | None = None  # training/validations.py
    sequence: int = 0  # saves so far in this folder: the newest checkpoint has the highest
    files: dict[str, int] = field(default_factory=dict)  # path below the folder -> bytes
    format: int = FORMAT

    @property
    def figures(self) -> dict[str, float]:
        """What the held-back rows showed after this step; empty where nobody looked."""
        found = self.validations or {}
        return figures_of(found) if found.get("step") == self.step else {}


def figures_of(validations: Mapping[str, Any]) -> dict[str, float]:
    """Return the figures of the newest of a manifest's validations; older manifests have the loss alone."""
    figures: dict[str, float] = validations.get("figures") or {"loss": validations["loss"]}
    return figures


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A complete checkpoint."""

    folder: Path
    manifest: Manifest


def read_checkpoint(folder: Path) -> Checkpoint:
    """Return the checkpoint in `folder`; raises CheckpointError that says why it is not complete."""
    try:
        stored = json.loads((folder / MANIFEST).read_text())
        manifest = Manifest(**stored)
    except FileNotFoundError:
        raise CheckpointError(
            f"{folder} is not a complete checkpoint: it has no {MANIFEST}. Choose a folder that has one."
        ) from None
    except (ValueError, TypeError) as error:
        raise CheckpointError(
            f"{folder / MANIFEST} cannot be read: {error}. Choose another checkpoint, or the version that wrote it."
        ) from error
    for name, size in manifest.files.items():
        path = folder / name
        found = path.stat().st_size if path.is_file() else None
        if found != size:
            state = "is missing" if found is None else f"has {found} bytes instead of {size}"
            raise CheckpointError(f"{folder} is damaged: {name} {state}. Choose another checkpoint.")
    return Checkpoint(folder=folder, manifest=manifest)


class Store:
    """The checkpoints below one output folder."""

    def __init__(self, output_dir: Path, *, criterion: Criterion = Criterion()) -> None:
        self.output_dir, self._criterion = output_dir, criterion

    def complete(self) -> list[Checkpoint]:
        """Return the complete checkpoints, oldest save first; damaged ones are named in the log and left alone."""
        found = []
        for folder in self._folders():
            if not (folder / MANIFEST).exists():
                continue
            try:
                found.append(read_checkpoint(folder))
            except CheckpointError as error:
                logger.warning("ignored: %s", error)
        return sorted(found, key=lambda checkpoint: checkpoint.manifest.sequence)

    def latest_complete(self) -> Checkpoint | None:
        """Return the checkpoint that was saved last."""
        return next(reversed(self.complete()), None)

    def best(self) -> Checkpoint | None:
        """Return the checkpoint with the best figure of the held-back rows, the oldest of several; None where none has one."""
        return self._best(self.complete())

    def clean(self) -> None:
        """Remove what an interrupted save left behind, and undo an interrupted replacement."""
        for folder in sorted(self.output_dir.glob("checkpoint-*.partial")):
            logger.info("removing the incomplete save %s", folder.name)
            _remove(folder)
        for old in sorted(self.output_dir.glob("checkpoint-*.replaced")):
            current = old.with_suffix("")
            if current.exists():
                _remove(old)
            else:
                os.replace(old, current)

    def begin(self, step: int, *, expected_bytes: int = 0) -> Path:
        """Return a new, empty folder for the save of `step`.

        Raises CheckpointError where fewer than `expected_bytes` are free.
        """
        self.output_dir.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.output_dir).free
        if free < expected_bytes:
            raise CheckpointError(
                f"{self.output_dir} has {free / 1e9:.2f} GB free, but the checkpoint of step {step} takes "
                f"{expected_bytes / 1e9:.2f} GB. Free some space, or choose another --output_dir."
            )
        folder = self._finished(step).with_suffix(".partial")
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir()
        return folder

    def commit(self, folder: Path, manifest: Manifest) -> Checkpoint:
        """Make the save in `folder` the newest complete checkpoint; `manifest` gets its files and its sequence."""
        before = self.latest_complete()
        files = {
            path.relative_to(folder).as_posix(): path.stat().st_size
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
        stored = {
            **asdict(manifest),
            "files": files,
            "sequence": before.manifest.sequence + 1 if before else 1,
        }
        for path in folder.rglob("*"):
            _sync(path)
        _write_synced(folder / MANIFEST, json.dumps(stored, indent=1, sort_keys=True) + "\n")
        _sync(folder)
        finished = self._finished(manifest.step)
        self._make_way(finished)
        os.replace(folder, finished)
        _sync(self.output_dir)
        _write_synced(self.output_dir / POINTER, finished.name + "\n")
        best = self.best()
        if best is not None:
            _write_synced(self.output_dir / BEST, best.folder.name + "\n")
        else:  # one that was the best by another figure may be deleted
            (self.output_dir / BEST).unlink(missing_ok=True)
        _sync(self.output_dir)
        self.clean()  # of the checkpoint that this one replaced, if any
        return Checkpoint(folder=finished, manifest=Manifest(**stored))

    def discard(self, folder: Path) -> None:
        """Remove the folder of a save that failed."""
        shutil.rmtree(folder, ignore_errors=True)

    def rotate(self, keep: int | None) -> None:
        """Delete the oldest complete checkpoints beyond `keep` (None or -1: none); the newest and the best one always stay."""
        if keep is None or keep == -1:
            return
        every = self.complete()
        best = self._best(every)
        for checkpoint in every[: -max(keep, 1)]:
            if best is not None and checkpoint.folder == best.folder:
                continue
            # Renamed first: a deletion that is cut short must not leave half a checkpoint under a whole one's name.
            leaving = checkpoint.folder.with_suffix(".partial")
            os.replace(checkpoint.folder, leaving)
            if _remove(leaving):
                logger.info("deleted %s: save_total_limit=%d", checkpoint.folder.name, keep)

    def _best(self, checkpoints: list[Checkpoint]) -> Checkpoint | None:
        best, highest = None, None
        for one in checkpoints:
            figure = self._criterion.figure(one.manifest.figures)
            if figure is not None and self._criterion.is_better(figure, than=highest):
                best, highest = one, figure
        return best

    def _folders(self) -> list[Path]:
        if not self.output_dir.is_dir():
            return []
        return [path for path in self.output_dir.iterdir() if path.is_dir() and FINISHED.fullmatch(path.name)]

    def _finished(self, step: int) -> Path:
        return self.output_dir / f"checkpoint-{step}"

    def _make_way(self, folder: Path) -> None:
        if not folder.exists():
            return
        if (folder / MANIFEST).exists():
            os.replace(folder, folder.with_suffix(".replaced"))
            return
        aside = next(
            path for n in range(1000) if not (path := folder.with_name(f"{folder.name}.aside-{n}")).exists()
        )
        os.replace(folder, aside)
        logger.warning("%s was not written by megaswift: it is kept as %s", folder.name, aside.name)


def _remove(folder: Path) -> bool:
    """Remove a folder that nobody needs; where that fails, as on NFS while another program reads it, say so and go on."""
    try:
        shutil.rmtree(folder)
    except OSError as error:
        logger.warning("%s cannot be removed now, and will be tried again: %s", folder, error)
        return False
    return True


def _write_synced(path: Path, text: str) -> None:
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(text)
    _sync(temporary)
    os.replace(temporary, path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
