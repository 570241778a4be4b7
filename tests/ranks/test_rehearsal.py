"""Both passes of the rehearsal leave no trace in any number, under every strategy."""

from __future__ import annotations

from typing import Any

import pytest

from tests.ranks.cases import LENGTHS, SEGMENT, Numbers, steps
from tests.ranks.harness import run_ranks
from tests.synthetic import random_examples
from trainer.data.order import Row


class Rehearsal:
    """Rehearses before the first step, and counts passes."""

    def __init__(self) -> None:
        self._done = False

    def __call__(self, engine: Any) -> None:
        if self._done:
            return
        self._done = True
        row = Row(clip=LENGTHS.index(40), epoch=0, view=0, start=0, frames=SEGMENT, drop_caption=False)
        batch, counted, step = random_examples(LENGTHS, segment_frames=SEGMENT).batch([row]), [], engine.step
        engine.step = lambda *arguments, **named: counted.append(1) or step(*arguments, **named)
        time = engine.rehearse(batch, 2)
        engine.step = step
        assert len(counted) == 2 and time.compute > 0 and time.update > 0


def numbers(strategy: str, watch: Any) -> Numbers:
    return steps(strategy, 2, count=4, watch=watch, ema_decay=0.9)


@pytest.mark.full
@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "zero2", "zero3"])
def test_two_passes_of_a_rehearsal_change_no_bit_of_the_steps(strategy):
    plain, rehearsed = (run_ranks(2, numbers, strategy, watch) for watch in (None, Rehearsal()))
    for without, with_passes in zip(plain, rehearsed, strict=True):
        assert with_passes.losses == without.losses and with_passes.norms == without.norms
