"""Flat ranges as rectangles: exact, in order, few."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megapoly.checkpoint.state import rectangles


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple), st.data())
def test_rectangles_hold_the_range_in_order(shape: tuple[int, ...], data: st.DataObject) -> None:
    size = torch.Size(shape).numel()
    begin = data.draw(st.integers(0, size))
    end = data.draw(st.integers(begin, size))
    whole = torch.arange(size).view(shape)
    parts = list(rectangles(shape, begin, end))
    flat = [whole[tuple(slice(o, o + s) for o, s in zip(*part, strict=True))].flatten() for part in parts]
    assert torch.cat([torch.empty(0, dtype=torch.long), *flat]).tolist() == list(range(begin, end))
    assert len(parts) <= 2 * len(shape) - 1
    assert all(0 not in sizes for _, sizes in parts)


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_equal_ranges_tile_a_matrix(ranks: int) -> None:
    shape, times = (6, 11), torch.zeros(6, 11)
    borders = [66 * r // ranks for r in range(ranks + 1)]
    for begin, end in itertools.pairwise(borders):
        for offsets, sizes in rectangles(shape, begin, end):
            times[tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))] += 1
    assert (times == 1).all()
