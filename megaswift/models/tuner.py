"""What a tuner does once the weights are there."""

from collections.abc import Sequence

import torch

from megaswift.config.tuner import TunerConfig
from megaswift.models.lora import start_magnitudes
from megaswift.models.nf4 import quantise_base
from megaswift.models.weight_starts import start_from_weights


def finish_tuner(
    chunks: Sequence[torch.nn.Module], tuner: TunerConfig, *, device: torch.device, seed: int, fresh: bool
) -> None:
    """Quantise the base, and start what follows from it; every rank of the world calls it.

    `fresh` says that adapters are not about to be read. Raises ConfigError where quantising or starting cannot be done.
    """
    if tuner.init_weights == "loftq" and fresh:
        start_from_weights(chunks, tuner, device=device, seed=seed)  # while the weights are whole
    if tuner.quant_bits:
        quantise_base(chunks, tuner, device=device)
    start_magnitudes(chunks)
    if tuner.starts_from_weights and tuner.init_weights != "loftq" and fresh:
        start_from_weights(chunks, tuner, device=device, seed=seed)
