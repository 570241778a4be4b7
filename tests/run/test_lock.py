"""output_dir belongs to one run at a time, whether or not the file system has locks."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.odd_mount import odd_mount
from tests.runs import ROOT, environ
from trainer.errors import ConfigError
from trainer.run import lock
from trainer.run.lock import Holder, RunLock, holder_path, launch_of, read_holder

ELSEWHERE = Holder(
    host="n7", machine="n7 boot", pid=4, job="812", since="2026-11-22 10:00:00 +0000", launch="", token="t", beat=3
)


@pytest.fixture(autouse=True)
def fast(monkeypatch) -> None:
    monkeypatch.setattr(lock, "HEARTBEAT_SECONDS", 0.1)
    monkeypatch.setattr(lock, "FIRST_HEARTBEAT_SECONDS", 0.1)
    monkeypatch.setattr(lock, "STALE_SECONDS", 0.8)


@pytest.fixture
def no_locks(monkeypatch) -> None:
    """As on a mount without a lock service."""

    def refuse(file: object, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)


def leave_holder(root: Path, holder: Holder) -> None:
    holder_path(root).write_text(json.dumps(dataclasses.asdict(holder)))


@pytest.fixture
def beating(tmp_path) -> Iterator[None]:
    """A run on another machine, which shows that it is alive."""
    over = threading.Event()

    def beat() -> None:
        count = ELSEWHERE.beat
        while not over.wait(0.1):
            count += 1
            beside = tmp_path / "beside"
            leave = dataclasses.replace(ELSEWHERE, beat=count)
            beside.write_text(json.dumps(dataclasses.asdict(leave)))
            os.replace(beside, holder_path(tmp_path))

    leave_holder(tmp_path, ELSEWHERE)
    thread = threading.Thread(target=beat)
    thread.start()
    yield
    over.set()
    thread.join()


def test_a_second_run_is_refused_with_the_first_ones_job_host_and_process(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    first = RunLock(tmp_path)
    words = rf"in use by another run \(SLURM job 4711, process {os.getpid()} on {os.uname().nodename}, since 20"
    with pytest.raises(ConfigError, match=words):
        RunLock(tmp_path)
    first.close()
    RunLock(tmp_path).close()
    assert read_holder(tmp_path) is None


def test_a_killed_runs_folder_is_free_at_once_on_its_machine(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "STALE_SECONDS", 60.0)
    code = (
        "import sys, time; sys.path.insert(0, sys.argv[1]); from pathlib import Path; from trainer.run.lock import"
        " RunLock; kept = RunLock(Path(sys.argv[2])); print('open', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", code, str(ROOT), str(tmp_path)]
    holder = subprocess.Popen(command, env=environ(), stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdout.readline() == "open\n"
    with pytest.raises(ConfigError, match=rf"in use by another run \(process {holder.pid} on"):
        RunLock(tmp_path)
    holder.kill()
    holder.wait()
    since = time.monotonic()
    RunLock(tmp_path).close()
    assert time.monotonic() - since < 5


@pytest.mark.parametrize("locks", [True, False])
def test_a_run_that_is_alive_on_another_machine_is_respected_where_locks_do_not_reach(
    locks, tmp_path, beating, request
):
    if not locks:
        request.getfixturevalue("no_locks")
    with pytest.raises(ConfigError, match=r"in use by another run \(SLURM job 812, process 4 on n7, since 2026-11-22"):
        RunLock(tmp_path)


@pytest.mark.parametrize("locks", [True, False])
def test_what_was_killed_on_another_machine_blocks_for_the_stale_time_only(locks, tmp_path, capsys, request):
    if not locks:
        request.getfixturevalue("no_locks")
    leave_holder(tmp_path, ELSEWHERE)
    since = time.monotonic()
    lock = RunLock(tmp_path)
    assert 0.8 <= time.monotonic() - since < 5
    assert "last used by SLURM job 812, process 4 on n7" in capsys.readouterr().out
    found = read_holder(tmp_path)
    assert found is not None and found.pid == os.getpid()
    lock.close()


def test_without_locks_a_second_run_on_the_same_machine_is_refused(tmp_path, no_locks):
    first = RunLock(tmp_path)
    with pytest.raises(ConfigError, match=f"in use by another run .*process {os.getpid()} on"):
        RunLock(tmp_path)
    first.close()
    RunLock(tmp_path).close()


def test_of_two_that_started_at_once_without_locks_the_one_written_over_ends(tmp_path):
    code = (
        "import sys, time; sys.path.insert(0, sys.argv[1]); from pathlib import Path; from trainer.run import lock;"
        " kept = lock.RunLock(Path(sys.argv[2])); print('open', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", code, str(ROOT), str(tmp_path)]
    early = subprocess.Popen(command, env=environ(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert early.stdout is not None and early.stdout.readline() == "open\n"
    leave_holder(tmp_path, ELSEWHERE)
    _, said = early.communicate(timeout=20)
    assert early.returncode == 2 and "in use by another run (SLURM job 812" in said
    assert read_holder(tmp_path) == ELSEWHERE


BEATING = """
import sys
from pathlib import Path
from trainer.run import lock

lock.HEARTBEAT_SECONDS = lock.FIRST_HEARTBEAT_SECONDS = 0.1
kept = lock.RunLock(Path(sys.argv[1]))
print("open", flush=True)
sys.stdin.readline()
kept.close()
"""


@contextmanager
def beating_process(folder: Path, lacks: str) -> Iterator[subprocess.Popen[str]]:
    """A run in `folder` on such a mount (tests/odd_mount.py), with a heartbeat each 0.1 s until it reads a line."""
    process = subprocess.Popen(
        [sys.executable, "-c", BEATING, str(folder)],
        env=environ(PYTHONPATH=str(ROOT), **odd_mount(lacks)),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None and process.stdout.readline() == "open\n"
        yield process
    finally:
        process.kill()
        process.wait()


def end(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.close()
    assert process.wait(20) == 0


def wait_for_beats(root: Path, beats: int) -> None:
    """Return once the counter of the run in `root` has grown by so many."""
    goal, deadline = None, time.monotonic() + 20
    while time.monotonic() < deadline:
        found = read_holder(root)
        if found is not None:
            goal = found.beat + beats if goal is None else goal
            if found.beat >= goal:
                return
        time.sleep(0.02)
    pytest.fail("no sign of life")


@pytest.mark.parametrize("console", ["open", "gone"])
def test_a_disk_that_does_not_answer_once_does_not_end_the_heartbeats(console, tmp_path):
    bad = tmp_path / ".holder.json.bad"
    with beating_process(tmp_path, "unreadable") as process:
        assert process.stderr is not None
        if console == "gone":
            process.stderr.close()
        for _ in range(2):
            bad.touch()
            deadline = time.monotonic() + 20
            while bad.exists() and time.monotonic() < deadline:
                time.sleep(0.02)
            if console == "open":
                said = process.stderr.readline() + process.stderr.readline()
                assert "could not be renewed ([Errno 5] Input/output error" in said
            wait_for_beats(tmp_path, 2)
        end(process)
    assert read_holder(tmp_path) is None


def test_a_sign_of_life_that_was_renamed_over_while_it_was_looked_up_is_looked_up_again(tmp_path):
    with beating_process(tmp_path, "stale") as process:
        wait_for_beats(tmp_path, 3)
        end(process)
        assert process.stderr is not None and process.stderr.read() == ""
    assert read_holder(tmp_path) is None


def test_a_run_that_cannot_read_who_holds_the_folder_does_not_take_it(tmp_path, no_locks, monkeypatch):
    leave_holder(tmp_path, ELSEWHERE)
    answers = iter([True])
    read_text = Path.read_text

    def failing(path: Path) -> str:
        if path == holder_path(tmp_path) and not next(answers, False):
            raise OSError(errno.EIO, "Input/output error")
        return read_text(path)

    monkeypatch.setattr(Path, "read_text", failing)
    with pytest.raises(OSError, match="Input/output error"):
        RunLock(tmp_path)
    monkeypatch.undo()
    assert read_holder(tmp_path) == ELSEWHERE


def test_a_file_that_names_nobody_blocks_nobody(tmp_path):
    holder_path(tmp_path).write_text('{"host": "n1"}')
    RunLock(tmp_path).close()


def test_ranks_of_one_launch_know_each_other_and_no_other():
    job = {"SLURM_JOB_ID": "7", "MASTER_ADDR": "n1", "MASTER_PORT": "20007", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}
    ranks = [launch_of({**job, "RANK": str(rank), "SLURM_PROCID": str(rank // 2)}) for rank in range(4)]
    assert len(set(ranks)) == 1
    others = [{"SLURM_JOB_ID": "8"}, {"SLURM_RESTART_COUNT": "1"}, {"MASTER_PORT": "20008"}, {"MASTER_ADDR": "n2"}]
    assert all(launch_of({**job, **other}) != ranks[0] for other in others)
