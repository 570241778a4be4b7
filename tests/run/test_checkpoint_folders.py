"""In checkpoints/ only what the program itself named is chosen by itself, counted and removed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from tests.synthetic import HEADER
from trainer.errors import StorageError
from trainer.run.checkpoint import FlatSlice, Saver, newest
from trainer.run.checkpoint_folders import complete_checkpoints
from trainer.run.output_dir import open_output_dir


def save(folder: Path, step: int) -> None:
    saver = Saver(folder)
    saver.save(step, {"weight/a": FlatSlice(shape=(2,), start=0, values=torch.full((2,), float(step)))}, HEADER)
    saver.wait()


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def put_own_things(folder: Path) -> set[str]:
    """Copies and files as people make them beside the checkpoint of step 2, by name."""
    for copy in ("step-00000002-best", "step-00000002 (copy)", "step-00000009.former", "step-2", "step-0000000002"):
        shutil.copytree(folder / "step-00000002", folder / copy)
    (folder / "step-half").mkdir()
    (folder / "step-half.partial").mkdir()
    (folder / "step-notes.txt").write_text("mine")
    (folder / "step-00000008").write_text("a plain file")
    (folder / "step-00000008.partial").write_text("a plain file")
    (folder / "best").symlink_to("step-00000002-best")
    (folder / "step-00000003.partial").symlink_to("step-half")
    return names(folder) - {"step-00000002"}


def test_nothing_of_the_users_is_chosen_counted_or_removed(tmp_path):
    folder = tmp_path / "checkpoints"
    save(folder, 2)
    own = put_own_things(folder)
    before = {name: data for name, data in content(folder).items() if not name.startswith("step-00000002/")}
    _, checkpoint = open_output_dir(str(tmp_path), "auto")
    assert checkpoint is not None and checkpoint.folder.name == "step-00000002"
    for step in (4, 5, 6):
        save(folder, step)
    assert names(folder) == own | {"step-00000005", "step-00000006"}
    assert [path.name for path in complete_checkpoints(folder)] == ["step-00000006", "step-00000005"]
    after = content(folder)
    assert {name: after.get(name) for name in before} == before


@pytest.mark.parametrize("name", ["step-00000002-best", "best", "step-2"])
def test_what_is_named_is_taken_whatever_its_name(name, tmp_path):
    save(tmp_path / "old/checkpoints", 2)
    put_own_things(tmp_path / "old/checkpoints")
    _, checkpoint = open_output_dir(str(tmp_path / "new"), str(tmp_path / "old/checkpoints" / name))
    assert checkpoint is not None and checkpoint.step == 2


def test_what_a_kill_left_of_ours_is_removed(tmp_path):
    save(tmp_path / "checkpoints", 2)
    for left in ("step-00000003.partial", "step-00000001"):
        (tmp_path / "checkpoints" / left).mkdir()
        (tmp_path / "checkpoints" / left / "rank-00000.safetensors").write_bytes(b"half")
    open_output_dir(str(tmp_path), "auto")
    assert names(tmp_path / "checkpoints") == {"step-00000002"}


def test_a_file_that_somebody_put_into_a_checkpoint_outlives_it(tmp_path):
    save(tmp_path, 1)
    (tmp_path / "step-00000001/heard.txt").write_text("the best so far")
    for step in (2, 3):
        save(tmp_path, step)
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["step-00000003", "step-00000002"]
    assert content(tmp_path / "step-00000001") == {"heard.txt": b"the best so far"}


def test_a_checkpoint_moved_to_another_disk_and_linked_is_gone_on_from_and_its_files_are_never_removed(tmp_path):
    save(tmp_path / "here", 1)
    (tmp_path / "here/step-00000001").rename(tmp_path / "elsewhere")
    (tmp_path / "here/step-00000001").symlink_to(tmp_path / "elsewhere")
    found = newest(tmp_path / "here")
    assert found is not None and found.step == 1
    before = content(tmp_path / "elsewhere")
    for step in (2, 3):
        save(tmp_path / "here", step)
    assert names(tmp_path / "here") == {"step-00000002", "step-00000003"}
    assert content(tmp_path / "elsewhere") == before


def test_steps_of_more_than_eight_digits_are_ordered_by_number(tmp_path):
    for step in (99_999_999, 100_000_000, 100_000_001):
        save(tmp_path, step)
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["step-100000001", "step-100000000"]


def test_a_file_where_a_checkpoint_has_to_go_is_named_and_kept(tmp_path):
    (tmp_path / "step-00000004").write_text("mine")
    with pytest.raises(StorageError, match=r"renaming a folder fails here: Not a directory.*step-00000004"):
        save(tmp_path, 4)
    assert (tmp_path / "step-00000004").read_text() == "mine"
