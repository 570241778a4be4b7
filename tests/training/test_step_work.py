"""A step's work is made by another thread than the one that trains."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from tests.synthetic import random_examples
from trainer.data.cut import cut_for
from trainer.data.order import Order
from trainer.training import step_work


def test_the_thread_that_trains_draws_no_rows_cuts_none_and_reads_none(monkeypatch: pytest.MonkeyPatch) -> None:
    examples = random_examples([20, 8, 12], segment_frames=24)
    order = Order(
        seed=1, epochs=2, global_batch=2, segment_frames=24, codebooks=4, caption_drop_rate=0.0,
        frames=examples.codes.frames,
    )  # fmt: skip
    threads: dict[str, set[threading.Thread]] = {}

    def noted(holder: object, name: str) -> None:
        made = getattr(holder, name)

        def noting(*arguments: object, **named: object) -> object:
            threads.setdefault(name, set()).add(threading.current_thread())
            return made(*arguments, **named)

        monkeypatch.setattr(holder, name, noting)

    for name in ("rows_of_step", "micro_batches", "valid_cells"):
        noted(step_work, name)
    noted(type(examples), "batch")
    cut = cut_for(order, micro_batch=2, accumulation=1, world_size=1, row_places=5)
    works = list(step_work.work_of(order, cut, examples, rank=0, start_step=1))
    assert [work.step for work in works] == [1, 2]
    assert all(np.array_equal(work.cells_K, sum((one.labels_BKT >= 0).sum((0, 2)) for one in work.batches).numpy())
               for work in works)  # fmt: skip
    assert threads.keys() == {"rows_of_step", "micro_batches", "valid_cells", "batch"}
    assert all(len(of_one) == 1 and threading.current_thread() not in of_one for of_one in threads.values())
