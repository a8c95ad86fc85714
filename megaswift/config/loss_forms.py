"""Which forms a loss of preferences has, and how several make one."""

from megaswift.config.preference import PreferenceConfig
from megaswift.errors import ConfigError

# rlhf_type -> its forms of the loss, the default first
LOSS_TYPES: dict[str, tuple[str, ...]] = {
    "dpo": (
        "sigmoid",
        "ipo",
        "hinge",
        "robust",
        "sigmoid_norm",
        "exo_pair",
        "discopop",
        "nca_pair",
        "bco_pair",
        "sppo_hard",
        "apo_zero",
        "apo_down",
        "sft",
    ),
    "orpo": (),
    "simpo": (),
    "cpo": ("sigmoid", "hinge", "ipo"),
    "kto": ("kto", "apo_zero_unpaired"),
    "rm": (),
    "grpo": ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "fipo", "real"),
    "gkd": (),
}

CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "fipo")  # forms of grpo with PPO's clipped objective
JUDGE_ALONE = frozenset({"nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down"})  # forms of dpo


def weighted_forms(chosen: PreferenceConfig) -> list[tuple[str, float]]:
    """Return the forms of a loss and their weights; raises ConfigError where there are more or fewer numbers."""
    forms = (
        (chosen.loss_type or LOSS_TYPES[chosen.rlhf_type][0]).split() if LOSS_TYPES[chosen.rlhf_type] else []
    )
    if not chosen.loss_weights:
        return [(form, 1.0) for form in forms]
    if len(chosen.loss_weights) != len(forms):
        raise ConfigError(
            f"loss_weights has {len(chosen.loss_weights)} numbers for {len(forms)} forms: {' '.join(forms)}. Give one each."
        )
    try:
        return [(form, float(word)) for form, word in zip(forms, chosen.loss_weights, strict=True)]
    except ValueError:
        raise ConfigError(f"loss_weights={' '.join(chosen.loss_weights)} are not numbers.") from None
