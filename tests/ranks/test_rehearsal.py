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


def numbers(strategy: str, once: bool, watch: Any) -> Numbers:
    gathers = once and strategy == "fsdp"
    return steps(strategy, 2, count=4, watch=watch, ema_decay=0.9, gathers_once=gathers, reduces_once=once)


@pytest.mark.full
@pytest.mark.parametrize(
    "strategy,once", [*((name, False) for name in ("ddp", "fsdp", "zero2", "zero3")), ("fsdp", True), ("zero2", True)]
)
def test_two_passes_of_a_rehearsal_change_no_bit_of_the_steps(strategy, once):
    """`once`: weights are gathered, and gradients reduced, once for a step."""
    plain, rehearsed = (run_ranks(2, numbers, strategy, once, watch) for watch in (None, Rehearsal()))
    for without, with_passes in zip(plain, rehearsed, strict=True):
        assert with_passes.losses == without.losses and with_passes.norms == without.norms
