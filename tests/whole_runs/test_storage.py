"""Disks that are full or read-only: a message, an exit code, and nothing good is lost."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.runs import assert_bit_equal, few_clips, final_state, launch_here, metrics
from trainer.run.checkpoint import Checkpoint
from trainer.run.checkpoint_folders import complete_checkpoints

FLAGS = ("--max_steps", "6", "--epochs", "100", "--lr", "3e-3", "--batch_size", "2", "--grad_acc", "1")
FLAGS += ("--checkpoint_minutes", "0.00001")


def mount(folder: Path, options: str) -> None:
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"NOTHING SHOWS what a full disk does: mounting was refused here ({done.stderr.strip()})")


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """models/ on a disk of 80 MB: two checkpoints of 32 MB each, and no room for a third beside them."""
    folder = tmp_path / "models"
    folder.mkdir()
    mount(folder, "size=80m")
    yield tmp_path
    subprocess.run(["umount", "--lazy", str(folder)], check=True)  # maps of its files may still be held


def test_a_disk_that_fills_while_saving_loses_nothing(small_disk, tmp_path_factory):
    output = launch_here(small_disk, *FLAGS, expect=4)
    assert "could not be written" in output and "free space" in output
    checkpoints = complete_checkpoints(small_disk / "models/checkpoints")
    assert len(checkpoints) == 2 and Checkpoint(checkpoints[0]).step < 6
    assert not list((small_disk / "models/checkpoints").glob("*.partial"))

    subprocess.run(["mount", "-o", "remount,size=400m", str(small_disk / "models")], check=True)
    launch_here(small_disk, *FLAGS)
    undisturbed = tmp_path_factory.mktemp("undisturbed")
    launch_here(undisturbed, *FLAGS)
    assert metrics(small_disk) == metrics(undisturbed)
    assert_bit_equal(final_state(small_disk), final_state(undisturbed))


def test_a_read_only_output_folder_is_refused_before_any_work(tmp_path):
    folder = tmp_path / "models"
    folder.mkdir()
    mount(folder, "size=1m,ro")
    try:
        output = launch_here(tmp_path, *FLAGS, expect=4)
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)  # maps of its files may still be held
    assert "--output_dir models cannot be written" in output
    assert not (tmp_path / "cache").exists()


def test_a_read_only_dataset_is_trained_on(tmp_path):
    data = few_clips(tmp_path / "data")
    mount(data, "size=50m")
    try:
        few_clips(data)
        before = {path.name for path in data.iterdir()}
        subprocess.run(["mount", "-o", "remount,ro", str(data)], check=True)
        with pytest.raises(OSError, match="Read-only"):
            (data / "probe").touch()
        launch_here(tmp_path, *FLAGS[2:], "--max_steps", "1")
        assert {path.name for path in data.iterdir()} == before
    finally:
        subprocess.run(["umount", "--lazy", str(data)], check=True)
    assert (tmp_path / "models/lm_final.pt").is_file()


def test_an_output_path_below_a_file_is_refused(tmp_path):
    (tmp_path / "models").write_text("")
    assert "--output_dir models cannot be written" in launch_here(tmp_path, *FLAGS, expect=4)


def test_a_folder_that_does_not_exist_is_refused(tmp_path):
    output = launch_here(tmp_path, "--dataset", "nowhere", expect=3)
    assert "nowhere" in output


def test_audio_replaced_by_garbage_of_equal_size_and_date_gives_the_same_losses(tmp_path):
    launch_here(tmp_path, *FLAGS, "--output_dir", "first")
    for path in (tmp_path / "data").glob("*.wav"):
        stat = path.stat()
        path.write_bytes(os.urandom(stat.st_size))
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    launch_here(tmp_path, *FLAGS, "--output_dir", "second")
    first, second = ((tmp_path / name / "metrics.jsonl").read_text() for name in ("first", "second"))
    losses = [[line.split('"grad_norm"')[0] for line in text.splitlines()] for text in (first, second)]
    assert len(losses[0]) == 6 and losses[0] == losses[1]
    output = launch_here(tmp_path, *FLAGS, "--output_dir", "third", "--rehash", "1", expect=3)
    assert "unreadable" in output
