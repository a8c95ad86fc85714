"""Learning-rate schedules against their formulas."""

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from megaswift.config.optimizer import OptimizerConfig
from megaswift.errors import ConfigError
from megaswift.training.schedule import build_schedule, warmup_steps

PEAK, FLOOR, STEPS = 1e-3, 1e-4, 10


def rates(**settings: Any) -> list[float]:
    optimizer = SimpleNamespace(param_groups=[{"params": []}])
    config = OptimizerConfig(**{"lr": PEAK, "min_lr": FLOOR, **settings})
    schedule = build_schedule(optimizer, config, total_steps=STEPS)
    found = []
    for _ in range(STEPS):
        found.append(optimizer.param_groups[0]["lr"])
        schedule.step(1)
    return found


def test_cosine_falls_from_the_peak_towards_the_floor() -> None:
    expected = [
        FLOOR + (PEAK - FLOOR) * 0.5 * (math.cos(math.pi * step / STEPS) + 1) for step in range(STEPS)
    ]
    assert rates(lr_decay_style="cosine") == pytest.approx(expected)


def test_linear_falls_evenly() -> None:
    assert rates(lr_decay_style="linear") == pytest.approx(
        [PEAK - (PEAK - FLOOR) * step / STEPS for step in range(STEPS)]
    )


def test_constant_stays() -> None:
    assert rates(lr_decay_style="constant") == pytest.approx([PEAK] * STEPS)


def test_inverse_square_root_follows_the_warm_up() -> None:
    found = rates(lr_decay_style="inverse-square-root", lr_warmup_iters=4)
    assert found[:5] == pytest.approx([PEAK * step / 4 for step in range(5)])
    assert found[5:] == pytest.approx([PEAK * math.sqrt(4 / step) for step in range(5, STEPS)])


def test_wsd_stays_at_the_peak_until_its_last_phase() -> None:
    found = rates(lr_decay_style="WSD", lr_wsd_decay_iters=4, lr_wsd_decay_style="linear")
    assert found[:7] == pytest.approx([PEAK] * 7)
    assert found[7:] == pytest.approx([FLOOR + (PEAK - FLOOR) * left / 4 for left in (3, 2, 1)])


def test_warm_up_climbs_from_its_start() -> None:
    found = rates(lr_decay_style="constant", lr_warmup_iters=4, lr_warmup_init=2e-4)
    assert found[:5] == pytest.approx([2e-4 + 8e-4 * step / 4 for step in range(5)])


def test_warm_up_fraction_is_rounded_up_and_leaves_a_step() -> None:
    config = OptimizerConfig(lr=PEAK, lr_warmup_fraction=0.03)
    assert warmup_steps(config, decay_steps=100) == 3
    assert warmup_steps(config, decay_steps=10) == 1
    assert warmup_steps(config, decay_steps=1) == 0


def test_a_warm_up_longer_than_the_run_is_refused() -> None:
    with pytest.raises(ConfigError, match="lr_warmup_iters=10 but the learning rate decays over 10 steps"):
        warmup_steps(replace(OptimizerConfig(), lr_warmup_iters=10), decay_steps=10)
