"""What became of every row: kept, or reported with file, line, kind and reason. Nothing leaves in silence."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from megaswift.errors import DataError
from megaswift.logs import get_logger

logger = get_logger(__name__)
SHOWN_ROWS = 10  # bad rows named one by one in the log; the rest are counted by kind


@dataclass(frozen=True, kw_only=True, slots=True)
class BadRow:
    """A row that is not trained on, and why."""

    source: str  # "file:line"
    kind: str
    reason: str

    def __str__(self) -> str:
        return f"{self.source}: {self.kind}: {self.reason}"


@dataclass(frozen=True, kw_only=True)
class Report:
    """The ledger of one step: rows that came in, rows that stayed, rows that were turned away."""

    read: int = 0
    kept: int = 0
    bad: tuple[BadRow, ...] = ()

    def __post_init__(self) -> None:
        assert self.kept + len(self.bad) == self.read, (self.read, self.kept, len(self.bad))

    def kinds(self) -> dict[str, int]:
        """Return how many rows were turned away for each kind of reason, most frequent first."""
        return dict(Counter(row.kind for row in self.bad).most_common())

    def log(self, what: str) -> None:
        """Say what was kept and what was not."""
        if not self.bad:
            logger.info("%s: %d rows", what, self.kept)
            return
        kinds = ", ".join(f"{count} {kind}" for kind, count in self.kinds().items())
        logger.warning("%s: kept %d of %d rows; turned away: %s", what, self.kept, self.read, kinds)
        for row in self.bad[:SHOWN_ROWS]:
            logger.warning("  %s", row)
        if len(self.bad) > SHOWN_ROWS:
            logger.warning("  ... and %d more", len(self.bad) - SHOWN_ROWS)


def merge(reports: Iterable[Report]) -> Report:
    """Add up the ledgers of several sets."""
    reports = list(reports)
    return Report(
        read=sum(report.read for report in reports),
        kept=sum(report.kept for report in reports),
        bad=tuple(row for report in reports for row in report.bad),
    )


def stop_at(row: BadRow) -> None:
    """Raise the DataError of --strict for one bad row."""
    raise DataError(
        f"{row}. With --strict true a bad row stops the run. Mend the row, or leave --strict out to count it."
    )
