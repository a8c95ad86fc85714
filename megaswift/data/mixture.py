"""Which rows of the sets are trained on and which validate, in which order: a function of counts, settings and seed."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from megaswift.config.data import DataConfig
from megaswift.data.order import shuffled, uniform
from megaswift.errors import DataError
from megaswift.logs import get_logger

logger = get_logger(__name__)

# Streams of the order below 0 name purposes; epochs count from 0.
SAMPLING_STREAM = -1
SPLIT_STREAM = -2
SET_STREAM = -(2**32)  # less the number of the set: in which order interleaving takes its rows
CHOICE_STREAM = -(2**33)  # less the epoch: which set comes next
FIRST_BLOCK = 4096  # choices drawn at once, doubled until the end is among them


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Rows by their numbers, counted through the training sets and then the validation sets."""

    train: np.ndarray  # int64, in the order of the rows
    val: np.ndarray


def select(
    train: Sequence[int],
    val: Sequence[int],
    config: DataConfig,
    *,
    seed: int,
    drawn: np.ndarray | None = None,
) -> Selection:
    """Return which rows train and which validate, given how many each set has; raises DataError for a ratio that takes all.

    --split_dataset_ratio is taken off first, so that no row is on both sides; --interleave_prob then mixes what is left.
    `drawn` (int64) says which row each of the training rows is where some come several times: such a row validates once.
    """
    drawn = np.arange(sum(train)) if drawn is None else drawn
    _, firsts, row_of = np.unique(drawn, return_index=True, return_inverse=True)
    total = len(firsts)
    held_back = round(config.split_dataset_ratio * total)
    if config.split_dataset_ratio and not 0 < held_back < total:
        raise DataError(
            f"split_dataset_ratio={config.split_dataset_ratio} of {total} rows leaves {total - held_back} to "
            f"train on and {held_back} to validate. Choose a ratio that leaves at least one row on each side."
        )
    validates = np.zeros(total, bool)
    validates[shuffled(total, seed=seed, stream=SPLIT_STREAM)[:held_back]] = True
    own = np.arange(sum(train), sum(train) + sum(val))
    return Selection(
        train=_mixed(_by_set(train, ~validates[row_of]), config, seed=seed),
        val=np.concatenate([own, firsts[validates]]).astype(np.int64),
    )


def draw(count: int, wanted: int, *, seed: int) -> list[int]:
    """Return `wanted` indices below `count` in rising order: whole repeats of the set, then a random rest."""
    repeats, rest = divmod(wanted, count)
    drawn = list(range(count)) * repeats
    return drawn + sorted(shuffled(count, seed=seed, stream=SAMPLING_STREAM)[:rest].tolist())


def choices(start: int, count: int, shares: Sequence[float], *, seed: int, epoch: int = 0) -> np.ndarray:
    """Return which set each of `count` rows comes from, beginning with row `start` of the epoch; int64."""
    bounds = np.cumsum(shares) / sum(shares)
    numbers = uniform(start, count, seed=seed, stream=CHOICE_STREAM - epoch)
    return np.searchsorted(bounds[:-1], numbers, side="right").astype(np.int64)


def interleaved(counts: Sequence[int], shares: Sequence[float], *, strategy: str, seed: int) -> np.ndarray:
    """Return the set of every row of one epoch, int64: it ends where a set is asked for more rows than it has.

    With strategy "first_exhausted" that is the first set to be asked so; with "all_exhausted" the last one, and the others
    begin again. The k-th row of a set is row k modulo its count.
    """
    block = FIRST_BLOCK
    while True:
        chosen = choices(0, block, shares, seed=seed)
        asked = [np.flatnonzero(chosen == number) for number in range(len(counts))]
        ends = [int(at[count]) for at, count in zip(asked, counts, strict=True) if len(at) > count]
        if strategy == "first_exhausted" and ends:
            return chosen[: min(ends)]
        if len(ends) == len(counts):
            return chosen[: max(ends)]
        block *= 2


def log_mixture(names: Sequence[str], counts: Sequence[int], chosen: np.ndarray) -> None:
    """Say how many rows of each set an epoch takes, and how many of them are different."""
    owner = np.searchsorted(np.cumsum(counts), chosen, side="right")
    different = np.searchsorted(np.cumsum(counts), np.unique(chosen), side="right")
    parts = [
        f"{(owner == number).sum()} rows of {name} ({(different == number).sum()} of its {count})"
        for number, (name, count) in enumerate(zip(names, counts, strict=True))
    ]
    logger.info("interleaving: an epoch takes %s", ", ".join(parts))


def shares_of(config: DataConfig) -> list[float]:
    """Return --interleave_prob as numbers; empty where sets follow each other."""
    return [float(word) for word in config.interleave_prob]


def _by_set(counts: Sequence[int], kept: np.ndarray) -> list[np.ndarray]:
    bounds = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    return [np.arange(start, end)[kept[start:end]] for start, end in pairwise(bounds)]


def _mixed(sets: list[np.ndarray], config: DataConfig, *, seed: int) -> np.ndarray:
    shares = shares_of(config)
    if not shares:
        return np.concatenate(sets).astype(np.int64)
    if not all(map(len, sets)):
        raise DataError(
            "interleave_prob: all rows of a set are held back for validation. Lower --split_dataset_ratio or leave the set out."
        )
    if config.dataset_shuffle:  # or an epoch that ends early would never see the end of a file
        orders = (
            shuffled(len(rows), seed=seed, stream=SET_STREAM - number) for number, rows in enumerate(sets)
        )
        sets = [rows[order] for rows, order in zip(sets, orders, strict=True)]
    chosen = interleaved([len(rows) for rows in sets], shares, strategy=config.stopping_strategy, seed=seed)
    mixed = np.empty(len(chosen), np.int64)
    for number, rows in enumerate(sets):
        places = np.flatnonzero(chosen == number)
        mixed[places] = rows[np.arange(len(places)) % len(rows)]
    return mixed
