"""How the rows of a step are cut into micro-batches, so that little is computed for padding and ranks wait little.

The rows of a micro-batch are padded to its longest one. So rows are sorted by length, and a micro-batch is a run of
neighbours: of long rows few, of short ones many.

Lengths are counted in places. A row's are its decoder steps and a number that is the same for every row, which bounds
what the row's text and melody cost (`row_places` in trainer/plan/activations.py).

**Memory.** A micro-batch has at most as many places, rows x places of its longest, as the rehearsed one, in which
every row is the longest of the run. That bounds its bytes by those of the rehearsed one, because all of them are
linear in places or less (trainer/plan/activations.py):

- What layers keep and work with, and what the final norm keeps, is a number of bytes for each place.
- The logits are a number of bytes for each decoder step. With n rows of s steps beside m of S, n (s + c) <= m (S + c)
  and n >= m, it follows that n s <= m S; with n < m too, since s <= S. So c, the number that is the same for every
  row, may be too large, and never too small.
- Keys and values of the text in cross-attention are two or four values of the width for each layer and token, fewer
  than the 13 and more that a place has; states of the text fewer than a place has in all layers. So a token counts as
  a place. A T5 in the loop costs more: as many places more as its bytes come to.
- The text's mask in cross-attention has a cell for each step and token, and so grows with the steps, as logits do. Rows
  of melody models need none. Scores, where no fused kernel computes attention, are p x p for p places: n p <= m P and
  p <= P give n p p <= m P P.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from trainer.data.order import Order, Row, steps_of

MOST_ROWS = 4096  # More are cut in parts of about so many, because time and memory grow with rows x groups.
# Of several ranks: which bounds on the largest micro-batch are tried, as eighths of the way from the smallest that is
# possible to that of equal slices.
_EIGHTHS = (0, 1, 2, 4, 8)
# How many times as many row counts one pass of `_one_group_more` decides as the pass before it.
_FAN = 16
# Two numbers below 2^31 in one int64, which are compared one after the other.
_HIGH, _LOW = 32, 2**32 - 1


@dataclass(frozen=True, kw_only=True)
class Cut:
    """On what it depends how rows are cut, the same on every rank.

    micro_batch     rows of the rehearsed micro-batch; one of shorter rows may have more
    accumulation    the most micro-batches of a rank in a step
    largest_delay   of the codebooks, in steps
    segment_frames  the most frames of a row
    row_places      what a row costs besides its steps, in places
    most_steps      of a row of the rehearsed micro-batch
    """

    micro_batch: int
    accumulation: int
    world_size: int
    largest_delay: int
    segment_frames: int
    row_places: int
    most_steps: int

    @property
    def most_places(self) -> int:
        """Of the rehearsed micro-batch."""
        return self.micro_batch * (self.most_steps + self.row_places)

    def places(self, rows: Sequence[Row]) -> np.ndarray:
        """(rows,) int64: what one row of a micro-batch costs whose longest row is this one."""
        steps = [steps_of(row.frames, self.largest_delay, self.segment_frames) for row in rows]
        return np.array(steps, dtype=np.int64) + self.row_places


def cut_for(order: Order, *, micro_batch: int, accumulation: int, world_size: int, row_places: int) -> Cut:
    """The cut of a run's steps, whose rehearsed micro-batch has the longest rows of its order."""
    largest_delay = (order.codebooks - 1) // order.channels
    return Cut(
        micro_batch=micro_batch,
        accumulation=accumulation,
        world_size=world_size,
        largest_delay=largest_delay,
        segment_frames=order.segment_frames,
        row_places=row_places,
        most_steps=steps_of(int(order.frames.max()), largest_delay, order.segment_frames),
    )


def micro_batches(rows: Sequence[Row], cut: Cut, rank: int) -> list[list[Row]]:
    """This rank's micro-batches of a step: as many on every rank, and of all ranks together every row once.

    rows  sorted by length, longest first

    They are as many as slices of `micro_batch` rows would be, so that no rank communicates oftener
    (`filled_micro_batches`). On one rank, the computed places are the fewest of all cuts within the rehearsed
    micro-batch's places, and among equals the largest micro-batch is smallest. Several ranks begin each micro-batch
    together, and who has a small one waits: there, equal slices and the cuts that are so for several bounds on the
    largest micro-batch are tried, and the one is taken that has the fewest places computed or waited for. Micro-batches
    are dealt to the ranks by their size, so that those of one time are alike.

    Where there are fewer rows than micro-batches, the shortest row stands again, alone and with weight 0. Raises
    ValueError where the rows do not fit.
    """
    capacity = cut.micro_batch * cut.accumulation * cut.world_size
    if not 0 < len(rows) <= capacity:
        raise ValueError(
            f"{len(rows)} rows do not fit {cut.accumulation} x {cut.world_size} micro-batches of {cut.micro_batch}"
        )
    at_once = cut.micro_batch * cut.world_size
    part = max(1, MOST_ROWS // at_once) * at_once
    own = []
    for first in range(0, len(rows), part):
        groups = _groups(rows[first : first + part], cut)
        own += groups[rank :: cut.world_size]
    return own


def filled_micro_batches(rows: int, *, micro_batch: int, world_size: int) -> int:
    """How many micro-batches every rank has in a step of so many rows: as many as slices of `micro_batch` rows."""
    return math.ceil(rows / (micro_batch * world_size))


def _groups(rows: Sequence[Row], cut: Cut) -> list[list[Row]]:
    """The micro-batches of all ranks, largest first."""
    count = cut.world_size * filled_micro_batches(len(rows), micro_batch=cut.micro_batch, world_size=cut.world_size)
    padded = [*rows, *[replace(rows[-1], weight=0)] * (count - len(rows))]
    places = cut.places(padded)
    starts = _starts(places, count, cut)
    sizes = _sizes(places, starts)
    groups = [padded[start:end] for start, end in zip(starts, [*starts[1:], len(padded)], strict=True)]
    return [groups[index] for index in np.argsort(-sizes, kind="stable")]


def _starts(places: np.ndarray, count: int, cut: Cut) -> list[int]:
    if cut.world_size == 1:
        return fewest_places(places, count, cut.most_places)
    low, high = smallest_bound(places, count), cut.micro_batch * int(places[0])
    bounds = sorted({low + (high - low) * eighths // 8 for eighths in _EIGHTHS})
    equal_slices = [index * len(places) // count for index in range(count)]
    tried = [equal_slices, *(fewest_places(places, count, bound) for bound in bounds)]
    return min(tried, key=lambda starts: _waited_for(_sizes(places, starts), cut.world_size))


def _waited_for(sizes: np.ndarray, world_size: int) -> tuple[int, int]:
    """The places that one rank computes or waits for in a step, and those that all ranks compute."""
    return int(np.sort(sizes)[::-1][::world_size].sum()), int(sizes.sum())


def _sizes(places: np.ndarray, starts: Sequence[int]) -> np.ndarray:
    """(groups,) int64: rows of each group x places of its longest row."""
    return np.diff([*starts, len(places)]) * places[list(starts)]


def smallest_bound(places: np.ndarray, count: int) -> int:
    """The least places that the largest of `count` groups can have."""

    def fits(bound: int) -> bool:
        reach, end = (np.arange(len(places)) + bound // places).tolist(), 0
        for _ in range(count):
            if end >= len(places):
                break
            end = reach[end]
        return end >= len(places)

    low, high = int(places[0]), -(-len(places) // count) * int(places[0])
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle + 1, high)
    return low


def fewest_places(places: np.ndarray, count: int, bound: int) -> list[int]:
    """Where each of `count` groups of neighbours begins, so that their places are fewest and none has more than
    `bound`; among equals, so that the largest is smallest.

    places  (rows,) int64, falling; a group of n rows that begins with row i has n x places[i]

    Exact, by dynamic programming over groups and over how many rows they have together. Raises ValueError where no cut
    is within the bound.
    """
    rows = len(places)
    refusal = f"{rows} rows cannot be cut into {count} groups of at most {bound} places"
    if not 0 < count <= rows or places[0] > bound:
        raise ValueError(refusal)
    # Up to which row a group reaches at most that begins with each; and from which row on, one that ends before each.
    reach = np.arange(rows) + bound // places
    earliest = np.searchsorted(reach, np.arange(rows + 1))
    # The rows that the first groups have together, at most and at least, if the others are to take the rest.
    most, least = [0], [rows]
    for _ in range(count):
        most.append(min(rows, int(reach[min(most[-1], rows - 1)])))
        least.append(int(earliest[least[-1]]))
    least.reverse()
    if most[-1] < rows:
        raise ValueError(refusal)
    first, keys, tables = 0, np.zeros(1, np.int64), []
    for group in range(1, count + 1):
        ends = np.arange(max(group, least[group]), min(most[group], rows - count + group) + 1)
        keys, begins = _one_group_more(keys, first, ends, places, earliest)
        first = int(ends[0])
        tables.append((first, begins))
    starts = [rows]
    for first, begins in reversed(tables):
        starts.append(int(begins[starts[-1] - first]))
    return starts[:0:-1]


def _one_group_more(
    before: np.ndarray, first: int, ends: np.ndarray, places: np.ndarray, earliest: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The best cuts of the rows before each of `ends`, given those with one group fewer.

    before   int64: of the cuts of the first `first`, `first` + 1, ... rows, the places of all groups in the high bits,
             and those of the largest in the low ones
    returns  the same for `ends`, and where the last group begins

    The later the end, the later the last group begins: for falling places, cost (i, j) = (j - i) places[i] has Monge's
    quadrangle inequality, and its maximum with other groups does not change which of two equals wins. So the ends are
    decided coarse to fine, each between its neighbours that are decided already. Source: Galil and Park, Dynamic
    programming with convexity, concavity and sparsity, 1992.
    """
    lowest = np.maximum(earliest[ends], first)
    highest = np.minimum(ends - 1, first + len(before) - 1)
    keys, begins = np.empty(len(ends), np.int64), np.empty(len(ends), np.int64)
    stride = _FAN ** max(0, math.ceil(math.log(len(ends), _FAN)) - 1)
    decided = np.zeros(0, np.int64)
    while stride:
        todo = np.arange(0, len(ends), stride)
        low, high = lowest[todo], highest[todo]
        if len(decided):
            todo = todo[todo % (stride * _FAN) != 0]
            block = todo // (stride * _FAN)
            low = np.maximum(lowest[todo], begins[decided][block])
            limits = np.append(begins[decided], highest[-1])
            high = np.minimum(highest[todo], limits[block + 1])
        if len(todo):
            keys[todo], begins[todo] = _best_begins(before, first, ends[todo], low, high, places)
        decided = np.arange(0, len(ends), stride)
        stride //= _FAN
    return keys, begins


def _best_begins(
    before: np.ndarray, first: int, ends: np.ndarray, low: np.ndarray, high: np.ndarray, places: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """For each end, the best of the begins from `low` to `high`, and of equals the last one."""
    counts = high - low + 1
    offsets = np.cumsum(counts) - counts
    begins = np.arange(counts.sum()) - np.repeat(offsets - low, counts)
    size = (np.repeat(ends, counts) - begins) * places[begins]
    earlier = before[begins - first]
    keys = ((earlier >> _HIGH) + size << _HIGH) | np.maximum(earlier & _LOW, size)
    best = np.minimum.reduceat(keys, offsets)
    hits = np.flatnonzero(keys == np.repeat(best, counts))
    return best, begins[hits[np.searchsorted(hits, offsets + counts) - 1]]
