"""output_dir says what it holds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.synthetic import HEADER
from trainer.errors import CheckpointError
from trainer.run.checkpoint import Checkpoint, FlatSlice, Saver
from trainer.run.output_dir import check_same_run, open_output_dir


def save(folder: Path, *steps: int) -> None:
    for step in steps:
        saver = Saver(folder)
        saver.save(step, {"weight/a": FlatSlice(shape=(2,), start=0, values=torch.zeros(2))}, HEADER)
        saver.wait()


def test_what_a_kill_left_half_deleted_is_removed(tmp_path):
    save(tmp_path / "checkpoints", 5, 6)
    (tmp_path / "checkpoints/step-00000005/checkpoint.json").unlink()  # what is deleted first
    _, checkpoint = open_output_dir(str(tmp_path), "auto")
    assert checkpoint is not None and checkpoint.step == 6
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000006"]


@pytest.mark.parametrize("resume", ["auto", "no"])
def test_a_run_whose_checkpoints_were_deleted_does_not_count_as_finished(tmp_path, resume):
    (tmp_path / "finished.json").write_text('{"step": 24}')
    folder, checkpoint = open_output_dir(str(tmp_path), resume)
    assert checkpoint is None and folder.finished_step() is None


@pytest.mark.parametrize("given", ["old", "old/checkpoints"])
def test_a_folder_of_checkpoints_is_answered_with_one_of_them(tmp_path, given):
    save(tmp_path / "old/checkpoints", 5, 6)
    with pytest.raises(CheckpointError, match=r"no checkpoint but holds some: give one, such as .*step-00000006$"):
        open_output_dir(str(tmp_path / "new"), str(tmp_path / given))
    _, checkpoint = open_output_dir(str(tmp_path / "newer"), str(tmp_path / "old/checkpoints/step-00000006"))
    assert checkpoint is not None and checkpoint.step == 6


@pytest.mark.parametrize("content", ["{}", "[]", "3", "not JSON"])
def test_a_file_that_is_no_header_is_refused(tmp_path, content):
    (tmp_path / "step").mkdir()
    (tmp_path / "step/checkpoint.json").write_text(content)
    words = r"(is no header of a checkpoint|is empty or damaged \(.*\))\. Delete this folder"
    with pytest.raises(CheckpointError, match=words):
        open_output_dir(str(tmp_path / "models"), str(tmp_path / "step"))


def test_a_run_that_kept_its_starting_point_as_typed_goes_on(tmp_path):
    """Older versions kept --init_from=~/x as it was typed; the flag is expanded now."""
    save(tmp_path / "checkpoints", 5)
    checkpoint = Checkpoint(tmp_path / "checkpoints/step-00000005")
    old = replace(checkpoint.run, identity={"--seed": 0, "--init_from": "~/x"})
    checkpoint.run = old
    check_same_run(checkpoint, {"--seed": 0, "--init_from": str(Path("~/x").expanduser())})
    with pytest.raises(CheckpointError, match="--init_from: ~/x then, /y now"):
        check_same_run(checkpoint, {"--seed": 0, "--init_from": "/y"})
