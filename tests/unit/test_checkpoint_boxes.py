"""Flat ranges of tensors cut into boxes."""

from math import prod

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megaswift.checkpoint.state import boxes


@st.composite
def ranges(draw: st.DrawFn) -> tuple[tuple[int, ...], int, int]:
    shape = tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=4)))
    start = draw(st.integers(0, prod(shape)))
    return shape, start, draw(st.integers(start, prod(shape)))


@given(ranges())
def test_boxes_hold_exactly_the_range_in_flat_order(given: tuple[tuple[int, ...], int, int]) -> None:
    shape, start, stop = given
    whole = torch.arange(prod(shape)).view(shape)
    seen = []
    for box in boxes(shape, start, stop):
        part = whole[tuple(slice(o, o + s) for o, s in zip(box.offset, box.size, strict=True))].reshape(-1)
        assert box.start == len(seen)
        seen += part.tolist()
    assert seen == list(range(start, stop))


@pytest.mark.parametrize(
    ("shape", "start", "stop", "count"),
    [
        ((4, 6), 0, 24, 1),
        ((4, 6), 6, 18, 1),
        ((4, 6), 3, 20, 3),
        ((4, 6), 1, 4, 1),
        ((3, 4, 5), 1, 59, 5),
        ((4, 6), 7, 7, 0),
    ],
)
def test_boxes_are_as_few_as_rows_allow(shape: tuple[int, ...], start: int, stop: int, count: int) -> None:
    assert len(boxes(shape, start, stop)) == count
