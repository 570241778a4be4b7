"""A checkpoint of many processes is resumed and exported with each of its files opened once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.opens import counted_opens, open_now
from tests.plans import engine_for, plan_for
from tests.synthetic import HEADER
from trainer import wiring
from trainer.flags.config import Config
from trainer.model.source import open_model
from trainer.run.checkpoint import Checkpoint, FlatSlice, Saver, newest
from trainer.run.output_dir import OutputDir

PROCESSES = 3


@pytest.fixture(scope="module")
def engine():
    return engine_for(plan_for(), Config(dataset_path="unused"))


@pytest.fixture(scope="module")
def checkpoint(engine, tmp_path_factory) -> Checkpoint:
    """Of the engine's state, each tensor cut into as many parts as there are processes."""
    folder = tmp_path_factory.mktemp("checkpoints")
    savers = [Saver(folder, rank=rank, world_size=PROCESSES) for rank in range(PROCESSES)]
    for rank, saver in enumerate(savers):
        saver.save(1, {name: part(piece, rank) for name, piece in engine.state().items()}, HEADER)
    for saver in reversed(savers):
        saver.wait()
    found = newest(folder)
    assert found is not None
    return found


def part(piece: FlatSlice, rank: int) -> FlatSlice:
    first, last = (len(piece.values) * end // PROCESSES for end in (rank, rank + 1))
    return FlatSlice(shape=piece.shape, start=first, values=piece.values[first:last])


FILES = dict.fromkeys((f"rank-{rank:05d}.safetensors" for rank in range(PROCESSES)), 1)


def test_resuming_opens_each_file_once(engine, checkpoint):
    before = {name: piece.values.clone() for name, piece in engine.state().items()}
    for piece in engine.state().values():
        piece.values.fill_(7)
    with counted_opens(checkpoint.folder) as opens:
        engine.load(checkpoint)
    assert opens == FILES and open_now(checkpoint.folder) == []
    assert all(torch.equal(piece.values, before[name]) for name, piece in engine.state().items())


def test_writing_a_model_of_a_step_opens_each_file_once(checkpoint, tmp_path):
    with counted_opens(checkpoint.folder) as opens:
        wiring.write_step(Config(dataset_path="unused"), open_model("debug"), checkpoint, OutputDir(root=tmp_path))
    assert opens == FILES and open_now(checkpoint.folder) == []
    assert [path.name for path in Path(tmp_path).glob("lm_*.pt")] == ["lm_1.pt"]
