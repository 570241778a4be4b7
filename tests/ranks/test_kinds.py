"""Stereo and melody models train under every strategy as in one process, and continue under any other."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.fsdp import FSDPModule

from tests.ranks.cases import LENGTHS, SEGMENT, Numbers, differences, part_of, steps
from tests.ranks.harness import run_ranks
from tests.rounding import LOSS, NORM
from tests.synthetic import random_examples
from trainer.data.order import Row
from trainer.spec.shapes import KNOWN

pytestmark = pytest.mark.numbers
KINDS = ("debug-stereo", "debug-melody", "debug-stereo-melody")
STRATEGIES = ("ddp", "zero2", "zero3", "fsdp")
COUNT, SAVED_AFTER = 4, 2
# Strategy, kind and accumulation: each strategy and each kind once at least.
QUICK = {
    ("ddp", "debug-stereo-melody", 2),
    ("zero2", "debug-melody", 1),
    ("fsdp", "debug-stereo", 2),
}
CASES = [(strategy, kind, accumulation) for strategy in STRATEGIES for kind in KINDS for accumulation in (1, 2)]
RESUMED = [("single", 1), *((strategy, 2) for strategy in STRATEGIES)]
ELASTIC = [(kind, before, after, n) for kind in KINDS for before in STRATEGIES for after, n in RESUMED]
# Other ways to train: what `steps` is told.
PARTS: dict[str, dict[str, Any]] = {
    "recomputed": {"checkpointing": True},
    "frozen projections": {"flags": {"freeze": "projection,layers.0"}},
    "adapters": {"flags": {"lora_rank": 4}},
    "a word": {"flags": {"tune_text": True, "placeholder_vectors": 4, "lr": 0.5}},
    "an average": {"ema_decay": 0.9},
}


class BatchMates:
    """After the first step, writes the losses of rows that are computed alone and among others to a file of the rank,
    and how many modules FSDP shards by themselves."""

    def __init__(self, kind: str, folder: Path):
        self._kind, self._folder, self._calls = kind, folder, 0

    def __call__(self, engine: Any) -> None:
        self._calls += 1
        if self._calls != 2:
            return
        examples = random_examples(LENGTHS, segment_frames=SEGMENT, model=self._kind)
        rows = [  # of 40, 5, 40 and 33 frames and of 3, 2, 0 and 5 words
            Row(clip=1, epoch=0, view=0, start=0, frames=40, drop_caption=False),
            Row(clip=0, epoch=0, view=1, start=0, frames=5, drop_caption=False, drop_melody=True),
            Row(clip=2, epoch=0, view=0, start=7, frames=40, drop_caption=False),
            Row(clip=3, epoch=0, view=0, start=0, frames=33, drop_caption=True, drop_melody=True),
        ]
        losses = []
        for index, row in enumerate(rows):
            among = [*rows[:index], row, *rows[index + 1 :]]
            # Of its mates the loss is not counted, all else is as in a step.
            weighted = [Row(**{**vars(mate), "weight": int(mate is row)}) for mate in among]
            alone, counted = (engine.evaluate([examples.batch(batch)])[0] for batch in ([row], weighted))
            losses.append([alone, counted])
        sharded = sum(isinstance(module, FSDPModule) for module in engine.backend.model.modules())
        torch.save((torch.tensor(losses), sharded), self._folder / f"{engine.ranks.rank}.pt")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A kind's run under a strategy: the numbers of its ranks, and the folder with its checkpoint of step SAVED_AFTER
    and the losses of rows with and without batch-mates."""

    @cache
    def made(strategy: str, kind: str, accumulation: int = 1) -> tuple[list[Numbers], Path]:
        folder, ranks = tmp_path_factory.mktemp(f"{kind}-{strategy}"), 1 if strategy == "single" else 2
        watch = BatchMates(kind, folder)
        saving = {"folder": str(folder), "save_at": SAVED_AFTER}
        return run_ranks(ranks, steps, strategy, accumulation, model=kind, count=COUNT, watch=watch, **saving), folder

    return made


def marked(cases: list[Any], quick: set[Any]) -> list[Any]:
    return [case if case in quick else pytest.param(*case, marks=pytest.mark.full) for case in cases]


@pytest.mark.parametrize("strategy,kind,accumulation", marked([*CASES, *(("single", k, 2) for k in KINDS)], QUICK))
def test_every_split_gives_the_numbers_of_one_process(strategy, kind, accumulation, run):
    (reference, *_), _ = run("single", kind)
    found, folder = run(strategy, kind, accumulation)
    assert len(found[0].losses) == COUNT and found[0].losses[-1] < found[0].losses[0]
    assert all(numbers.losses == found[0].losses for numbers in found)
    loss, norm = differences(found[0], reference)
    assert loss <= LOSS and norm <= NORM
    for rank in range(len(found)):  # a row's loss does not depend on its batch-mates either
        losses, sharded = torch.load(folder / f"{rank}.pt")
        alone, among = losses.sum(dim=-1).unbind(dim=1)
        assert len(alone) == 4 and torch.allclose(among, alone, rtol=1e-6, atol=0)
        assert sharded == (1 + KNOWN[kind].layers if strategy == "fsdp" else 0)


@pytest.mark.parametrize("kind,before,after,world_size", marked(ELASTIC, set()))
def test_any_strategy_continues_what_another_saved(kind, before, after, world_size, run, tmp_path):
    (reference, *_), _ = run("single", kind)
    _, folder = run(before, kind)
    further = COUNT - SAVED_AFTER
    found = run_ranks(world_size, steps, after, 1, model=kind, count=further, folder=str(folder))[0]
    loss, norm = differences(found, part_of(reference, SAVED_AFTER, COUNT))
    assert len(found.losses) == further and loss <= LOSS and norm <= NORM


@pytest.mark.full
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_same_layout_continues_bit_for_bit(strategy, kind, run):
    (whole, *_), folder = run(strategy, kind)
    found = run_ranks(2, steps, strategy, 1, model=kind, count=COUNT - SAVED_AFTER, folder=str(folder))[0]
    undisturbed = part_of(whole, SAVED_AFTER, COUNT)
    assert (found.losses, found.norms) == (undisturbed.losses, undisturbed.norms)


@pytest.mark.full
@pytest.mark.parametrize(
    "ranks,strategy,named", [(4, "hsdp", {"nodes": 2}), (4, "zero3", {}), (2, "zero2", {"offload": True})], ids=str
)
def test_replicas_more_ranks_and_an_offloaded_optimizer_give_them_too(ranks, strategy, named, run):
    (reference, *_), _ = run("single", "debug-stereo-melody")
    found = run_ranks(ranks, steps, strategy, 1, model="debug-stereo-melody", count=COUNT, **named)[0]
    loss, norm = differences(found, reference)
    assert loss <= LOSS and norm <= NORM


@pytest.mark.full
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_bf16_stays_near_float32(strategy, run):
    (reference, *_), _ = run("single", "debug-stereo-melody")
    found = run_ranks(2, steps, strategy, 1, model="debug-stereo-melody", count=COUNT, precision="bf16")[0]
    loss, norm = differences(found, reference)
    assert 0 < loss <= 2e-3 and norm <= 1e-2  # as for text models, see tests/ranks/test_equal_numbers.py


@cache
def one_process(kind: str, part: str) -> Numbers:
    return run_ranks(1, steps, "single", 1, model=kind, count=COUNT, **PARTS[part])[0]


@pytest.mark.full
@pytest.mark.parametrize(
    "strategy,kind", [*((strategy, KINDS[2]) for strategy in STRATEGIES), *(("fsdp", kind) for kind in KINDS[:2])]
)
@pytest.mark.parametrize("part", PARTS)
def test_parts_that_are_trained_and_what_is_recomputed_give_the_numbers_of_one_process(part, strategy, kind):
    found = run_ranks(2, steps, strategy, 2, model=kind, count=COUNT, **PARTS[part])[0]
    loss, norm = differences(found, one_process(kind, part))
    assert loss <= LOSS and norm <= NORM and found.moved == []
    frozen = part not in ("recomputed", "an average")
    assert (found.frozen > 0) == frozen
