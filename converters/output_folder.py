"""A folder that the ranks of a model write together: they fail together, and nothing half-written keeps the name.

The first error of one rank is told to all before any of them enters a collective alone.
"""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist

from megaswift.converters.folders import check_output, check_space, growing_name, publish
from megaswift.converters.shards import OutputFile, create
from megaswift.errors import UserError, WeightsError

T = TypeVar("T")


class OutputFolder:
    """Use: prepare() once, attempt() for each write, publish() once. All ranks of the world call prepare and publish."""

    def __init__(self, output: Path, *, rank: int, world: int) -> None:
        self.output = output.absolute()
        self.growing = growing_name(self.output)
        self._rank = rank
        self._world = world
        self._error: str | None = None

    def prepare(self, files: Sequence[OutputFile], *, replaces: str, source: Path | None) -> None:
        """Create `files`, which lie in `growing`, in their full size.

        An existing output is replaced in the end if it holds a file called `replaces`, an earlier output that is; anything
        else is refused, and so is `source`. Raises WeightsError on every rank.
        """
        if self._rank == 0:
            self.attempt(lambda: check_output(self.output, replaces=replaces, source=source))
            self.attempt(lambda: self._create(files))
        self._agree()

    def attempt(self, action: Callable[[], object]) -> None:
        """Call `action` unless something failed on this rank before; an error waits until the ranks meet."""
        if self._error is None:
            try:
                action()
            except OSError as error:
                where = f" ({error.filename})" if error.filename else ""
                self._error = f"{error.strerror or error}{where}"
            except UserError as error:
                self._error = str(error).rstrip(".")

    def publish(self, add_small_files: Callable[[Path], object]) -> None:
        """Once all ranks have written, let rank 0 add what is small and give the folder its name; raises WeightsError on every rank."""
        self._agree()
        if self._rank == 0:
            self.attempt(lambda: add_small_files(self.growing))
            self.attempt(lambda: publish(self.growing, self.output))
        self._agree()

    def _create(self, files: Sequence[OutputFile]) -> None:
        shutil.rmtree(self.growing, ignore_errors=True)
        self.growing.mkdir(parents=True)
        check_space(self.growing, sum(file.num_bytes for file in files))
        for file in files:
            create(file)

    def _agree(self) -> None:
        """Wait for every rank; if one has failed, all raise its error."""
        errors = enumerate(gathered(self._error, world=self._world))
        failed = [(rank, error) for rank, error in errors if error is not None]
        if failed:
            if self._rank == 0:
                shutil.rmtree(self.growing, ignore_errors=True)
            rank, error = failed[0]
            raise WeightsError(
                f"Writing {self.output} failed on rank {rank}: {error}. Nothing was left under that name."
            )


def gathered(value: T, *, world: int) -> list[T]:
    """Return the value of every rank, by rank; every rank of the world calls it."""
    values: list[T] = [value] * world
    if world > 1:
        dist.all_gather_object(values, value)
    return values
