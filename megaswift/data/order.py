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
    start = _mix(
        _mix(np.array([seed % 2**64], np.uint64) + GOLDEN_GAMMA) + np.array([stream % 2**64], np.uint64)
    )
    keys = _mix(start + np.arange(1, count + 1, dtype=np.uint64) * GOLDEN_GAMMA)
    return np.argsort(keys, kind="stable").astype(np.int64)
