"""Files and folders are there whole or not at all, and what lies beside the program's own stays."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import pytest

from trainer import atomic
from trainer.atomic import appears, is_there, names_in, replacing_folder, write_once


def is_ours(name: str) -> bool:
    return name.startswith("model")


def export(folder: Path, *files: str) -> None:
    with replacing_folder(folder, is_ours=is_ours) as partial:
        for file in files:
            (partial / file).write_text(f"new {file}")


def content(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_what_the_user_put_into_a_folder_of_ours_moves_to_the_new_one(tmp_path):
    folder = tmp_path / "huggingface"
    export(folder, "model-1", "model-2", "README.md")
    (folder / "samples").mkdir()
    (folder / "samples/a.wav").write_text("sound")
    (folder / "notes.txt").write_text("mine")
    export(folder, "model", "README.md")
    assert content(folder) == {
        "model": "new model", "README.md": "new README.md", "samples/a.wav": "sound", "notes.txt": "mine"
    }  # fmt: skip
    assert names_in(tmp_path) == ["huggingface"]


@pytest.mark.parametrize("kill_before", range(7))
def test_a_kill_at_any_step_of_it_loses_nothing_of_the_users(tmp_path, monkeypatch, kill_before):
    folder = tmp_path / "huggingface"
    export(folder, "model")
    for name in ("notes.txt", "more.txt"):
        (folder / name).write_text("mine")
    rename, remove, calls = os.rename, atomic.remove, [0]

    def counted(call):
        def step(*arguments):
            calls[0] += 1
            if calls[0] > kill_before:
                raise KeyboardInterrupt  # what follows, in `finally` too, does not come about: as after a kill
            call(*arguments)

        return step

    with monkeypatch.context() as patched:
        patched.setattr(os, "rename", counted(rename))
        patched.setattr(atomic, "remove", counted(remove))
        try:
            export(folder, "model")
            assert calls[0] <= kill_before
        except KeyboardInterrupt:
            assert calls[0] > kill_before
    export(folder, "model")
    assert content(folder) == {"model": "new model", "notes.txt": "mine", "more.txt": "mine"}
    assert names_in(tmp_path) == ["huggingface"]


def test_an_export_that_was_moved_elsewhere_and_linked_stays_there(tmp_path):
    export(tmp_path / "elsewhere", "model")
    (tmp_path / "huggingface").symlink_to("elsewhere")
    export(tmp_path / "huggingface", "model", "model-2")
    assert set(content(tmp_path / "huggingface")) == {"model", "model-2"}
    assert content(tmp_path / "elsewhere") == {"model": "new model"}
    assert sorted(names_in(tmp_path)) == ["elsewhere", "huggingface"]


@pytest.mark.parametrize("name", ["huggingface", "huggingface.partial", "huggingface.former"])
def test_a_plain_file_where_the_folder_has_to_go_is_named_and_kept(tmp_path, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(FileExistsError, match=rf"move it: '.*{name}'"):
        export(tmp_path / "huggingface", "model")
    assert content(tmp_path) == {name: "mine"}


def test_a_code_that_no_disk_has_room_for_is_no_empty_file(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            write_once(tmp_path / "exit_code", b"4\n")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names_in(tmp_path) == []


def test_names_are_listed_and_a_folder_that_is_not_there_has_none(tmp_path, monkeypatch):
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "nowhere").symlink_to("gone")
    assert names_in(tmp_path / "a") == ["b"] and names_in(tmp_path / "x/y") == [] == names_in(tmp_path / "nowhere")
    assert is_there(tmp_path / "a/b") and not is_there(tmp_path / "a/c") and not is_there(tmp_path / "x/y")
    monkeypatch.chdir(tmp_path)
    assert is_there(Path("a")) and is_there(Path("a/b")) and names_in(Path("z")) == []
    assert appears(Path("a"), 0.0) and not appears(Path("z"), 0.0)
