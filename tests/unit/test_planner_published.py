"""The planner against published runs that did not calibrate it, and the calibration itself."""

import numpy as np
import pytest

from megaswift.planner.calibration import MEMORY, TIME
from tests.harness.bench_plan import TARGETS, choices, memory_errors, report, time_errors, verdicts
from tests.harness.fit_plan import fit_memory, fit_time, parameters, with_time
from tests.harness.fp8_pairs import read_pairs
from tests.harness.published import Published, read_runs, split


@pytest.fixture(scope="module")
def runs() -> list[Published]:
    """Every row that can be predicted."""
    return read_runs()


def test_calibration_and_held_out_rows_share_no_configuration(runs: list[Published]) -> None:
    calibration, held_out = split(runs)
    assert len(calibration) + len(held_out) == len(runs)
    assert not {run.configuration for run in calibration} & {run.configuration for run in held_out}
    assert 0.4 < len(held_out) / len(runs) < 0.6


def test_every_target_is_met_on_held_out_rows(
    runs: list[Published], capsys: pytest.CaptureFixture[str]
) -> None:
    _, held_out = split(runs)
    figures = report(runs, held_out)
    assert {name: value for name, value in figures.items() if value > TARGETS[name]} == {}
    assert "pooled" in capsys.readouterr().out


def test_held_out_rows_are_as_many_as_the_table_claims(runs: list[Published]) -> None:
    _, held_out = split(runs)
    assert len(time_errors(held_out).values) > 100
    assert len(memory_errors(held_out).values) >= 15
    assert verdicts(held_out).judged > 150
    assert len(choices(runs)) == 4


def test_a_worse_model_would_miss_the_targets(runs: list[Published]) -> None:
    _, held_out = split(runs)
    timed = [run for run in with_time(held_out) if run.is_whole and run.is_pretraining]
    times = np.array([run.step_time_s for run in timed])
    rates = np.array([1.0 / run.machine.num_devices for run in timed])
    constant = np.exp(np.mean(np.log(times / rates))) * rates  # one rate for everything
    assert np.mean(np.abs(constant / times - 1)) > 0.5


def test_fp8_speed_ups_are_those_published() -> None:
    pairs = read_pairs()
    ratios = [pair.predicted(TIME) / pair.speed_up for pair in pairs]
    assert float(np.mean(np.abs(np.array(ratios) - 1))) < 0.07


@pytest.mark.slow
def test_the_constants_are_what_fitting_the_calibration_rows_gives(runs: list[Published]) -> None:
    calibration, _ = split(runs)
    fitted = fit_time(with_time(calibration), read_pairs())
    for parameter in parameters():
        assert parameter.of(TIME) == pytest.approx(parameter.of(fitted), rel=0.02), parameter.name
    assert fit_memory([run for run in calibration if run.source == "Hagemann"]) == MEMORY
