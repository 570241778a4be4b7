"""Whole runs whose terminal is closed, whose pipe loses its reader, or whose console cannot show a file's name."""

from __future__ import annotations

import os
import pty
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.runs import command, environ, few_clips, launch, metrics
from trainer.errors import EXIT_RESUME
from trainer.run.checkpoint import newest

pytestmark = pytest.mark.full
FLAGS = ("--batch_size", "2", "--grad_acc", "1", "--lr", "1e-3")
ENDLESS = (*FLAGS, "--epochs", "100000", "--checkpoint_minutes", "60")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
SECONDS = 90


def wait_for(happened: Callable[[], object]) -> None:
    deadline = time.monotonic() + SECONDS
    while not happened():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)


def in_a_terminal(folder: Path, words: list[str]) -> tuple[int, int]:
    """Start a program as the leader of a terminal of its own: its process, and our end of the terminal."""
    process, terminal = pty.fork()
    if process == 0:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # as a shell does, whatever the tests were started by
        os.chdir(folder)
        os.execve(words[0], words, environ())
    return process, terminal


def end_of(process: int) -> int:
    """The exit code of a child, negative for a signal."""
    codes: list[int] = []

    def ended() -> bool:
        found, status = os.waitpid(process, os.WNOHANG)
        if found:
            codes.append(os.waitstatus_to_exitcode(status))
        return bool(codes)

    wait_for(ended)
    return codes[0]


def assert_saved(folder: Path) -> None:
    """The run has a checkpoint of its last step, the code of a stopped run, and its words in the log."""
    models = folder / "models"
    assert (models / "exit_code").read_text() == f"{EXIT_RESUME}\n"
    checkpoint = newest(models / "checkpoints")
    assert checkpoint is not None and checkpoint.step == max(metrics(folder))
    log = (models / "log.txt").read_text()
    assert f"SIGHUP: saved after step {checkpoint.step} of " in log, log


@pytest.mark.parametrize("by", ["python", "torchrun"])
def test_a_terminal_that_is_closed_stops_a_run_with_a_checkpoint(by, tmp_path):
    words = command(tmp_path, *ENDLESS)
    process, terminal = in_a_terminal(tmp_path, words if by == "python" else [*TORCHRUN, *words[1:]])
    wait_for(lambda: (tmp_path / "models/metrics.jsonl").exists() and len(metrics(tmp_path)) > 2)
    os.close(terminal)
    code = end_of(process)
    assert code == EXIT_RESUME if by == "python" else code != 0
    assert_saved(tmp_path)
    if by == "torchrun":
        log = (tmp_path / "models/logs/rank-00001.txt").read_text()
        assert "SIGHUP" in log and "command: " in log and "Traceback" not in log, log


def test_under_nohup_a_run_outlives_its_terminal(tmp_path):
    nohup = shutil.which("nohup")
    assert nohup is not None
    process, terminal = in_a_terminal(tmp_path, [nohup, *command(tmp_path, *ENDLESS)])
    wait_for(lambda: (tmp_path / "models/metrics.jsonl").exists() and len(metrics(tmp_path)) > 2)
    os.close(terminal)
    before = len(metrics(tmp_path))
    wait_for(lambda: len(metrics(tmp_path)) > before + 10)
    os.kill(process, signal.SIGTERM)
    assert end_of(process) == EXIT_RESUME


def test_nohup_and_torchrun_save_as_without_nohup(tmp_path):
    """torchrun takes SIGHUP under nohup too, and passes it on."""
    nohup = shutil.which("nohup")
    assert nohup is not None
    process, terminal = in_a_terminal(tmp_path, [nohup, *TORCHRUN, *command(tmp_path, *ENDLESS)[1:]])
    wait_for(lambda: (tmp_path / "models/metrics.jsonl").exists() and len(metrics(tmp_path)) > 2)
    os.close(terminal)
    assert end_of(process) != 0
    assert_saved(tmp_path)


def test_a_reader_that_ends_ends_no_run_and_the_log_has_all_lines(tmp_path):
    """`launch.py ... 2>&1 | head -1`, and a second start, whose lines stand below the first one's."""
    whole = launch(tmp_path, *FLAGS, "--max_steps", "30", "--output_dir", "whole")
    shutil.rmtree(tmp_path / "cache")  # so that the next run encodes too, and says so
    said = [line for line in whole.splitlines() if line.strip() and "\r" not in line and "training:" not in line]
    log = tmp_path / "models" / "log.txt"
    for start in (1, 2):
        running = subprocess.Popen(
            command(tmp_path, *FLAGS, "--max_steps", str(30 * start)),
            cwd=tmp_path, env=environ(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        assert running.stdout is not None and running.stdout.readline()
        running.stdout.close()
        assert running.wait(SECONDS) == 0
        assert log.read_text().count("\ncommand: ") == start
    assert list(metrics(tmp_path)) == list(range(1, 61))
    logged = log.read_text().replace("models/", "whole/")
    # Times, and what is free on the disk, are another run's: there such lines differ behind their beginnings.
    said = [line.split(maxsplit=1)[0] if line.startswith(("measured: ", "disk: ")) else line for line in said]
    assert {"measured:", "disk:"} <= set(said)
    assert all(line in logged for line in said), [line for line in said if line not in logged]
    assert "done: 60 steps" in logged and "resuming from" in logged


def test_a_second_run_that_is_refused_writes_nothing_into_the_log(tmp_path):
    running = subprocess.Popen(
        command(tmp_path, *ENDLESS), cwd=tmp_path, env=environ(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    wait_for((tmp_path / "models/metrics.jsonl").exists)
    before = (tmp_path / "models/log.txt").read_bytes()
    assert "in use by another run" in launch(tmp_path, *ENDLESS, expect=2)
    assert (tmp_path / "models/log.txt").read_bytes() == before
    running.terminate()
    assert running.wait(SECONDS) == EXIT_RESUME


@pytest.mark.parametrize("console", ["PYTHONIOENCODING=iso-8859-1", "LC_ALL=de_DE"])
def test_a_file_name_that_the_console_lacks_is_escaped(console, tmp_path):
    few_clips(tmp_path / "data")
    (tmp_path / "data" / "夜の歌.wav").write_bytes(b"no sound")
    name, _, value = console.partition("=")
    changes = {name: value}
    if name == "LC_ALL":
        made = tmp_path / "locales"
        made.mkdir()
        localedef = shutil.which("localedef")
        made_by = [str(localedef), "-i", "de_DE", "-f", "ISO-8859-1", str(made / "de_DE")]
        if localedef is None or subprocess.run(made_by, capture_output=True).returncode:
            pytest.skip("this machine cannot make the locale de_DE")
        changes["LOCPATH"] = str(made)
    done = subprocess.run(
        command(tmp_path, *FLAGS, "--max_steps", "1"), cwd=tmp_path, env=environ(**changes),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    shown = done.stdout.decode("iso-8859-1")
    assert done.returncode == 0 and "\\u591c\\u306e\\u6b4c.wav: no caption" in shown, shown
    assert "夜の歌.wav: no caption" in (tmp_path / "models/log.txt").read_text(encoding="utf-8")


def test_a_log_that_cannot_be_written_ends_nothing(tmp_path):
    (tmp_path / "models").mkdir()
    (tmp_path / "models/log.txt").symlink_to("/dev/full")
    assert "done: 2 steps" in launch(tmp_path, *FLAGS, "--max_steps", "2")
