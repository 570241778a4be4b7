"""Files and folders are there whole or not at all, and what lies beside the program's own stays."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from tests.data.test_arrow_store import number_row, number_store
from tests.odd_mount import odd_mount
from tests.runs import ROOT
from trainer import atomic
from trainer.atomic import appears, is_there, names_in, replacing_folder, write_once
from trainer.data import clip_table
from trainer.run.lock import _holder_of_this_process, holder_path


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


# What a rank on another machine looks for before the first one has made it, and again after that.
ANOTHER_MACHINE = """
import sys
from pathlib import Path
from tests.data.test_arrow_store import number_store
from trainer.atomic import appears
from trainer.data import clip_table
from trainer.errors import StorageError
from trainer.run.checkpoint_folders import complete_checkpoints
from trainer.run.lock import read_holder

root = Path(sys.argv[1])
clip_table.SHOWN_SECONDS = 0.0


def look():
    try:
        clips = clip_table._columns(root / "scan/clips.arrow", {"path": "string"})
    except StorageError:
        clips = None
    holder, checkpoints = read_holder(root / "models"), complete_checkpoints(root / "models/checkpoints")
    return [bool(found) for found in (
        number_store(root / "cache/codes/encodec").keys(), clips, holder, checkpoints, appears(root / "mark", 0.0)
    )]


exists = lambda: (root / "models/checkpoints/step-00000001/checkpoint.json").exists()
print(exists(), look(), flush=True)
sys.stdin.readline()
print(exists(), look(), exists(), flush=True)
"""


def test_what_another_machine_has_made_is_seen_where_nfs_still_remembers_that_it_was_not_there(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", ANOTHER_MACHINE, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(ROOT), **odd_mount("remembers")},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdin is not None and process.stdout is not None
        assert process.stdout.readline() == f"False {[False] * 5}\n"
        number_store(tmp_path / "cache/codes/encodec").append([number_row(0)])
        (tmp_path / "models/checkpoints/step-00000001").mkdir(parents=True)
        (tmp_path / "models/checkpoints/step-00000001/checkpoint.json").touch()
        holder_path(tmp_path / "models").write_text(json.dumps(asdict(_holder_of_this_process())))
        (tmp_path / "scan").mkdir()
        table = clip_table._stream({"path": ["a.wav"]}, {"path": "string"})
        (tmp_path / "scan/clips.arrow").write_bytes(table)
        (tmp_path / "mark").touch()
        process.stdin.write("\n")
        process.stdin.flush()
        said = process.stdout.readline()
    finally:
        process.kill()
        process.wait()
    if said.startswith("True"):
        pytest.skip("NOTHING SHOWS what NFS remembers: Path.exists() of this Python is not what the library replaces")
    assert said == f"False {[True] * 5} True\n"
