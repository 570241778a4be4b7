"""The log file of a run: whole lines, added by a thread, at most 20 MB, and never a reason to end or to wait."""

from __future__ import annotations

import os
import platform
import shlex
import socket
import sys
import threading
import time
from collections import deque
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from queue import SimpleQueue

from trainer.atomic import write_whole

MOST_BYTES = 20_000_000
MOST_WAITING = 10_000  # lines that are kept for a file which is not open yet
# Whose versions the header names. Looking them up imports nothing.
PACKAGES = ("torch", "transformers", "accelerate", "deepspeed", "peft", "bitsandbytes", "triton", "numpy")


def log_path(output_dir: str, rank: int) -> Path:
    """Where a process writes what it says: log.txt for the first, which prints for all."""
    root = Path(output_dir)
    return root / "log.txt" if rank == 0 else root / "logs" / f"rank-{rank:05d}.txt"


class LogFile:
    """Takes lines at any time, from any thread and from signal handlers; writes them once `open` has named the file.

    The thread makes that a disk which does not answer holds up nobody else. A line that cannot be written is counted,
    and the count is said once the disk takes lines again.
    """

    def __init__(self) -> None:
        # Not queue.Queue: a signal handler may interrupt its put() and would then wait for itself.
        self._queue: SimpleQueue[str | Path | threading.Event | None] = SimpleQueue()
        self._path: Path | None = None
        self._thread = threading.Thread(target=self._write_queue, daemon=True, name="log")
        self._thread.start()

    def add(self, line: str) -> None:
        """Add a line, without its end, with the time of day before it; an empty one is left out."""
        if line.strip():
            self._queue.put(f"{time.strftime('%H:%M:%S')} {line}\n")

    def open(self, path: Path) -> None:
        """Write to this file from now on, what was added before included. A second call does nothing."""
        if self._path is None:
            self._path = path
            self._queue.put(path)

    def settle(self, seconds: float) -> None:
        """Return once all lines that were added are in the file, or after so many seconds."""
        written = threading.Event()
        self._queue.put(written)
        written.wait(seconds)

    def close(self, seconds: float) -> None:
        """Write what was added and end the thread, waiting for at most so many seconds."""
        self._queue.put(None)
        self._thread.join(seconds)

    def _write_queue(self) -> None:
        file: BoundedFile | None = None
        waiting: deque[str] = deque(maxlen=MOST_WAITING)
        while (item := self._queue.get()) is not None:
            if isinstance(item, threading.Event):
                item.set()
            elif isinstance(item, Path):
                file = BoundedFile(item)
                file.add(header() + "".join(waiting))
            elif file is None:
                waiting.append(item)
            else:
                file.add(item)


class BoundedFile:
    """A text file that grows by whole lines; where it would become too long, its older half is cut off."""

    def __init__(self, path: Path, *, most_bytes: int = MOST_BYTES):
        self._path, self._most_bytes = path, most_bytes
        self._lost = 0  # calls of `add` whose lines could not be written
        self._line_is_cut = False

    def add(self, lines: str) -> None:
        """Add lines that end in newlines; where that cannot be done, they are lost, and the next call says so."""
        said = f"(some lines before this could not be written here: {self._lost} times)\n" if self._lost else ""
        data = ("\n" * self._line_is_cut + said + lines).encode("utf-8", "backslashreplace")
        try:
            self._path.parent.mkdir(exist_ok=True)  # logs/; not more, should somebody have removed the whole folder
            self._make_room(len(data))
            # Opened for each line: so a line is there for other machines too, and the file may be moved away.
            with self._path.open("ab", buffering=0) as file:
                written = file.write(data)
        except OSError:
            self._lost += 1
            return
        self._line_is_cut = written < len(data)  # the disk became full in the middle
        self._lost = int(self._line_is_cut)

    def _make_room(self, bytes_more: int) -> None:
        if not self._path.exists() or self._path.stat().st_size + bytes_more <= self._most_bytes:
            return
        with self._path.open("rb") as file:
            file.seek(-min(self._most_bytes // 2, self._path.stat().st_size), os.SEEK_END)
            file.readline()
            newer = file.read()
        write_whole(self._path, b"(older lines were cut off)\n" + newer)


def header() -> str:
    """What stands before the lines of each start: when, where, by which command, with which versions."""
    return (
        f"\n==== {time.strftime('%Y-%m-%d %H:%M:%S %z')}, process {os.getpid()} on {socket.gethostname()}\n"
        f"command: {shlex.join(sys.orig_argv)}\n"
        f"versions: Python {platform.python_version()}, "
        + ", ".join(f"{name} {found}" for name in PACKAGES if (found := _version(name)))
        + "\n"
    )


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
