"""Checkpoints: whole or not there, and readable however they were cut."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.synthetic import HEADER
from trainer import atomic
from trainer.errors import CheckpointError, StorageError
from trainer.run.checkpoint import Checkpoint, FlatSlice, Saver, newest
from trainer.run.checkpoint_folders import complete_checkpoints, remove_unfinished

SHAPE = (6, 5)
VALUES = torch.arange(30, dtype=torch.float32)


def piece(start: int, stop: int) -> FlatSlice:
    return FlatSlice(shape=SHAPE, start=start, values=VALUES[start:stop])


def save(folder: Path, step: int = 7, cuts=((0, 30),)) -> None:
    savers = [Saver(folder, rank=rank, world_size=len(cuts)) for rank in range(len(cuts))]
    for saver, (start, stop) in zip(savers, cuts, strict=True):
        saver.save(step, {"weight/a": piece(start, stop)}, HEADER)
    for saver in reversed(savers):
        saver.wait()


@pytest.mark.parametrize("cuts", [[(0, 30)], [(0, 13), (13, 30)], [(20, 30), (0, 1), (1, 20)], [(0, 30), (30, 30)]])
def test_any_range_reads_the_same_however_it_was_cut(tmp_path, cuts):
    save(tmp_path, cuts=cuts)
    checkpoint = newest(tmp_path)
    assert checkpoint is not None and checkpoint.step == 7
    for start, stop in [(0, 30), (0, 1), (12, 14), (19, 21), (29, 30), (5, 25)]:
        assert torch.equal(checkpoint.read("weight/a", start, stop), VALUES[start:stop])
    assert torch.equal(checkpoint.weights()["a"], VALUES.reshape(SHAPE))


def test_slices_that_do_not_cover_a_tensor_are_refused(tmp_path):
    save(tmp_path, cuts=[(0, 10), (10, 29)])
    with pytest.raises(CheckpointError, match="weight/a is not whole"):
        newest(tmp_path)


def test_the_copy_is_taken_before_save_returns(tmp_path):
    values = VALUES.clone()
    saver = Saver(tmp_path)
    saver.save(1, {"weight/a": FlatSlice(shape=SHAPE, start=0, values=values)}, HEADER)
    values.zero_()
    assert torch.equal(saver.last().read("weight/a"), VALUES)


def test_the_newest_two_are_kept(tmp_path):
    for step in (5, 10, 100, 1000):
        save(tmp_path, step)
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["step-00001000", "step-00000100"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000100", "step-00001000"]


def test_a_half_written_checkpoint_is_never_taken_for_one(tmp_path):
    save(tmp_path, 5)
    save(tmp_path, 6)
    # a kill before the rename leaves everything but the name
    (tmp_path / "step-00000006").rename(tmp_path / "step-00000006.partial")
    (tmp_path / "step-00000007").mkdir()
    found = newest(tmp_path)
    assert found is not None and found.step == 5
    remove_unfinished(tmp_path)
    assert not list(tmp_path.glob("*.partial"))


def test_damage_is_named_with_what_to_do(tmp_path):
    save(tmp_path)
    path = tmp_path / "step-00000007" / "rank-00000.safetensors"
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(CheckpointError, match=r"delete .*step-00000007 to use an older one"):
        newest(tmp_path)


def test_a_format_of_the_future_is_refused(tmp_path):
    save(tmp_path)
    header = tmp_path / "step-00000007" / "checkpoint.json"
    header.write_text(json.dumps({**json.loads(header.read_text()), "format": 99}))
    with pytest.raises(CheckpointError, match="has format 99"):
        newest(tmp_path)


def test_a_save_that_fails_is_raised_and_leaves_the_older_one(tmp_path):
    save(tmp_path, 5)
    saver = Saver(tmp_path)
    # a file where the folder should be: what the writer meets on a path that it cannot make
    (tmp_path / "step-00000006.partial").write_text("")
    saver.save(6, {"weight/a": piece(0, 30)}, HEADER)
    with pytest.raises(StorageError, match=r"Older checkpoints in .* are complete"):
        saver.wait()
    found = newest(tmp_path)
    assert found is not None and found.step == 5


def test_a_rank_that_never_writes_ends_the_save_with_its_name(tmp_path):
    saver = Saver(tmp_path, rank=0, world_size=2, timeout_seconds=0.2)
    saver.save(3, {"weight/a": piece(0, 30)}, HEADER)
    with pytest.raises(StorageError, match="no rank-00001"):
        saver.wait()


def test_rank_0_may_complete_the_checkpoint_before_another_rank_has_returned_from_its_rename(tmp_path, monkeypatch):
    rename_file, final = atomic.rename_file, tmp_path / "step-00000007"

    def renamed(path: Path, target: Path) -> None:
        rename_file(path, target)
        if target.name == "rank-00001.safetensors":  # and its process is not scheduled again for a while
            assert atomic.appears(final, 60)

    monkeypatch.setattr(atomic, "rename_file", renamed)
    save(tmp_path, cuts=[(0, 13), (13, 30)])
    assert torch.equal(Checkpoint(final).read("weight/a", 0, 30), VALUES)


def test_a_missing_tensor_is_named(tmp_path):
    save(tmp_path)
    with pytest.raises(CheckpointError, match="holds no exp_avg/a"):
        Checkpoint(tmp_path / "step-00000007").read("exp_avg/a")


def test_the_file_of_another_program_is_refused_by_name(tmp_path):
    save(tmp_path)
    file = tmp_path / "step-00000007" / "rank-00000.safetensors"
    save_file({"weight/a": VALUES}, file)
    with pytest.raises(CheckpointError, match=r"rank-00000.safetensors cannot be read \('pieces'\); delete"):
        newest(tmp_path)
    pieces = json.dumps({"weight/a": {"shape": SHAPE, "start": 0, "stop": 30}})
    save_file({"weight/a": VALUES.bfloat16()}, file, metadata={"pieces": pieces})
    with pytest.raises(CheckpointError, match=r"weight/a is not there in float32; delete .*step-00000007"):
        newest(tmp_path)
