"""Settings: full training of a few layers at a time."""

from dataclasses import dataclass

from megaswift.config.field import setting


@dataclass(frozen=True, kw_only=True)
class LisaConfig:
    """Layerwise importance sampled AdamW: Pan et al. 2024, LISA (arXiv 2403.17919)."""

    lisa_activated_layers: int = setting(
        0,
        "decoder layers that train at a time, drawn at random, beside the embedding, the final norm and the output layer; only "
        "they have gradients and optimizer state (LISA, arXiv 2403.17919); 0: all of them",
    )
    lisa_step_interval: int = setting(20, "optimizer steps between two draws")
