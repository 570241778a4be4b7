"""`exit_code` in output_dir says how the run ended, whatever the launcher says."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import pytest

from tests.runs import launch_here
from trainer.errors import ConfigError, DataError, NotFiniteError
from trainer.run.exit_code import FILE_NAME, ExitCodeFile
from trainer.run.lock import RunLock
from trainer.run.signals import interruptible

LAUNCH = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29517"}


def code_in(folder: Path) -> str | None:
    path = folder / FILE_NAME
    return path.read_text() if path.exists() else None


@pytest.mark.parametrize("code", [0, 75])
def test_a_run_that_ends_by_itself_leaves_its_code(code, tmp_path):
    with ExitCodeFile(str(tmp_path / "models"), first=True) as ending:
        ending.code = code
    assert code_in(tmp_path / "models") == f"{code}\n"
    assert {path.name for path in (tmp_path / "models").iterdir()} == {FILE_NAME, ".lock"}


@pytest.mark.parametrize(
    "error,code",
    [
        (DataError("no clip"), "3\n"),
        (OSError(28, "No space left on device"), "4\n"),
        (NotFiniteError("nan"), "5\n"),
        (KeyboardInterrupt(), "75\n"),
        (ValueError("a defect"), "1\n"),
    ],
)
def test_a_run_that_fails_leaves_the_code_of_its_failure(error, code, tmp_path):
    with pytest.raises(type(error)), ExitCodeFile(str(tmp_path), first=True):
        raise error
    assert code_in(tmp_path) == code


def test_the_former_code_goes_when_a_run_starts(tmp_path):
    (tmp_path / FILE_NAME).write_text("75\n")
    with ExitCodeFile(str(tmp_path), first=True):
        assert code_in(tmp_path) is None


def test_a_run_that_is_refused_the_folder_leaves_the_other_ones_code(tmp_path):
    lock = RunLock(tmp_path)
    (tmp_path / FILE_NAME).write_text("3\n")
    with pytest.raises(ConfigError, match="in use"), ExitCodeFile(str(tmp_path), first=True):
        pass
    assert code_in(tmp_path) == "3\n"
    lock.close()


def test_the_first_failure_of_any_rank_stays(tmp_path, monkeypatch):
    for name, value in LAUNCH.items():
        monkeypatch.setenv(name, value)
    with ExitCodeFile(str(tmp_path), first=True) as first:
        with pytest.raises(DataError), ExitCodeFile(str(tmp_path), first=False):
            raise DataError("on rank 1")
        first.code = 75
    assert code_in(tmp_path) == "3\n"


def test_a_rank_that_ends_well_leaves_the_code_to_the_first(tmp_path, monkeypatch):
    for name, value in LAUNCH.items():
        monkeypatch.setenv(name, value)
    with ExitCodeFile(str(tmp_path), first=True), ExitCodeFile(str(tmp_path), first=False) as other:
        other.code = 0
        other.__exit__(None, None, None)
        assert code_in(tmp_path) is None


@pytest.mark.parametrize("interrupted", [True, False])
def test_ranks_of_a_refused_launch_touch_nothing(interrupted, tmp_path, monkeypatch):
    lock = RunLock(tmp_path)  # of a launch with another address
    for name, value in LAUNCH.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("trainer.run.exit_code.HOLDER_SECONDS", 0.3)
    error = KeyboardInterrupt() if interrupted else DataError("on rank 1")
    with pytest.raises(type(error)), ExitCodeFile(str(tmp_path), first=False):
        raise error
    assert code_in(tmp_path) is None
    lock.close()


def test_a_rank_that_fails_before_the_first_holds_the_folder_is_heard(tmp_path, monkeypatch):
    for name, value in LAUNCH.items():
        monkeypatch.setenv(name, value)
    (tmp_path / FILE_NAME).write_text("0\n")

    def early() -> None:
        ExitCodeFile(str(tmp_path), first=False).record(2, wait_seconds=5.0)

    thread = threading.Thread(target=early)
    thread.start()
    thread.join(0.3)
    assert thread.is_alive() and code_in(tmp_path) == "0\n"
    with ExitCodeFile(str(tmp_path), first=True) as first:
        thread.join()
        first.code = 75
    assert code_in(tmp_path) == "2\n"


def test_without_hard_links_too_the_first_code_stays(tmp_path, monkeypatch):
    def refuse(source: object, target: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(DataError), ExitCodeFile(str(tmp_path), first=True) as ending:
        ending.record(4)
        raise DataError("later")
    assert code_in(tmp_path) == "4\n"


def test_a_dry_run_and_a_refused_flag_write_nothing(tmp_path):
    launch_here(tmp_path, "--dry_run", "1")
    launch_here(tmp_path, "--lr", "minus", expect=2)
    assert not (tmp_path / "models").exists()


def test_a_folder_that_does_not_exist_leaves_its_code(tmp_path):
    launch_here(tmp_path, "--dataset", "nowhere", expect=3)
    assert code_in(tmp_path / "models") == "3\n"


def test_a_signal_at_the_very_end_does_not_keep_the_code_from_being_written(tmp_path, monkeypatch):
    from trainer.run import exit_code

    write_once = exit_code.write_once

    def late(path: Path, code: int) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        write_once(path, code)

    monkeypatch.setattr(exit_code, "write_once", late)
    with interruptible(), ExitCodeFile(str(tmp_path), first=True) as run:
        run.code = 0
    assert code_in(tmp_path) == "0\n"


def test_the_handlers_are_those_of_before_once_the_program_has_ended(tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGALRM)]
    launch_here(tmp_path, "--dataset", "nowhere", "--max_minutes", "5", expect=3)
    after = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGALRM)]
    assert after == before and signal.getitimer(signal.ITIMER_REAL)[0] == 0
