"""Learning a word: the numbers of one process under every strategy, nothing else moves, any strategy continues."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.ranks.cases import Numbers, differences, steps
from tests.ranks.harness import run_ranks
from tests.rounding import LOSS, NORM

pytestmark = pytest.mark.numbers
STEPS = 8
FLAGS = {"tune_text": True, "placeholder_vectors": 4, "lr": 0.5}  # a rate at which the losses feel the rows
STRATEGIES = ("ddp", "zero2", "zero3", "fsdp")
QUICK = {"fsdp"}
ROWS_BYTES = 4 * 4 * 512


def learned(world_size: int, strategy: str, **named: Any) -> list[Numbers]:
    return run_ranks(world_size, steps, strategy, 1, flags=named.pop("flags", FLAGS), **named)


@cache
def reference() -> Numbers:
    return learned(1, "single", count=STEPS)[0]


def marked(strategies: tuple[str, ...]) -> list[Any]:
    return [name if name in QUICK else pytest.param(name, marks=pytest.mark.full) for name in strategies]


@pytest.mark.parametrize("strategy", marked(STRATEGIES))
def test_losses_are_those_of_one_process_and_neither_t5_nor_the_decoder_moves(strategy: str) -> None:
    found = learned(2, strategy, count=STEPS)
    loss, norm = differences(found[0], reference())
    assert loss <= LOSS and norm <= NORM
    for numbers in (reference(), *found):
        assert numbers.frozen > 60 and numbers.moved == []
    shards = 1 if strategy == "ddp" else 2
    moments = 12 if strategy.startswith("zero") else 8
    assert [numbers.optimizer_bytes for numbers in found] == [moments * ROWS_BYTES / 4 / shards] * 2


@pytest.mark.full
def test_rows_that_do_not_learn_would_be_seen() -> None:
    unmoved = learned(1, "single", count=STEPS, flags={**FLAGS, "lr": 1e-9})[0]
    assert differences(unmoved, reference())[0] > 1e-4


@pytest.mark.full
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_one_row_on_two_ranks_is_learned_too(strategy: str) -> None:
    flags = {**FLAGS, "placeholder_vectors": 1}
    alone, found = learned(1, "single", count=3, flags=flags)[0], learned(2, strategy, count=3, flags=flags)[0]
    assert differences(found, alone)[0] <= LOSS


@pytest.mark.full
@pytest.mark.parametrize("strategy", ("single", *STRATEGIES))
def test_bf16_stays_near_float32(strategy: str) -> None:
    found = learned(1 if strategy == "single" else 2, strategy, count=STEPS, precision="bf16")[0]
    assert differences(found, reference())[0] <= 2e-3


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("ddp", "fsdp"),
        *(
            pytest.param(before, after, marks=pytest.mark.full)
            for before in STRATEGIES
            for after in STRATEGIES
            if (before, after) != ("ddp", "fsdp")
        ),
    ],
)
def test_any_strategy_continues_what_another_saved(before: str, after: str, tmp_path: Path) -> None:
    learned(2, before, count=3, folder=str(tmp_path), save_at=3)
    found = learned(2, after, count=3, folder=str(tmp_path))[0]
    undisturbed = Numbers(losses=reference().losses[3:6], norms=reference().norms[3:6])
    assert len(found.losses) == 3 and differences(found, undisturbed)[0] <= LOSS
