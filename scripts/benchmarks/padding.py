"""How much of a step is padding, with micro-batches of equally many clips and with those that are cut by length.

Counted, not measured: lengths are drawn uniformly, the same in every run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from benchmarks.parts import Settings
from benchmarks.report import Row as Found
from trainer.data.cut import cut_for, micro_batches
from trainer.data.order import Order, Row
from trainer.spec.shapes import FRAME_RATE_HZ

SECONDS = ((2, 30), (4, 8), (30, 30))
GLOBAL_BATCHES, MICRO_BATCHES, RANKS = (8, 64), (4, 16), (1, 2, 8)
STEPS, SEGMENT_FRAMES, CODEBOOKS, TOKENS = 200, 30 * FRAME_RATE_HZ, 4, 20


def padding(settings: Settings) -> list[Found]:
    """A row for each kind of data set and layout; nothing of the settings matters."""
    return [
        {"case": "padding", "seconds": f"{shortest}-{longest}"} | _counted(shortest, longest, batch, micro, ranks)
        for shortest, longest in SECONDS
        for batch, micro, ranks in _layouts()
    ]


def _layouts() -> Iterator[tuple[int, int, int]]:
    """Global batch, micro-batch, ranks; the micro-batch is no larger than a rank's share of the step."""
    for batch in GLOBAL_BATCHES:
        for ranks in RANKS:
            for micro in sorted({min(micro, batch // ranks) for micro in MICRO_BATCHES}):
                yield batch, micro, ranks


def _counted(shortest: int, longest: int, batch: int, micro: int, ranks: int) -> Found:
    """The shares of padding, and of what is computed or waited for, before and after."""
    random = np.random.default_rng(0)
    lengths = random.integers(shortest * FRAME_RATE_HZ, longest * FRAME_RATE_HZ + 1, (STEPS, batch))
    order = Order(
        seed=0, epochs=1, global_batch=batch, segment_frames=SEGMENT_FRAMES, codebooks=CODEBOOKS, caption_drop_rate=0.0,
        frames=np.array([[longest * FRAME_RATE_HZ]]),
    )  # fmt: skip
    cut = cut_for(order, micro_batch=micro, accumulation=batch // (micro * ranks), world_size=ranks, row_places=TOKENS)
    totals = np.zeros(4)
    for of_step in lengths:
        rows = [
            Row(clip=clip, epoch=0, view=0, start=0, frames=int(frames), drop_caption=False)
            for clip, frames in enumerate(sorted(of_step, reverse=True))
        ]
        slices = [rows[first : first + micro] for first in range(0, batch, micro)]
        shares = [micro_batches(rows, cut, rank) for rank in range(ranks)]
        by_length = [one for at_once in zip(*shares, strict=True) for one in at_once]
        totals += (*_cells(slices, ranks), *_cells(by_length, ranks))
    padding_before, waiting_before, padding_after, waiting_after = 1 - lengths.sum() / totals
    return {
        "global_batch": batch,
        "micro_batch": micro,
        "ranks": ranks,
        "padding_before": padding_before,
        "padding_after": padding_after,
        "padding_or_waiting_before": waiting_before,
        "padding_or_waiting_after": waiting_after,
    }


def _cells(groups: Sequence[Sequence[Row]], ranks: int) -> tuple[int, int]:
    """What is computed of these micro-batches, in steps of rows, and what is computed or waited for, where the first
    `ranks` of them are computed at one time, then the next."""
    cells = [len(rows) * min(rows[0].frames + CODEBOOKS - 1, SEGMENT_FRAMES) for rows in groups]
    return sum(cells), ranks * sum(max(cells[first : first + ranks]) for first in range(0, len(cells), ranks))
