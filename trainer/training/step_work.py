"""What an optimizer step computes: its rows on all ranks, and this rank's micro-batches, made ahead by a thread."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from trainer.data.batches import Batch, Examples, prefetched
from trainer.data.cut import Cut, micro_batches
from trainer.data.order import Order, Row, rows_of_step, valid_cells


@dataclass(frozen=True, kw_only=True)
class StepWork:
    """One optimizer step.

    step     counted from 0
    rows     of all ranks
    batches  the micro-batches of them that are this rank's
    cells_K  (K,) int64, the codes of all rows that each codebook learns to predict
    """

    step: int
    rows: Sequence[Row]
    batches: Sequence[Batch]
    cells_K: np.ndarray


def work_of(order: Order, cut: Cut, examples: Examples, rank: int, start_step: int) -> Iterator[StepWork]:
    """The steps from `start_step` to the end of the order.

    Drawing rows, cutting them and reading them is all done by the thread: while one step is computed, it makes the
    next one whole.
    """

    def made(step: int) -> StepWork:
        rows = rows_of_step(order, step)
        return StepWork(
            step=step,
            rows=rows,
            batches=[examples.batch(own) for own in micro_batches(rows, cut, rank)],
            cells_K=valid_cells(rows, order.codebooks, order.segment_frames, order.channels),
        )

    return prefetched(range(start_step, order.steps), made, ahead=1)
