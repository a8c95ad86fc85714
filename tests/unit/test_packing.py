"""Global best-fit decreasing: the fast form equals the textbook's, loses nothing and is deterministic."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megaswift.data.packing import pack
from megaswift.errors import DataError


def textbook_best_fit_decreasing(lengths: list[int], capacity: int) -> list[list[int]]:
    """Place each length, longest first, into the fullest bin that holds it."""
    bins: list[list[int]] = []
    for length in sorted(lengths, reverse=True):
        rooms = [
            (capacity - sum(content), i)
            for i, content in enumerate(bins)
            if capacity - sum(content) >= length
        ]
        if rooms:
            bins[min(rooms)[1]].append(length)
        else:
            bins.append([length])
    return bins


def as_multiset(bins: list[list[int]]) -> list[tuple[int, ...]]:
    return sorted(tuple(sorted(content)) for content in bins)


def packed_lengths(lengths: np.ndarray, capacity: int) -> list[list[int]]:
    packs = pack(lengths, capacity)
    return [lengths[packs[i]].tolist() for i in range(len(packs))]


@settings(max_examples=300, deadline=None)
@given(
    st.integers(1, 60).flatmap(
        lambda capacity: st.tuples(st.just(capacity), st.lists(st.integers(1, capacity), max_size=80))
    )
)
def test_the_bins_are_those_of_the_textbook(case):
    capacity, lengths = case
    assert as_multiset(packed_lengths(np.array(lengths, np.int64), capacity)) == as_multiset(
        textbook_best_fit_decreasing(lengths, capacity)
    )


@pytest.mark.parametrize("seed", range(5))
def test_the_bins_are_those_of_the_textbook_for_long_tailed_lengths(seed):
    lengths = np.clip(np.random.default_rng(seed).lognormal(4, 1, 700), 1, 512).astype(np.int64)
    assert as_multiset(packed_lengths(lengths, 512)) == as_multiset(
        textbook_best_fit_decreasing(lengths.tolist(), 512)
    )


def test_every_sample_is_in_one_pack_and_no_pack_overflows():
    lengths = np.random.default_rng(0).integers(1, 1000, 5000)
    packs = pack(lengths, 1000)
    assert np.array_equal(np.sort(packs.items), np.arange(5000))
    assert max(lengths[packs[i]].sum() for i in range(len(packs))) <= 1000
    assert packs.fill == pytest.approx(lengths.sum() / (len(packs) * 1000))


def test_packs_of_more_than_65536_bins_and_tokens_are_right():
    lengths = np.full(70_000, 40_000)
    lengths[::2] = 90_000
    packs = pack(lengths, 131_072)
    assert len(packs) == 35_000
    assert all(sorted(lengths[packs[i]]) == [40_000, 90_000] for i in range(0, 35_000, 500))


def test_packing_is_the_same_twice():
    lengths = np.random.default_rng(1).integers(1, 64, 2000)
    first, second = pack(lengths, 64), pack(lengths, 64)
    assert np.array_equal(first.items, second.items) and np.array_equal(first.starts, second.starts)


def test_a_sample_that_fits_in_no_pack_is_an_error():
    with pytest.raises(DataError, match="packing_length=8 cannot hold a sample of 9 tokens"):
        pack(np.array([3, 9]), 8)


def test_an_empty_set_has_no_packs():
    packs = pack(np.array([], np.int64), 8)
    assert len(packs) == 0 and packs.fill == 1.0


@pytest.mark.slow
def test_a_million_samples_fill_their_packs():
    lengths = np.clip(np.random.default_rng(0).lognormal(5.48, 1, 1_000_000), 1, 4096).astype(np.int64)
    packs = pack(lengths, 4096)
    assert packs.fill > 0.9999
