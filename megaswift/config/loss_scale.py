"""--loss_scale: whose turns carry loss, and which parts of them how much."""

from megaswift.errors import ConfigError, nearest

BASES = ("default", "last_round", "all")
# Rules for parts of answers; data/part_weights.py has them.
PART_RULES = ("ignore_empty_think", "ignore_think_prefix", "hermes", "react", "alpha_umi", "qwen")


def split_loss_scale(text: str) -> tuple[str, tuple[str, ...]]:
    """Return whose turns carry loss and the rules for their parts, as BASE+RULE+RULE or without BASE; raises ConfigError."""
    first, *rules = text.split("+")
    base = first if first in BASES else "default"
    rules = rules if first in BASES else [first, *rules]
    for rule in rules:
        if rule not in PART_RULES:
            raise ConfigError(
                f"loss_scale={text} is not one of {', '.join(BASES)}, with rules added by +.{nearest(rule, (*BASES, *PART_RULES))}"
            )
    if len(set(rules)) < len(rules):
        raise ConfigError(f"loss_scale={text} names a rule twice.")
    return base, tuple(rules)
