"""scripts/gpu_check.py loses no result, goes on where it was cut, and lists tests that exist."""

from __future__ import annotations

import ast
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from gpu_checks import record
from gpu_checks.check import ROOT, Check
from gpu_checks.digest import depends_on, digest
from gpu_checks.listed import CHECKS
from gpu_checks.record import Result
from gpu_checks.run import Ended, _kill_group, run_all, run_check

from scripts import gpu_check as script
from trainer.errors import EXIT_USAGE, ConfigError, DataError

CHECK = Check(name="a check", claim="it holds", test="tests/gpu/test_cuda.py::test", usual_seconds=1)
RESULT = Result(
    check="a check",
    outcome="passed",
    figure="1e-7",
    message="",
    seconds=1.0,
    date="2026-01-01T00:00:00+00:00",
    card="a card",
    digest="0",
    versions={"torch": "2.11"},
)


def test_every_check_names_a_test_that_exists_and_every_test_of_a_gpu_is_listed() -> None:
    listed = {check.test.partition("[")[0] for check in CHECKS}
    written = {
        f"{path.relative_to(ROOT)}::{node.name}"
        for path in ROOT.glob("tests/gpu/test_*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }
    of_a_cpu = {
        "tests/gpu/test_fake_worlds.py::test_a_rank_of_a_small_models_world_holds_its_share",
        "tests/gpu/test_told_time.py::test_on_a_cpu_the_rehearsal_alone_tells_a_time",
        "tests/gpu/test_waiting.py::test_the_same_is_read_once_on_a_cpu",
    }
    assert listed == written - of_a_cpu
    assert len({check.name for check in CHECKS}) == len(CHECKS), "results are remembered by name"


@pytest.mark.full
def test_pytest_finds_every_check_by_its_parameters() -> None:
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "tests/gpu"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.splitlines()
    assert {check.test for check in CHECKS} <= set(found)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    files = {
        "setup.cfg": "",
        "trainer/__init__.py": "",
        "trainer/used.py": "import os\n",
        "trainer/not_used.py": "",
        "scripts/helper.py": "def work():\n    from trainer import used\n",
        "tests/test_it.py": "import helper\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_a_digest_is_of_the_files_that_a_test_imports_and_of_no_other(project: Path) -> None:
    file = Path("tests/test_it.py")
    names = {path.as_posix() for path in depends_on(project, file)}
    assert names == {"setup.cfg", "trainer/__init__.py", "trainer/used.py", "scripts/helper.py", "tests/test_it.py"}
    before = digest(project, file)
    (project / "trainer/not_used.py").write_text("changed = 1\n")
    assert digest(project, file) == before
    (project / "trainer/used.py").write_text("import os  # changed\n")
    assert digest(project, file) != before


def test_a_check_of_whole_runs_depends_on_the_whole_trainer() -> None:
    names = {path.as_posix() for path in depends_on(ROOT, Path("tests/gpu/test_whole_runs.py"))}
    rooms = ("data", "engine", "model", "run", "training")
    whole = {path.relative_to(ROOT).as_posix() for room in rooms for path in ROOT.glob(f"trainer/{room}/*.py")}
    # Of the rooms, what scripts alone import.
    whole -= {"trainer/data/prepared_writing.py", "trainer/data/prepared_upload.py"}
    whole -= {"trainer/model/passing_codec.py", "trainer/model/fitted_codebooks.py"}
    assert names >= whole | {"launch.py", "trainer/wiring/training.py", "tests/ranks/launches.py"}


def test_results_come_back_as_they_were_written(tmp_path: Path) -> None:
    failed = replace(RESULT, outcome="failed", message="line | one\nline two", date="2026-01-02T00:00:00+00:00")
    record.write(tmp_path, [RESULT, failed], [CHECK])
    assert record.read(tmp_path) == [RESULT, failed]
    text = (tmp_path / record.MARKDOWN).read_text()
    assert "**failed**" in text and "    line two" in text and "torch 2.11" in text
    assert record.has_passed([RESULT, failed], CHECK, "a card", "0") == RESULT
    for card, code in (("another card", "0"), ("a card", "1")):
        assert record.has_passed([RESULT, failed], CHECK, card, code) is None


def test_of_each_outcome_on_a_card_the_newest_result_is_kept(tmp_path: Path) -> None:
    newer = replace(RESULT, date="2026-02-01T00:00:00+00:00", digest="1")
    elsewhere = replace(RESULT, card="another card")
    assert record.joined([newer], [RESULT, elsewhere]) == [elsewhere, newer]


@pytest.mark.parametrize("content", ["", "{", '[{"check": 1}]', "[1]"])
def test_a_file_of_results_that_is_none_is_refused_and_stays(content: str, tmp_path: Path) -> None:
    (tmp_path / record.JSON).write_text(content)
    with pytest.raises(DataError, match="move it away"):
        record.read(tmp_path)
    assert (tmp_path / record.JSON).read_text() == content


def test_the_page_in_docs_is_of_the_results_beside_it() -> None:
    results = record.read(ROOT / "docs")
    assert (ROOT / "docs" / record.MARKDOWN).read_text() == record.markdown(results, CHECKS)


def named(name: str, **fields: object) -> Check:
    return replace(CHECK, name=name, **fields)  # type: ignore[arg-type]


def test_checks_run_beside_each_other_while_their_memory_fits_and_one_that_measures_time_runs_alone() -> None:
    running: set[str] = set()
    seen: list[set[str]] = []
    lock = threading.Lock()

    def run(check: Check, seconds: float) -> Ended:
        with lock:
            running.add(check.name)
            seen.append(set(running))
        time.sleep(0.05)
        with lock:
            running.discard(check.name)
        return Ended(outcome="passed", figure="", message="", seconds=0)

    checks = [named("a", gib=6), named("b", gib=6), named("timed", alone=True), named("c", gib=6), named("d", gib=4)]
    ended = [check.name for check, _ in run_all(checks, seconds=60, at_once=4, card_gib=12, run=run)]
    assert sorted(ended) == ["a", "b", "c", "d", "timed"]
    assert {"timed"} in seen and not any("timed" in names and len(names) > 1 for names in seen)
    assert {"a", "b"} not in seen, "12 GiB of a card's 12 leave nothing for what else lies there"
    assert {"c", "d"} in seen


def test_what_does_not_fit_into_the_time_left_is_left_out_and_a_shorter_one_runs() -> None:
    checks = [named("long", usual_seconds=100), named("short", usual_seconds=1)]
    limits: list[float] = []

    def run(check: Check, seconds: float) -> Ended:
        limits.append(seconds)
        return Ended(outcome="passed", figure="", message="", seconds=0)

    assert [check.name for check, _ in run_all(checks, seconds=50, at_once=1, card_gib=80, run=run)] == ["short"]
    assert limits[0] <= 50


@pytest.fixture
def own_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which `run_check` runs pytest."""
    monkeypatch.setattr("gpu_checks.run.ROOT", tmp_path)
    return tmp_path


def checked(root: Path, body: str, seconds: float = 60) -> Ended:
    (root / "test_it.py").write_text(f"import os, subprocess, pytest\ndef test():\n    {body}\n")
    return run_check(replace(CHECK, test="test_it.py::test"), seconds)


def test_a_check_that_fails_is_told_with_its_message_and_its_figure(own_root: Path) -> None:
    found = checked(own_root, "print('\\nFIGURE 3 ms'); assert 1 + 1 == 3, 'sums differ'")
    assert (found.outcome, found.figure) == ("failed", "3 ms") and "sums differ" in found.message
    assert checked(own_root, "print('\\nFIGURE 3 ms')").outcome == "passed"
    late = "import atexit; atexit.register(os.system, 'echo UserWarning: two leaked semaphores >&2')"
    assert checked(own_root, late).outcome == "passed", "what is printed after pytest's summary is no failure"
    assert checked(own_root, "pytest.skip('no GPU')").outcome == "failed", "a skipped test has shown nothing"


def test_a_check_that_hangs_is_cut_with_all_its_processes(own_root: Path) -> None:
    body = "child = subprocess.Popen(['sleep', '600']); print('\\nCHILD', child.pid, flush=True); child.wait()"
    found = checked(own_root, body, 5)
    assert found.outcome == "cut" and "CHILD" in found.message
    child = int(found.message.split("CHILD")[1].split()[0])
    assert not _is_running(child)


def test_a_kill_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    process = subprocess.Popen(["sleep", "600"], start_new_session=True)
    kill = os.killpg
    late = threading.Timer(0.5, kill, (process.pid, signal.SIGKILL))  # as where a driver holds the process
    monkeypatch.setattr(os, "killpg", lambda *_: late.start())
    _kill_group(process.pid)
    assert not _is_running(process.pid)
    assert process.wait() == -signal.SIGKILL


def _is_running(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


def test_a_cut_run_is_continued_with_what_has_not_passed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checks = (named("first"), named("second"), named("needs", needs=("no_such_package",)), named("big", gib=99))
    ran: list[str] = []

    def run_some(chosen, **_):
        for check in chosen:
            ran.append(check.name)
            outcome = "cut" if check.name == "second" and ran.count("second") == 1 else "passed"
            yield check, Ended(outcome=outcome, figure="7", message="why", seconds=1.0)

    monkeypatch.setattr(script, "CHECKS", checks)
    monkeypatch.setattr(script, "run_all", run_some)
    monkeypatch.setattr(script, "_card", lambda: {"name": "a card", "gib": 80.0, "CUDA": "13"})
    flags = ["--results", str(tmp_path)]
    assert script.main(flags) == 0
    written = {result["check"]: result for result in json.loads((tmp_path / record.JSON).read_text())}
    assert written["first"]["versions"]["torch"] == torch.__version__, "beside what docs/ had from other GPUs"
    assert script.main(flags) == 0
    assert ran == ["first", "second", "second"]
    said = capsys.readouterr().out
    assert "needs the package no_such_package" in said and "needs 99 GiB" in said and "passed on this code" in said
    assert script.main([*flags, "--again", "--only", "first"]) == 0 and ran[-1] == "first"


def test_checks_are_named_whole_or_by_a_part_and_run_in_the_order_of_the_names(monkeypatch: pytest.MonkeyPatch) -> None:
    checks = tuple(named(name) for name in ("a step", "a step beside another", "links", "another"))
    monkeypatch.setattr(script, "CHECKS", checks)

    def chosen(*words: str) -> list[str]:
        return [check.name for check in script._chosen(words)]

    assert chosen() == [check.name for check in checks]
    assert chosen("links", "a step") == ["links", "a step"], "a whole name is that check alone"
    assert chosen("other", "step") == ["a step beside another", "another", "a step"]
    with pytest.raises(ConfigError, match="'no such name'"):
        chosen("links", "no such name")


def test_it_lists_the_checks_without_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert script.main(["--dry_run", "--results", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert all(check.name in said for check in CHECKS) and f"{len(CHECKS)} checks" in said
    assert script.main(["--dry_run", "--only", "no such name"]) == EXIT_USAGE


@pytest.mark.full
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert script.main(["--results", str(tmp_path)]) == EXIT_USAGE
    assert "torch finds no GPU" in capsys.readouterr().err
