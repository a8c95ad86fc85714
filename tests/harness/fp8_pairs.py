"""Published speed-ups of FP8 over bf16 at equal model, devices and batch (tests/golden/published_runs/fp8_speedups.csv)."""

import csv
from dataclasses import dataclass, replace

from megaswift.planner.calibration import TimeConstants
from megaswift.planner.costs import Costs
from megaswift.planner.steptime import step_time
from tests.harness.published import FOLDER, Published, published_from


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One speed-up, and the run that stands for it."""

    name: str
    run: Published  # in FP8
    speed_up: float

    def predicted(self, constants: TimeConstants) -> float:
        """Return the predicted time in bf16 over that in FP8."""
        costs = Costs(self.run.job, self.run.machine, self.run.software, time=constants)
        plain = replace(self.run.candidate, precision="bf16")
        return (
            step_time(costs, plain, self.run.stages).total
            / step_time(costs, self.run.candidate, self.run.stages).total
        )


def read_pairs() -> list[Pair]:
    """Return the published speed-ups."""
    with (FOLDER / "fp8_speedups.csv").open(newline="", encoding="utf-8") as file:
        return [
            Pair(
                name=f"{row['model']} {row['gpu']}", run=published_from(row), speed_up=float(row["speed_up"])
            )
            for row in csv.DictReader(file)
        ]
