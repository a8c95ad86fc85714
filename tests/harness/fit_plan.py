"""Fit the planner's constants on the calibration half of the published runs, and print them as Python.

    python -m tests.harness.fit_plan            # the constants of megaswift/planner/calibration.py
    python -m tests.harness.fit_plan --without Hagemann   # a source left out, to see how it is then predicted

Time: the most probable constants under priors (PRIOR and its spreads: what data sheets and kernels' papers lead one to
expect) and log-normal errors with heavy tails; Gauss-Newton with damping. Memory: a grid, by misjudged layouts.
"""

import itertools
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
from numpy.typing import NDArray

from megaswift.planner.calibration import MEMORY, MemoryConstants, TimeConstants
from megaswift.planner.costs import Costs
from megaswift.planner.machine import GIB
from megaswift.planner.memory import memory_of
from megaswift.planner.steptime import step_time
from tests.harness.fp8_pairs import Pair, read_pairs
from tests.harness.published import Published, read_runs, split

Vector = NDArray[np.float64]

# What is expected before any run is looked at.
PRIOR = TimeConstants(
    gemm={
        "ampere 16": 0.75,  # SimuMax configs/system/a100_pcie.json, measured GEMMs
        "hopper 16": 0.70,  # torchtitan and Transformer Engine GEMM benchmarks: 650 to 750 TFLOP/s
        "hopper fp8": 0.60,
        "blackwell 16": 0.70,
        "blackwell fp8": 0.60,
        "blackwell mxfp8": 0.55,  # a scale every 32 elements
        "blackwell nvfp4": 0.40,
    },
    # FlashAttention-2 (arXiv:2307.08691) on A100 0.5 to 0.7; FlashAttention-3 (arXiv:2407.08608) on H100 0.5 to 0.75,
    # the second version 0.35 to 0.4 there; both directions together.
    attention={"ampere": 0.55, "hopper": 0.50, "blackwell": 0.50},
    kernels={"ampere flash1": 0.6, "hopper flash2": 0.65},
    # GB300: 1400 W where GB200 has 1200 W, and its fp4 peak grew more than its power; H100-96G: 500 W where the SXM5
    # part has 700 W; B200: SimuMax configs/system/b200_bf16_ceperm.json measures GEMMs at 0.48 of the peak.
    device={"GB300": 1.2, "GB300 nvfp4": 0.8, "H100-96G": 0.85, "B200 bf16": 0.65},
    gemm_traffic=0.5,
    memory=0.75,  # of a data sheet's bandwidth, as copies reach it
    eager_traffic=3.0,
    eager_norm_traffic=100.0,
    scores_traffic=50.0,
    scores_fused_traffic=20.0,
    link=0.5,  # bus bandwidth of NCCL at tens of megabytes
    network=0.6,
    link_latency_s=20e-6,
    network_latency_s=40e-6,
    tensor_hidden=0.6,
    data_hidden=0.8,
    experts_hidden=0.7,
    pipe_hidden=0.7,
    host_layer_s=1e-3,
    host_moe_layer_s=6e-3,
    step_overhead_s=0.02,
)
SHARES = {
    "gemm",
    "attention",
    "kernels",
    "gemm_traffic",
    "memory",
    "link",
    "network",
    "tensor_hidden",
    "data_hidden",
    "experts_hidden",
    "pipe_hidden",
}  # between 0 and 1: fitted as log-odds, the others as logarithms
SPREADS = {
    "device": 0.15,
    "attention": 0.25,
    "memory": 0.3,
    "gemm_traffic": 0.6,
    "tensor_hidden": 0.6,
    "data_hidden": 0.6,
    "experts_hidden": 0.6,
    "pipe_hidden": 0.6,
}
SPREAD = 0.3  # of the others: one standard deviation of the prior in log-odds or logarithm
NOISE = 0.08  # of a published time: a standard deviation, of which consecutive releases move by half
PAIR_NOISE = 0.06
PARTLY_KNOWN = 0.3  # weight of rows whose source leaves micro batch or interleaving out


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """One number among the constants: a field, and its key where the field is a table."""

    field: str
    key: str | None

    @property
    def name(self) -> str:
        """How reports call it."""
        return f"{self.field}[{self.key}]" if self.key else self.field

    @property
    def is_share(self) -> bool:
        """Say whether it lies between 0 and 1."""
        return self.field in SHARES

    def of(self, constants: TimeConstants) -> float:
        """Return its value."""
        value = getattr(constants, self.field)
        return float(value[self.key]) if self.key else float(value)


def parameters() -> list[Parameter]:
    """Return every number of the time constants."""
    found = []
    for one in fields(TimeConstants):
        value = getattr(PRIOR, one.name)
        keys = list(value) if isinstance(value, dict) else [None]
        found += [Parameter(field=one.name, key=key) for key in keys]
    return found


def to_vector(constants: TimeConstants) -> Vector:
    """Return the constants as unbounded numbers."""
    values = [(parameter.of(constants), parameter.is_share) for parameter in parameters()]
    return np.array([np.log(value / (1 - value)) if share else np.log(value) for value, share in values])


def to_constants(vector: Vector) -> TimeConstants:
    """Return the constants that a vector stands for."""
    values: dict[str, float | dict[str, float]] = {}
    for parameter, number in zip(parameters(), vector, strict=True):
        value = float(1 / (1 + np.exp(-number)) if parameter.is_share else np.exp(number))
        if parameter.key is None:
            values[parameter.field] = value
        else:
            table = values.setdefault(parameter.field, {})
            assert isinstance(table, dict), f"{parameter.field} is a table"
            table[parameter.key] = value
    return TimeConstants(**values)  # type: ignore[arg-type] # tables and numbers go where the prior has them


def predicted_s(run: Published, constants: TimeConstants) -> float:
    """Return the predicted step time of a published run."""
    return step_time(Costs(run.job, run.machine, run.software, time=constants), run.candidate, run.stages).total


def errors(runs: Sequence[Published], constants: TimeConstants) -> Vector:
    """Return the logarithms of predicted over published time."""
    return np.array([np.log(predicted_s(run, constants) / (run.step_time_s or 1.0)) for run in runs])


def fit_time(runs: Sequence[Published], pairs: Sequence[Pair], *, rounds: int = 25) -> TimeConstants:
    """Return the most probable time constants."""
    prior = to_vector(PRIOR)
    spread = np.array([SPREADS.get(parameter.field, SPREAD) for parameter in parameters()])
    per_source = Counter(run.source for run in runs)
    # A source's rows share its errors: its weight grows with the square root of their number.
    weight = np.array(
        [per_source[run.source] ** -0.25 * (1 if run.is_whole else PARTLY_KNOWN) for run in runs]
    )
    weight /= weight.mean() * NOISE

    def residuals(vector: Vector) -> Vector:
        constants = to_constants(vector)
        data = weight * errors(runs, constants)
        ratios = np.array([np.log(pair.predicted(constants) / pair.speed_up) / PAIR_NOISE for pair in pairs])
        return np.concatenate([_soft(data), ratios, (vector - prior) / spread])

    return to_constants(_least_squares(residuals, prior, rounds))


def _soft(values: Vector) -> Vector:
    """Return residuals whose squares grow linearly beyond one: sign(r) sqrt(2 (sqrt(1 + r^2) - 1))."""
    return np.sign(values) * np.sqrt(2 * (np.sqrt(1 + values**2) - 1))


def _least_squares(residuals: Callable[[Vector], Vector], start: Vector, rounds: int) -> Vector:
    """Return the minimum of the sum of squares: Gauss-Newton steps, damped until they help (Levenberg-Marquardt)."""
    point, damping = start.copy(), 1e-2
    value = residuals(point)
    for _ in range(rounds):
        step = 1e-4
        columns = [(residuals(point + step * unit) - value) / step for unit in np.eye(len(point))]
        jacobian = np.stack(columns, axis=1)
        normal, slope = jacobian.T @ jacobian, jacobian.T @ value
        while damping < 1e6:
            trial = point - np.linalg.solve(normal + damping * np.diag(np.diag(normal)), slope)
            trial_value = residuals(trial)
            if trial_value @ trial_value < value @ value:
                break
            damping *= 4
        else:
            return point
        gained = value @ value - trial_value @ trial_value
        point, value, damping = trial, trial_value, damping / 4
        if gained < 1e-4:
            break
    return point


def fit_memory(runs: Sequence[Published]) -> MemoryConstants:
    """Return the memory constants that misjudge the fewest layouts; a layout wrongly said to fit counts twice."""
    best: tuple[float, MemoryConstants] | None = None
    grid = itertools.product((1.0, 1.5, 2.0), (0.0, 0.01, 0.02), (0.1, 0.15, 0.2, 0.25), (8.0, 10.0, 12.0))
    for context, rounding, fragmentation, norm in grid:
        constants = replace(
            MEMORY, context_gib=context, rounding=rounding, fragmentation=fragmentation, eager_norm_bytes=norm
        )
        wrong = [fits(run, constants) - run.fits for run in runs]
        score = sum(2 if one > 0 else 1 for one in wrong if one)
        if best is None or score < best[0]:
            best = (score, constants)
    assert best is not None, "the grid is not empty"
    return best[1]


def fits(run: Published, constants: MemoryConstants) -> bool:
    """Say whether a published layout is predicted to fit."""
    stages = [
        memory_of(run.job, run.candidate, stage, software=run.software, constants=constants)
        for stage in run.stages
    ]
    return max(one.total for one in stages) <= run.machine.device.memory_gib * GIB


def with_time(runs: Sequence[Published]) -> list[Published]:
    """Return the rows that have a step time."""
    return [run for run in runs if run.fits and run.step_time_s]


def main() -> int:
    """Fit, and print constants and errors."""
    left_out = sys.argv[sys.argv.index("--without") + 1] if "--without" in sys.argv else None
    runs = read_runs()
    if left_out is None:
        calibration, rest = split(runs)
    else:
        calibration = [run for run in runs if run.source != left_out]
        rest = [run for run in runs if run.source == left_out]
    constants = fit_time(with_time(calibration), read_pairs())
    memory = (
        fit_memory([run for run in calibration if run.source == "Hagemann"]) if left_out is None else MEMORY
    )
    for parameter in parameters():
        print(f"{parameter.name:28} {parameter.of(PRIOR):10.4g} -> {parameter.of(constants):.4g}")
    print(f"\nMEMORY = {memory}\n\nTIME = {constants}\n")
    for name, some in (("calibration", calibration), ("the rest", rest)):
        off = np.abs(np.expm1(errors(with_time(some), constants)))
        print(
            f"{name}: {len(off)} step times, MAPE {100 * off.mean():.1f} %, median {100 * np.median(off):.1f} %"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
