"""Every rank computes with the first one's table of positions, which is sent before the steps and not at every one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ranks.cases import LENGTHS, SEGMENT, Numbers, differences, steps
from tests.ranks.harness import run_ranks
from tests.rounding import LOSS, NORM
from tests.synthetic import random_examples
from trainer.data.order import Row


class Tables:
    """Saves this rank's table before the first step and after each; the second rank marks a row that no step reads."""

    def __init__(self, folder: Path):
        self._folder, self._calls = folder, 0

    def __call__(self, engine: Any) -> None:
        table = next(value for name, value in engine.backend.model.named_buffers() if "embed_positions" in name)
        torch.save(table.clone(), self._folder / f"{engine.ranks.rank}-{self._calls}.pt")
        if self._calls == 0 and engine.ranks.rank == 1:
            table[-1] = 7
        self._calls += 1


def steps_on_another_processor(strategy: str, watch: Any, **named: Any) -> Numbers:
    """On the second rank sines come out a little larger."""
    from transformers.models.musicgen.modeling_musicgen import MusicgenSinusoidalPositionalEmbedding as OfText
    from transformers.models.musicgen_melody.modeling_musicgen_melody import (
        MusicgenMelodySinusoidalPositionalEmbedding as OfMelody,
    )

    if os.environ.get("RANK") == "1":
        plain = OfText.get_embedding
        OfText.get_embedding = OfMelody.get_embedding = staticmethod(lambda *sizes: plain(*sizes) * (1 + 1e-6))
    return steps(strategy, 1, count=2, watch=watch, **named)


@pytest.mark.parametrize(
    "strategy", ["ddp", *(pytest.param(other, marks=pytest.mark.full) for other in ("fsdp", "zero2", "zero3"))]
)
def test_the_first_ranks_table_is_sent_once(strategy, tmp_path):
    run_ranks(2, steps_on_another_processor, strategy, Tables(tmp_path))
    first, second = ([torch.load(tmp_path / f"{rank}-{call}.pt") for call in range(3)] for rank in range(2))
    assert torch.equal(first[0], second[0]) and first[0].abs().max() <= 1, "not the first one's"
    for call in (1, 2):
        assert torch.equal(first[call], first[0])
        assert torch.equal(second[call][:-1], first[0][:-1]) and (second[call][-1] == 7).all(), "it was sent again"


# A caption of 1900 words, the melody's 235 places and the codes need more places than the table of 2048 has.
LONG = ["word " * 1900, *([None, "a few words"] * len(LENGTHS))][: len(LENGTHS)]
PLACES = 235 + 1900 + SEGMENT


class Rehearsed:
    """Rehearses the row of most places before the first step, and saves this rank's table then and after each step.

    Without `places` the table grows as transformers has it, in the rehearsal's forward.
    """

    def __init__(self, folder: Path, places: int = PLACES):
        self._folder, self._places, self._calls = folder, places, 0

    def __call__(self, engine: Any) -> None:
        if self._calls == 0:
            examples = random_examples(LENGTHS, LONG, segment_frames=SEGMENT, model="debug-melody")
            row = Row(clip=0, epoch=0, view=0, start=0, frames=LENGTHS[0], drop_caption=False)
            engine.rehearse(examples.batch([row]), 1, self._places)
        table = engine._model.decoder.model.decoder.embed_positions.weights
        torch.save(table.clone(), self._folder / f"{engine.ranks.rank}-{self._calls}.pt")
        self._calls += 1


def grown(strategy: str, folder: Path, ranks: int = 2, **named: Any) -> tuple[Numbers, list[list[torch.Tensor]]]:
    """The numbers of two steps with long rows; each rank's table after the rehearsal and after each step."""
    watch = Rehearsed(folder, named.pop("places", PLACES))
    named = {"model": "debug-melody", "captions": LONG, **named}
    found = run_ranks(ranks, steps_on_another_processor, strategy, watch, **named)[0]
    return found, [[torch.load(folder / f"{rank}-{call}.pt") for call in range(3)] for rank in range(ranks)]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> tuple[Numbers, torch.Tensor]:
    numbers, [[table, *_]] = grown("single", tmp_path_factory.mktemp("one"), ranks=1)
    return numbers, table


@pytest.mark.full
@pytest.mark.parametrize(
    "strategy,named",
    [
        ("ddp", {}),
        ("fsdp", {}),
        ("zero3", {}),
        ("zero2", {"precision": "bf16"}),
        ("zero3", {"precision": "bf16"}),
        ("single", {"compiled": True}),
    ],
    ids=str,
)
def test_rows_beyond_the_table_get_the_first_ranks_larger_one(strategy, named, one_process, tmp_path):
    numbers, table = one_process
    found, tables = grown(strategy, tmp_path, ranks=1 if strategy == "single" else 2, **named)
    assert len(table) == PLACES
    for of_rank in tables:
        assert all(torch.equal(at, table) and at.dtype == torch.float32 for at in of_rank), "it changed in a step"
    loss, norm = differences(found, numbers)
    most_loss, most_norm = (2e-3, 1e-2) if "precision" in named else (3 * LOSS, 3 * NORM)
    assert loss <= most_loss and norm <= most_norm


@pytest.mark.full
def test_a_table_that_each_rank_makes_by_itself_would_be_seen(tmp_path):
    _, [[*_, first], [*_, second]] = grown("ddp", tmp_path, places=0)
    assert min(len(first), len(second)) > 2048 and not torch.equal(first[:2048], second[:2048])
