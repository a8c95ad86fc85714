"""Random order as a function of (seed, stream, index) alone: the same on every rank, machine and numpy version."""

import numpy as np

# Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014, and Vigna's splitmix64.c
GOLDEN_GAMMA = np.uint64(0x9E3779B97F4A7C15)
MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
MIX_2 = np.uint64(0x94D049BB133111EB)


def _mix(values: np.ndarray) -> np.ndarray:
    values = (values ^ (values >> np.uint64(30))) * MIX_1
    values = (values ^ (values >> np.uint64(27))) * MIX_2
    return values ^ (values >> np.uint64(31))


def shuffled(count: int, *, seed: int, stream: int) -> np.ndarray:
    """Return a permutation of range(count), int64; `stream` is an epoch or names a purpose.

    Every index gets a 64-bit key from splitmix64 over (seed, stream, index); the order is that of the keys.
    """
    return np.argsort(_keys(0, count, seed=seed, stream=stream), kind="stable").astype(np.int64)


def long_first(order: np.ndarray, lengths: np.ndarray, *, window: int) -> np.ndarray:
    """Return an order of items with each next `window` of them from long to short; equally long ones stay as they were."""
    parts = [order[start : start + window] for start in range(0, len(order), window)]
    return np.concatenate([part[np.argsort(-lengths[part], kind="stable")] for part in parts])


def uniform(start: int, count: int, *, seed: int, stream: int) -> np.ndarray:
    """Return numbers `start` to `start + count` of an endless sequence, float64 in [0, 1)."""
    return (_keys(start, count, seed=seed, stream=stream) >> np.uint64(11)) * 2.0**-53  # what a float64 holds


def _keys(start: int, count: int, *, seed: int, stream: int) -> np.ndarray:
    origin = _mix(
        _mix(np.array([seed % 2**64], np.uint64) + GOLDEN_GAMMA) + np.array([stream % 2**64], np.uint64)
    )
    numbers = np.arange(start + 1, start + count + 1, dtype=np.uint64)
    keys: np.ndarray = _mix(origin + numbers * GOLDEN_GAMMA)
    return keys
