"""The thread that writes the page warns once, ends with the run, and says how the run ended."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.report.made_runs import line, made_run
from tests.report.pages import Page
from tests.runs import environ, import_path
from trainer.errors import EXIT_RESUME, NotFiniteError
from trainer.report import reporter
from trainer.report.reporter import PAGE, Reporter


def state(run: Path) -> str:
    return Page((run / PAGE).read_text(encoding="utf-8")).text.split('<span class="state ')[1].split('"')[0]


def test_the_page_is_written_while_the_run_goes_on_and_once_more_at_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, written, states = made_run(tmp_path / "run"), threading.Event(), list[str]()
    whole = reporter.write_whole

    def telling(path: Path, content: bytes) -> None:
        whole(path, content)
        states.append(state(run))
        written.set()

    monkeypatch.setattr(reporter, "write_whole", telling)
    monkeypatch.setattr(reporter, "LOOK_SECONDS", 0.01)
    with Reporter(run, {}) as report:
        with (run / "metrics.jsonl").open("a") as file:
            file.write(line(61))
        assert written.wait(60)
        report.exit_code = EXIT_RESUME
    assert states == ["running", "stopped"]  # a minute has not passed in between
    told = capsys.readouterr()
    assert told.out.count(str(run / PAGE)) == 2 and told.err == ""


def test_a_run_that_fails_leaves_a_page_that_says_so(tmp_path: Path) -> None:
    run = made_run(tmp_path / "run")
    with pytest.raises(NotFiniteError), Reporter(run, {}):
        raise NotFiniteError("loss is nan")
    assert state(run) == "failed" and "a loss or gradient was not finite" in (run / PAGE).read_text(encoding="utf-8")


def test_a_page_that_cannot_be_written_is_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, tried, again = made_run(tmp_path / "run"), list[Path](), threading.Event()

    def full(path: Path, content: bytes) -> None:
        tried.append(path)
        if len(tried) == 3:
            again.set()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(reporter, "write_whole", full)
    monkeypatch.setattr(reporter, "LOOK_SECONDS", 0.01)
    monkeypatch.setattr(reporter.Reporter, "pause_seconds", lambda self, took: 0.0)
    with Reporter(run, {}):
        with (run / "metrics.jsonl").open("a") as file:
            file.write(line(61))
        assert again.wait(60)
    told = capsys.readouterr()
    assert told.err.count("warning: ") == 1 and "No space left" in told.err and told.out.count(PAGE) == 1
    assert not (run / PAGE).exists()


def test_other_processes_write_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Reporter(None, {}):
        pass
    assert capsys.readouterr().out == "" and not list(tmp_path.iterdir())


# Kills itself as `kill -9` does where the page is being written: with half of it on the disk, with all of it, and once
# it has its name.
KILLED = """
import os, signal, sys
from pathlib import Path
from trainer import atomic
from trainer.report.reporter import Reporter

run, at = Path(sys.argv[1]), sys.argv[2]
def kill(*_):
    os.kill(os.getpid(), signal.SIGKILL)
def half(self, content):
    with self.open("wb") as file:
        file.write(content[: len(content) // 2])
    kill()
if at == "half":
    Path.write_bytes = half
else:
    setattr(atomic, {"before its name": "rename_file", "after its name": "flush_folder"}[at], kill)
with Reporter(run, {}):
    pass
"""


@pytest.mark.full
@pytest.mark.parametrize("at", ["half", "before its name", "after its name"])
def test_a_kill_while_the_page_is_written_leaves_the_old_or_the_new_one_whole(tmp_path: Path, at: str) -> None:
    run = made_run(tmp_path / "run")
    with Reporter(run, {}) as report:
        report.exit_code = EXIT_RESUME
    assert state(run) == "stopped"
    old = (run / PAGE).read_bytes()
    command = [sys.executable, "-c", KILLED, str(run), at]
    killed = subprocess.run(command, env=environ(PYTHONPATH=import_path()), timeout=120)
    assert killed.returncode == -signal.SIGKILL
    if at == "after its name":
        assert state(run) == "finished" and (run / PAGE).read_text(encoding="utf-8").rstrip().endswith("</html>")
    else:
        assert (run / PAGE).read_bytes() == old
    with Reporter(run, {}):
        pass
    assert state(run) == "finished" and not list(run.glob("*.partial"))
