"""Every rank computes with the first one's table of positions, which is sent once and not at every step."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ranks.cases import steps
from tests.ranks.harness import run_ranks


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


def steps_on_another_processor(strategy: str, watch: Tables) -> None:
    """On the second rank sines come out a little larger."""
    from transformers.models.musicgen.modeling_musicgen import MusicgenSinusoidalPositionalEmbedding

    if os.environ["RANK"] == "1":
        plain = MusicgenSinusoidalPositionalEmbedding.get_embedding
        MusicgenSinusoidalPositionalEmbedding.get_embedding = staticmethod(lambda *sizes: plain(*sizes) * (1 + 1e-6))
    steps(strategy, 1, count=2, watch=watch)


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
