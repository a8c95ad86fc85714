"""Rules between the settings that say which rows come in which order."""

from math import isclose

from megaswift.config.data import DataConfig
from megaswift.config.run import RunConfig
from megaswift.errors import ConfigError


def every_set_has_its_share(run: RunConfig) -> None:
    """Interleaving draws each row from one of the sets, by shares that add up to 1."""
    data = run.data
    if not data.interleave_prob:
        if data.stopping_strategy != DataConfig().stopping_strategy:
            raise ConfigError(
                f"stopping_strategy={data.stopping_strategy} needs --interleave_prob: without it sets follow each other."
            )
        return
    text = " ".join(data.interleave_prob)
    try:
        shares = [float(word) for word in data.interleave_prob]
    except ValueError:
        raise ConfigError(
            f"interleave_prob={text} is not a list of numbers. Write --interleave_prob 0.7 0.3."
        ) from None
    if len(shares) != len(data.dataset):
        raise ConfigError(
            f"interleave_prob={text} has {len(shares)} shares for {len(data.dataset)} sets. Give one for each --dataset."
        )
    if not all(share > 0 for share in shares) or not isclose(sum(shares), 1, abs_tol=1e-6):
        raise ConfigError(
            f"interleave_prob={text} adds up to {sum(shares):g}. Give shares above 0 that add up to 1."
        )
