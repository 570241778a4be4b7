"""How much of a step is padding, with micro-batches of equally many clips, with those that are cut by length, and with
those of the fewest cells, whatever ranks then wait for.

Counted, not measured: lengths are drawn uniformly, the same in every run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from benchmarks.parts import Settings
from benchmarks.report import Row as Found
from trainer.data.cut import Cut, cut_for, fewest_places, micro_batches
from trainer.data.order import Order, Row
from trainer.spec.shapes import FRAME_RATE_HZ

# The shortest and the longest clip of the steps, and the longest of the data set, of which the rehearsed micro-batch is
# made: no other one has more places.
SECONDS = ((2, 30, 30), (4, 8, 8), (4, 8, 30), (30, 30, 30))
GLOBAL_BATCHES, MICRO_BATCHES, RANKS = (8, 64), (4, 16), (1, 2, 8)
NAMES = ("before", "after", "fewest")
STEPS, SEGMENT_FRAMES, CODEBOOKS, TOKENS = 200, 30 * FRAME_RATE_HZ, 4, 20


def padding(settings: Settings) -> list[Found]:
    """A row for each kind of data set and layout; nothing of the settings matters."""
    return [
        {"case": "padding", "seconds": f"{lengths[0]}-{lengths[1]} of {lengths[2]}"}
        | _counted(lengths, batch, micro, ranks)
        for lengths in SECONDS
        for batch, micro, ranks in _layouts()
    ]


def _layouts() -> Iterator[tuple[int, int, int]]:
    """Global batch, micro-batch, ranks; the micro-batch is no larger than a rank's share of the step."""
    for batch in GLOBAL_BATCHES:
        for ranks in RANKS:
            for micro in sorted({min(micro, batch // ranks) for micro in MICRO_BATCHES}):
                yield batch, micro, ranks


def _counted(seconds: tuple[int, int, int], batch: int, micro: int, ranks: int) -> Found:
    """The shares of padding, and of padding or waiting, of equal slices (before), of micro-batches as they are (after),
    and of those with the fewest cells (fewest)."""
    shortest, longest, longest_of_all = seconds
    random = np.random.default_rng(0)
    lengths = random.integers(shortest * FRAME_RATE_HZ, longest * FRAME_RATE_HZ + 1, (STEPS, batch))
    order = Order(
        seed=0, epochs=1, global_batch=batch, segment_frames=SEGMENT_FRAMES, codebooks=CODEBOOKS, caption_drop_rate=0.0,
        frames=np.array([[longest_of_all * FRAME_RATE_HZ]]),
    )  # fmt: skip
    cut = cut_for(order, micro_batch=micro, accumulation=batch // (micro * ranks), world_size=ranks, row_places=TOKENS)
    totals = np.zeros(6)
    for of_step in lengths:
        rows = [
            Row(clip=clip, epoch=0, view=0, start=0, frames=int(frames), drop_caption=False)
            for clip, frames in enumerate(sorted(of_step, reverse=True))
        ]
        slices = [rows[first : first + micro] for first in range(0, batch, micro)]
        shares = [micro_batches(rows, cut, rank) for rank in range(ranks)]
        by_length = [one for at_once in zip(*shares, strict=True) for one in at_once]
        for number, groups in enumerate((slices, by_length, _of_fewest_cells(rows, cut))):
            totals[2 * number : 2 * number + 2] += _cells(groups, ranks)
    shares_of_none = 1 - lengths.sum() / totals
    return {
        "global_batch": batch,
        "micro_batch": micro,
        "ranks": ranks,
        **{f"padding_{name}": share for name, share in zip(NAMES, shares_of_none[::2], strict=True)},
        **{f"padding_or_waiting_{name}": share for name, share in zip(NAMES, shares_of_none[1::2], strict=True)},
    }


def _of_fewest_cells(rows: Sequence[Row], cut: Cut) -> list[Sequence[Row]]:
    """As many micro-batches as there are of equal slices, with the fewest places; the largest first."""
    places = cut.places(rows)
    count = cut.world_size * cut.accumulation
    starts = fewest_places(places, count, cut.most_places)
    groups = [rows[start:end] for start, end in zip(starts, [*starts[1:], len(rows)], strict=True)]
    return sorted(groups, key=lambda group: -len(group) * cut.places(group[:1])[0])


def _cells(groups: Sequence[Sequence[Row]], ranks: int) -> tuple[int, int]:
    """What is computed of these micro-batches, in steps of rows, and what is computed or waited for, where the first
    `ranks` of them are computed at one time, then the next."""
    cells = [len(rows) * min(rows[0].frames + CODEBOOKS - 1, SEGMENT_FRAMES) for rows in groups]
    return sum(cells), ranks * sum(max(cells[first : first + ranks]) for first in range(0, len(cells), ranks))
