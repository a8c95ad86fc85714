"""Settings: which parameters full training leaves as they are."""

from dataclasses import dataclass

from megaswift.config.field import setting


@dataclass(frozen=True, kw_only=True)
class FreezeConfig:
    """What --tuner_type full freezes; what is trainable by name is opened again afterwards.

    Names are those of the tensors in the safetensors, such as model.layers.0.mlp.up_proj.weight; what matches none of them is
    tried on Megatron's names, such as decoder.layers.0.mlp.linear_fc1.weight.
    """

    freeze_parameters: list[str] = setting(
        [],
        "full training leaves tensors as they are whose names start with one of these, such as model.embed_tokens or "
        "model.layers.1. (with its dot: model.layers.1 is the start of model.layers.10 too)",
    )
    freeze_parameters_regex: str | None = setting(None, "and those in whose names this expression is found")
    freeze_parameters_ratio: float = setting(
        0.0,
        "and this share of the parameters, counted from the embedding upwards in whole modules; 1: all of them",
    )
    trainable_parameters: list[str] = setting(
        [], "of frozen tensors, those train whose names start with one of these"
    )
    trainable_parameters_regex: str | None = setting(
        None, "and those in whose names this expression is found"
    )

    @property
    def chooses(self) -> bool:
        """Say whether anything is frozen or opened by name or share."""
        return self != FreezeConfig()
