"""What a run needs of the file system of output_dir is tried at its start, and what it does not need may be lacking."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.odd_mount import odd_mount
from tests.runs import ROOT, launch

HOLD = """
import sys
from pathlib import Path
from trainer.run.exit_code import ExitCodeFile
from trainer.run.metrics import Tracker

root = Path(sys.argv[1])
with ExitCodeFile(str(root), first=True) as run:
    tracker = Tracker(root / "metrics.jsonl", start_step=0, external=None)
    tracker.log({"step": 1})
    tracker.close()
    run.code = 75
print("held")
"""
# As exFAT, SMB, S3 and gcsfuse mounts are, and as CIFS, FUSE and WSL answer to the fsync of a folder.
NOT_NEEDED = ("chmod link folder_fsync=EINVAL", "chmod link locks folder_fsync=ENOTSUP")


def hold(folder: Path, lacks: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", HOLD, str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **odd_mount(lacks)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    "lacks,named",
    [
        ("rename_file", "renaming a file"),
        ("rename_folder", "renaming a folder"),
        ("append", "adding to the end of a file"),
        ("file_fsync", "flushing a file (fsync)"),
    ],
)
def test_a_mount_that_lacks_what_is_needed_is_refused_by_its_name_and_left_as_it_was(lacks, named, tmp_path):
    done = hold(tmp_path / "models", lacks)
    assert done.returncode == 1 and "StorageError" in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert f"--output_dir {tmp_path}/models cannot be written" in last and f"{named} fails here: " in last
    assert [path.name for path in (tmp_path / "models").iterdir()] == [".lock"]


@pytest.mark.parametrize("lacks", NOT_NEEDED)
def test_a_mount_that_lacks_what_is_not_needed_holds_a_run(lacks, tmp_path):
    done = hold(tmp_path, lacks)
    assert done.stdout == "held\n", done.stderr
    assert (tmp_path / "exit_code").read_text() == "75\n"
    assert {path.name for path in tmp_path.iterdir()} == {"exit_code", "metrics.jsonl", ".lock"}


@pytest.mark.full
@pytest.mark.parametrize("lacks", NOT_NEEDED)
def test_such_a_mount_gets_all_that_a_run_makes(lacks, tmp_path):
    flags = ("--max_steps", "2", "--batch_size", "2", "--grad_acc", "1", "--checkpoint_minutes", "0.00001")
    launch(tmp_path, *flags, **odd_mount(lacks))
    made = {path.name for path in (tmp_path / "models").iterdir()}
    assert {"lm_final.pt", "huggingface", "audiocraft", "finished.json"} <= made
    assert (tmp_path / "models/exit_code").read_text() == "0\n"
    assert "already complete" in launch(tmp_path, *flags, **odd_mount(lacks))
