"""The crops of a clip in an epoch: they cover as much of it as crops of that length can, whatever crop 0 draws."""

from __future__ import annotations

from functools import cache
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.data.crops import start_beside
from trainer.data.order import Order, draw

draws = st.integers(0, 2**64 - 1)


def covered(starts: list[int], segment: int) -> int:
    return len({frame for start in starts for frame in range(start, start + segment)})


@cache
def most_covered_beside(first: int, crops: int, segment: int, available: int) -> int:
    """The most frames that `crops` crops, one of them at `first`, can cover together: every placement is tried."""
    best = 0

    def place(least: int, count: int, starts: list[int]) -> None:
        nonlocal best
        if count == 0:
            best = max(best, covered([first, *starts], segment))
            return
        for start in range(least, available - segment + 1):
            place(start, count - 1, [*starts, start])

    place(0, crops - 1, [])
    return best


@given(
    segment=st.integers(1, 4), available=st.integers(1, 13), first=st.integers(0, 12),
    numbers=st.lists(draws, min_size=13, max_size=13),
)
@settings(max_examples=300, derandomize=True, deadline=None)
def test_no_placement_beside_crop_0_covers_more(segment: int, available: int, first: int, numbers: list[int]):
    crops = min(available // segment, 4)
    available = min(available, crops * segment + segment - 1)
    if crops < 1:
        return
    first = min(first, available - segment)
    starts = [first] + [
        start_beside(first, numbers[crop], crop, crops=crops, segment=segment, available=available)
        for crop in range(1, crops)
    ]
    assert all(0 <= start <= available - segment for start in starts)
    assert covered(starts, segment) == most_covered_beside(first, crops, segment, available)


def check_any_order(frames: int, views: list[int], segment: int, seed: int, epoch: int) -> None:
    lengths = np.array([[frames - shorter for shorter in views]])
    order = Order(
        seed=seed, epochs=1, global_batch=1, segment_frames=segment, codebooks=4, caption_drop_rate=0,
        frames=lengths, by_duration=True,
    )
    crops = max(1, int(lengths.min()) // segment)
    rows = [draw(order, epoch, 0, crop) for crop in range(crops)]
    assert order.crops_per_epoch == order.crops_of(0) == crops
    assert all(0 <= row.start <= row.start + row.frames <= lengths[0, row.view] for row in rows)
    assert all(row.frames == min(lengths[0, row.view], segment) for row in rows)
    starts = sorted(row.start for row in rows)
    overlaps = [max(0, before + segment - after) for before, after in pairwise(starts)]
    # Both sides of crop 0 together lack at most a segment for one crop more, and the side that lacks less gets it.
    assert sum(overlaps) <= segment / 2
    alone = draw(Order(**{**vars_of(order), "by_duration": False}), epoch, 0)
    assert rows[0] == alone


def vars_of(order: Order) -> dict:
    return {name: getattr(order, name) for name in Order.__dataclass_fields__}


any_order = given(
    frames=st.integers(2, 100_000), views=st.lists(st.integers(0, 1), min_size=1, max_size=4),
    segment=st.integers(1, 1_500), seed=st.integers(0, 2**32 - 1), epoch=st.integers(0, 100),
)


@any_order
@settings(max_examples=60, derandomize=True, deadline=None)
def test_crops_overlap_by_half_a_segment_in_all_at_most_and_crop_0_is_that_of_sample_by_file(
    frames, views, segment, seed, epoch
):
    check_any_order(min(frames, 60 * segment), views, segment, seed, epoch)


@pytest.mark.full
@any_order
@settings(max_examples=2_000, deadline=None)
def test_crops_overlap_by_half_a_segment_in_all_at_most_in_thousands_of_orders(frames, views, segment, seed, epoch):
    check_any_order(min(frames, 300 * segment), views, segment, seed, epoch)
