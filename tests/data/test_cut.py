"""Micro-batches cut by length: the fewest places, every row once, and never more than the rehearsed micro-batch."""

from __future__ import annotations

from collections import Counter
from itertools import combinations, pairwise

import numpy as np
import pytest

from trainer.data.cut import Cut, cut_for, fewest_places, filled_micro_batches, micro_batches, smallest_bound
from trainer.data.order import Order, Row

# ranks, rows of a micro-batch, the most micro-batches of a rank
LAYOUTS = [(1, 8, 1), (1, 4, 2), (1, 3, 5), (2, 2, 2), (2, 4, 1), (4, 1, 3), (3, 3, 1), (8, 4, 2)]
DRAWS = 6  # steps of drawn lengths for each layout


def rows_of(frames: list[int]) -> list[Row]:
    return [
        Row(clip=clip, epoch=0, view=0, start=0, frames=length, drop_caption=False)
        for clip, length in enumerate(sorted(frames, reverse=True))
    ]


def cut_of(world_size: int, micro_batch: int, accumulation: int, longest: int = 60, row_places: int = 7) -> Cut:
    order = Order(
        seed=0, epochs=1, global_batch=1, segment_frames=50, codebooks=4, caption_drop_rate=0.0,
        frames=np.array([[longest], [5]]),
    )  # fmt: skip
    return cut_for(
        order, micro_batch=micro_batch, accumulation=accumulation, world_size=world_size, row_places=row_places
    )


def drawn_frames(random: np.random.Generator, layout: tuple[int, int, int]) -> list[int]:
    """Of as many rows as the layout holds at most, or of fewer; some runs have many equal rows."""
    rows = int(random.integers(1, np.prod(layout) + 1))
    return random.integers(2, random.choice([4, 20, 51]), rows).tolist()


def all_of(frames: list[int], cut: Cut) -> list[list[list[Row]]]:
    return [micro_batches(rows_of(frames), cut, rank) for rank in range(cut.world_size)]


def cost(batch: list[Row], cut: Cut) -> int:
    """By hand: rows x (frames of the longest, the delays' tail as far as the segment has room, and the text)."""
    return len(batch) * (min(max(row.frames for row in batch) + 3, 50) + cut.row_places)


def by_trying_all(places: list[int], count: int, bound: int) -> tuple[int, int] | None:
    """The fewest places of all cuts, and the smallest largest group of those that have them."""
    found = []
    for inner in combinations(range(1, len(places)), count - 1):
        ends = [0, *inner, len(places)]
        sizes = [(end - start) * places[start] for start, end in pairwise(ends)]
        if max(sizes) <= bound:
            found.append((sum(sizes), max(sizes)))
    return min(found, default=None)


def test_no_cut_has_fewer_places_or_of_equally_many_a_smaller_largest_micro_batch():
    random, refused = np.random.default_rng(0), 0
    for _ in range(400):
        rows = int(random.integers(1, 11))
        count = int(random.integers(1, rows + 1))
        places = sorted(random.integers(1, random.choice([3, 20, 100]), rows).tolist(), reverse=True)
        bound = -(-rows // count) * places[0] + int(random.integers(-places[0], 20))
        expected = by_trying_all(places, count, bound)
        if expected is None:
            refused += 1
            with pytest.raises(ValueError, match=f"{rows} rows cannot be cut into {count} groups of at most {bound}"):
                fewest_places(np.array(places), count, bound)
            continue
        ends = [*fewest_places(np.array(places), count, bound), rows]
        sizes = [(end - start) * places[start] for start, end in pairwise(ends)]
        assert (sum(sizes), max(sizes)) == expected and ends[0] == 0 and len(ends) == count + 1
        least = smallest_bound(np.array(places), count)
        assert by_trying_all(places, count, least) and not by_trying_all(places, count, least - 1)
    assert 20 < refused < 200


def test_many_rows_are_cut_as_a_slow_obvious_version_cuts_them():
    """Here the decisions from coarse to fine have three levels; trying all cuts would take for ever."""
    random = np.random.default_rng(1)
    places = np.sort(random.integers(20, 400, 300))[::-1].astype(np.int64)
    count, bound = 40, 8 * 400
    best: dict[int, tuple[int, int]] = {0: (0, 0)}
    for _ in range(count):
        after: dict[int, tuple[int, int]] = {}
        for start, (total, largest) in best.items():
            first = int(places[min(start, 299)])  # of all 300 rows there is nothing left to begin with
            for end in range(start + 1, min(300, start + bound // first) + 1):
                size = (end - start) * first
                found = (total + size, max(largest, size))
                after[end] = min(after.get(end, found), found)
        best = after
    starts = fewest_places(places, count, bound)
    sizes = np.diff([*starts, 300]) * places[starts]
    assert (sizes.sum(), sizes.max()) == best[300]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_row_comes_once_on_one_rank_and_all_ranks_have_as_many_micro_batches_as_slices_would_be(layout):
    random, cut = np.random.default_rng(2), cut_of(*layout)
    for _ in range(DRAWS):
        frames = drawn_frames(random, layout)
        shares = all_of(frames, cut)
        wanted = filled_micro_batches(len(frames), micro_batch=cut.micro_batch, world_size=cut.world_size)
        assert [len(share) for share in shares] == [wanted] * cut.world_size
        assert wanted == -(-len(frames) // (layout[0] * layout[1])) <= cut.accumulation
        counted = Counter(row for share in shares for batch in share for row in batch if row.weight)
        assert counted == Counter(rows_of(frames))
        assert all(batch for share in shares for batch in share)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("row_places", [1, 7, 300])
def test_no_micro_batch_has_more_places_than_the_rehearsed_one_whatever_a_row_costs_besides(layout, row_places):
    """Nor more steps: bytes per place and bytes per step are each bounded, for any number up to row_places."""
    random, cut = np.random.default_rng(3), cut_of(*layout, row_places=row_places)
    assert cut.most_places == layout[1] * (50 + row_places)
    more_rows = 0
    for _ in range(DRAWS):
        for share in all_of(drawn_frames(random, layout), cut):
            for batch in share:
                assert cost(batch, cut) <= cut.most_places
                steps = cost(batch, cut) - len(batch) * row_places
                assert all(steps + len(batch) * fewer <= layout[1] * (50 + fewer) for fewer in range(row_places))
                more_rows += len(batch) > layout[1]
    assert more_rows or layout not in [(1, 4, 2), (8, 4, 2)] or row_places == 300


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_step_takes_no_longer_than_with_equal_slices(layout):
    """Its time is that of the largest micro-batch of those which the ranks compute together, one round after another.
    Slices of equally many rows, where they fill their micro-batches."""
    random, cut, gained = np.random.default_rng(4), cut_of(*layout), 0
    world_size, micro_batch, accumulation = layout
    for _ in range(DRAWS):
        frames = random.integers(2, random.choice([4, 20, 51]), world_size * micro_batch * accumulation).tolist()
        found = sum(max(cost(batch, cut) for batch in at_once) for at_once in zip(*all_of(frames, cut), strict=True))
        rows = rows_of(frames)
        slices = [rows[first : first + micro_batch] for first in range(0, len(rows), micro_batch)]
        sliced = sum(cost(batch, cut) for batch in slices[::world_size])
        assert found <= sliced
        gained += found < sliced
    assert gained or world_size * accumulation == 1 or micro_batch == 1


def test_ranks_get_micro_batches_of_one_size_together_and_the_largest_first():
    frames = [50] * 4 + [30] * 4 + [10] * 16 + [5] * 8
    shares = all_of(frames, cut_of(2, 4, 4))
    costs = [[cost(batch, cut_of(2, 4, 4)) for batch in share] for share in shares]
    dealt = [one for at_once in zip(*costs, strict=True) for one in at_once]
    assert dealt == sorted(dealt, reverse=True)


def test_equal_rows_are_cut_into_equal_micro_batches():
    assert [len(batch) for batch in micro_batches(rows_of([20] * 4), cut_of(1, 3, 2), 0)] == [2, 2]


def test_long_rows_are_few_and_short_rows_many():
    """A row costs its frames, 3 steps of tail and 7 places: 2 x 50 + 6 x 12 = 172 places; 4 x 50 + 4 x 12 = 248."""
    found = micro_batches(rows_of([40, 38, 2, 2, 2, 2, 2, 2]), cut_of(1, 4, 2), 0)
    assert [len(batch) for batch in found] == [2, 6]


@pytest.mark.parametrize("world_size,micro_batch,fillers", [(4, 2, 1), (4, 1, 1), (2, 1, 1), (2, 2, 0)])
def test_a_filler_is_the_shortest_row_alone_in_a_micro_batch_that_has_no_row(world_size, micro_batch, fillers):
    cut = cut_of(world_size, micro_batch, 4)
    batches = [batch for share in all_of([30, 20, 9], cut) for batch in share]
    filled = [batch for batch in batches if any(row.weight == 0 for row in batch)]
    assert len(filled) == fillers
    assert all([(row.frames, row.weight) for row in batch] == [(9, 0)] for batch in filled)


def test_more_rows_than_are_cut_at_once_are_cut_in_parts_and_each_comes_once(monkeypatch):
    monkeypatch.setattr("trainer.data.cut.MOST_ROWS", 60)
    random = np.random.default_rng(5)
    frames, cut = random.integers(2, 50, 200).tolist(), cut_of(3, 4, 17)
    shares = all_of(frames, cut)
    assert [len(share) for share in shares] == [-(-200 // 12)] * 3
    counted = Counter(row for share in shares for batch in share for row in batch if row.weight)
    assert counted == Counter(rows_of(frames))


def test_more_rows_than_the_layout_holds_are_refused():
    with pytest.raises(ValueError, match="7 rows do not fit 3 x 1 micro-batches of 2"):
        micro_batches(rows_of([9] * 7), cut_of(1, 2, 3), 0)
