"""What A of a new adapter is drawn from; the starts that follow from weights are compared with peft in tests/distributed."""

import math

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora import Linear

from megaswift.config.tuner import TunerConfig
from megaswift.models.lora import _initial_a

RANK, INPUTS = 16, 8192


@pytest.mark.parametrize("how", ["true", "gaussian"])
def test_a_has_the_moments_of_pefts(how: str) -> None:
    torch.manual_seed(0)
    ours = _initial_a(
        TunerConfig(lora_rank=RANK, init_weights=how), RANK, INPUTS, torch.Generator().manual_seed(0)
    )
    settings = LoraConfig(r=RANK, init_lora_weights=True if how == "true" else how)
    theirs = Linear(torch.nn.Linear(INPUTS, 8), "default", config=settings, r=RANK).lora_A["default"].weight
    assert ours.shape == theirs.shape
    spread = float(theirs.std())
    assert abs(float(ours.std()) / spread - 1) < 0.02  # of 131,072 numbers: four standard errors are 0.008
    assert abs(float(ours.mean())) < 0.02 * spread
    # A uniform distribution ends at sqrt(3) standard deviations, a normal one goes on.
    assert (float(ours.abs().max()) > 3 * spread) == (how == "gaussian")
    assert (float(theirs.abs().max()) > 1.01 * math.sqrt(3) * spread) == (how == "gaussian")
