"""What is said reaches the log file whatever the console is, and nothing that is said ends a run."""

from __future__ import annotations

import copy
import io
import logging
import os
import pty
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tqdm import tqdm

from tests.runs import ROOT, environ
from trainer.run.console import Console
from trainer.run.log_file import BoundedFile

SONG = "Träume_夜の歌_🎵.wav"


@contextmanager
def console_on(descriptor: int, encoding: str = "utf-8") -> Iterator[Console]:
    """A Console over stdout and stderr that are both this descriptor, strict about their encoding as Python's are."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (io.TextIOWrapper(io.FileIO(descriptor, "w", closefd=False), encoding) for _ in range(2))
    try:
        with Console() as console:
            yield console
        sys.stdout.flush()  # as Python does at its end: an error here would be exit code 120
    finally:
        sys.stdout, sys.stderr = before
        os.close(descriptor)


def lines_of(log: Path) -> list[str]:
    """What was said, without header and times."""
    texts = log.read_text(encoding="utf-8").splitlines()
    return [text[9:] for text in texts if text[2:3] == text[5:6] == ":"]


def a_pipe_without_a_reader() -> int:
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def a_closed_terminal() -> int:
    ours, theirs = pty.openpty()
    os.close(ours)
    return theirs


@pytest.mark.parametrize("gone", [a_pipe_without_a_reader, a_closed_terminal])
def test_a_console_that_is_gone_ends_nothing_and_the_log_has_all_lines(gone, tmp_path):
    with console_on(gone()) as console:
        console.log_to(tmp_path / "log.txt")
        for number in range(3):
            print(f"line {number}", flush=True)
            print(f"error {number}", file=sys.stderr)
        for _ in tqdm(range(2), mininterval=0):
            pass
    assert lines_of(tmp_path / "log.txt") == [f"{what} {number}" for number in range(3) for what in ("line", "error")]


def test_a_console_that_goes_between_two_lines_ends_nothing(tmp_path):
    reader, writer = os.pipe()
    with console_on(writer) as console:
        console.log_to(tmp_path / "log.txt")
        print("first")
        assert os.read(reader, 100) == b"first\n"
        os.close(reader)
        print("second")
    assert lines_of(tmp_path / "log.txt") == ["first", "second"]


@pytest.mark.parametrize("encoding,shown", [("ascii", "Tr\\xe4ume_\\u591c"), ("iso-8859-1", "Träume_\\u591c")])
def test_what_the_console_cannot_show_is_escaped_there_and_whole_in_the_log(encoding, shown, tmp_path):
    reader, writer = os.pipe()
    with console_on(writer, encoding) as console:
        console.log_to(tmp_path / "log.txt")
        print(SONG)
        print(os.fsdecode(b"\xff.wav"))  # a file name that is no text
    assert shown in os.read(reader, 1000).decode(encoding)
    assert lines_of(tmp_path / "log.txt") == [SONG, "\\udcff.wav"]


def test_the_log_has_no_frames_of_bars_and_lines_stand_beside_a_bar(tmp_path):
    reader, writer = os.pipe()
    with console_on(writer) as console:
        console.log_to(tmp_path / "log.txt")
        with tqdm(total=3, mininterval=0, desc="training") as bar:
            bar.update()
            print("SIGTERM: stopping after this step", file=sys.stderr)
            bar.update()
        print("done")
    assert lines_of(tmp_path / "log.txt") == ["SIGTERM: stopping after this step", "done"]
    shown = os.read(reader, 10_000).decode().split("\n")
    assert "SIGTERM: stopping after this step" in shown and "done" in shown


def test_what_was_said_before_the_folder_is_held_comes_first_and_a_refused_run_writes_nothing(tmp_path):
    with console_on(os.open(os.devnull, os.O_WRONLY)):
        print("refused")
    assert not list(tmp_path.iterdir())
    for start in range(2):
        with console_on(os.open(os.devnull, os.O_WRONLY)) as console:
            print(f"before {start}")
            console.log_to(tmp_path / "log.txt")
            print(f"after {start}")
            console.log_to(tmp_path / "another.txt")
    assert lines_of(tmp_path / "log.txt") == ["before 0", "after 0", "before 1", "after 1"]
    assert (tmp_path / "log.txt").read_text().count("\ncommand: ") == 2
    assert not (tmp_path / "another.txt").exists()


def test_a_handler_of_a_signal_may_speak_while_the_program_speaks(tmp_path):
    """With Python's own streams this is `RuntimeError: reentrant call inside`."""
    heard = []

    def handler(number: int, frame: object) -> None:
        heard.append(number)
        sys.stdout.write("the handler's line\n")

    former = signal.signal(signal.SIGALRM, handler)
    reader, writer = os.pipe()
    reading = threading.Thread(target=lambda: [None for _ in iter(lambda: os.read(reader, 65536), b"")])
    reading.start()
    try:
        with console_on(writer) as console:
            console.log_to(tmp_path / "log.txt")
            signal.setitimer(signal.ITIMER_REAL, 1e-4, 1e-4)
            for number in range(2000):
                sys.stdout.write(f"line {number}\n")
            signal.setitimer(signal.ITIMER_REAL, 0)
    finally:
        signal.signal(signal.SIGALRM, former)
        reading.join()
    said = lines_of(tmp_path / "log.txt")
    assert heard and said.count("the handler's line") == len(heard) and len(said) == 2000 + len(heard)


def test_a_console_that_is_full_and_does_not_block_loses_nothing(tmp_path):
    """Some programs leave a shared terminal or pipe so, and writing raises BlockingIOError."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    read: list[bytes] = []
    reading = threading.Thread(target=lambda: read.extend(iter(lambda: os.read(reader, 4096), b"")))
    text = "x" * 300_000
    with console_on(writer):
        threading.Timer(0.1, reading.start).start()
        print(text)
    while not reading.ident:
        pass
    reading.join()
    assert b"".join(read).decode() == f"{text}\n"


def test_warnings_of_libraries_go_to_the_log_and_their_errors_to_both(tmp_path):
    reader, writer = os.pipe()
    with console_on(writer) as console:
        console.log_to(tmp_path / "log.txt")
        library = logging.getLogger(f"library{os.getpid()}")
        library.addHandler(logging.StreamHandler(sys.stdout))
        library.propagate = False
        library.warning("Setting accelerator to CPU")
        library.warning("%d", "no number")
        library.error("no space left")
        library.warning("again: PUT %s", "https://files.example/a/b?X-Amz-Signature=secret&x=1 [Retry 1/5]")
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.warn("torch.x is deprecated", FutureWarning, stacklevel=1)
        own = logging.getLogger("trainer.of_this_test")
        own.addHandler(logging.StreamHandler())
        own.warning("a part is damaged")
    assert os.read(reader, 1000).decode().splitlines() == ["no space left", "a part is damaged"]
    log = (tmp_path / "log.txt").read_text()
    assert "WARNING of library" in log and "Setting accelerator to CPU" in log
    assert "FutureWarning: torch.x is deprecated" in log and "no space left" in log and "no number" in log
    assert "PUT https://files.example/a/b [Retry 1/5]" in log and "secret" not in log


def test_what_libraries_do_not_show_is_left_to_their_own_handlers(tmp_path):
    """torch's handler of traces removes itself at its first record; wandb writes a file of debugging messages."""
    with console_on(os.open(os.devnull, os.O_WRONLY)) as console:
        console.log_to(tmp_path / "log.txt")
        library = logging.getLogger(f"library of files {os.getpid()}")
        library.setLevel(logging.DEBUG)
        library.propagate = False
        library.addHandler(logging.FileHandler(tmp_path / "debug.log"))
        shown = logging.StreamHandler()
        shown.setLevel(logging.WARNING)
        library.addHandler(shown)
        library.debug("sent 17 bytes")
        library.warning("offline")
        without = logging.getLogger(f"library without handlers {os.getpid()}")
        without.propagate = False
        without.warning("deprecated")
    assert (tmp_path / "debug.log").read_text() == "sent 17 bytes\noffline\n"
    assert [line.split(": ")[1] for line in lines_of(tmp_path / "log.txt")] == ["offline", "deprecated"]


def test_a_stream_can_be_copied():
    with Console():
        assert copy.copy(sys.stdout).encoding == sys.stdout.encoding


def test_a_traceback_is_in_the_log(tmp_path):
    with pytest.raises(ZeroDivisionError), console_on(os.open(os.devnull, os.O_WRONLY)) as console:
        console.log_to(tmp_path / "log.txt")
        print("half a line", end="")
        _ = 1 / 0
    said = lines_of(tmp_path / "log.txt")
    assert "ZeroDivisionError: division by zero" in said and said[0].startswith("Traceback")
    assert "half a line" in said


def test_a_log_on_a_full_disk_or_in_a_folder_that_is_gone_ends_nothing(tmp_path):
    (tmp_path / "full.txt").symlink_to("/dev/full")
    for log in (tmp_path / "full.txt", tmp_path / "removed" / "too" / "log.txt"):
        reader, writer = os.pipe()
        with console_on(writer) as console:
            console.log_to(log)
            print("said")
        assert os.read(reader, 100) == b"said\n"


def test_lines_that_were_lost_are_counted_once_the_disk_takes_lines_again(tmp_path):
    file = BoundedFile(tmp_path / "folder" / "below" / "log.txt")
    file.add("lost\n")
    (tmp_path / "folder" / "below").mkdir(parents=True)
    file.add("kept\n")
    file.add("and this\n")
    first, *others = (tmp_path / "folder" / "below" / "log.txt").read_text().splitlines()
    assert "could not be written" in first and others == ["kept", "and this"]


def test_of_a_log_that_is_too_long_the_oldest_lines_go_and_lines_stay_whole(tmp_path):
    file = BoundedFile(tmp_path / "log.txt", most_bytes=10_000)
    lines = [f"line {number} {'x' * (number % 50)}" for number in range(2000)]
    for line in lines:
        file.add(f"{line}\n")
        assert (tmp_path / "log.txt").stat().st_size <= 10_100
    said, *kept = (tmp_path / "log.txt").read_text().splitlines()
    assert "cut" in said and len(kept) > 50 and kept == lines[-len(kept) :]


def test_help_into_a_pipe_that_is_closed_is_quiet():
    """`python launch.py --help | head -1`."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, str(ROOT / "launch.py"), "--help"], stdout=writer, stderr=subprocess.PIPE, text=True
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_curve_is_shown_where_its_blocks_are_no_characters(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 7.5}\n{"step": 2, "loss": 3.5}\n')
    script = [sys.executable, str(ROOT / "scripts/loss_curve.py"), str(tmp_path)]
    done = subprocess.run(script, env=environ(PYTHONIOENCODING="ascii"), capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "loss 7.50 \\u2588\\u2584 3.500 after 2 steps\n"), done.stderr
