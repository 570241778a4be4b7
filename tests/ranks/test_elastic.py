"""A checkpoint saved under one strategy and number of ranks continues under any other as if nothing had happened."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.ranks.cases import Numbers, differences, part_of, steps, undisturbed
from tests.ranks.harness import run_ranks
from tests.rounding import LOSS, NORM

pytestmark = pytest.mark.numbers
SAVED = ("ddp", "zero2", "zero3", "fsdp")
RESUMED = [("single", 1)] + [(strategy, n) for strategy in ("ddp", "zero2", "zero3", "fsdp") for n in (1, 2, 3, 4)]
QUICK = {
    ("zero2", "fsdp", 2),
    ("zero2", "single", 1),
    ("fsdp", "zero2", 3),
    ("zero3", "ddp", 2),
    ("ddp", "zero3", 2),
}


@pytest.fixture(scope="module")
def reference() -> Numbers:
    """Steps 6 to 10 of the undisturbed run."""
    return part_of(undisturbed()[0], 5, 10)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders with a checkpoint after step 5, by the strategy that saved it on 2 ranks."""
    made: dict[str, Path] = {}

    def folder(strategy: str) -> Path:
        if strategy not in made:
            made[strategy] = tmp_path_factory.mktemp(strategy)
            run_ranks(2, steps, strategy, 1, count=5, folder=str(made[strategy]), save_at=5)
        return made[strategy]

    return folder


@pytest.mark.parametrize(
    "before,after,world_size",
    [
        case if case in QUICK else pytest.param(*case, marks=pytest.mark.full)
        for case in [(before, after, n) for before in SAVED for after, n in RESUMED]
    ],
)
def test_five_further_steps_are_those_of_an_undisturbed_run(before, after, world_size, saved, reference):
    found = run_ranks(world_size, steps, after, 1, count=5, folder=str(saved(before)))[0]
    loss, norm = differences(found, reference)
    assert len(found.losses) == 5 and loss <= LOSS and norm <= NORM


@pytest.mark.parametrize(
    "strategy", ["zero2", "fsdp", *(pytest.param(other, marks=pytest.mark.full) for other in ("ddp", "zero3"))]
)
def test_the_same_layout_continues_bit_for_bit(strategy, saved):
    found = run_ranks(2, steps, strategy, 1, count=5, folder=str(saved(strategy)))[0]
    whole = part_of(undisturbed(strategy, 2)[0], 5, 10)
    assert (found.losses, found.norms) == (whole.losses, whole.norms)
