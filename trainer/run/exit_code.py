"""The exit code of a run, left in the file `exit_code` of output_dir for whoever started the run.

The file is needed because `accelerate launch` and torchrun turn every exit code but 0 into 1.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from trainer.atomic import write_once
from trainer.errors import EXIT_FAILED, EXIT_RESUME, StorageError, exit_code_of
from trainer.run.lock import RunLock, launch_of, read_holder
from trainer.run.signals import ignore_requests

FILE_NAME = "exit_code"
# A rank may fail before rank 0 holds output_dir. It waits at most so long for that, to be allowed to write its code.
HOLDER_SECONDS = 5.0


class ExitCodeFile:
    """Holds output_dir for this run while entered, and leaves the run's exit code in it.

    The first process (rank 0) takes the lock, removes the code of the run before, and writes a code when it leaves.
    Any other process writes a code only if it fails, and only if the first process of its own launch holds the folder.
    The first code that is written stays: a process that ends because another one failed does not hide that failure.
    """

    def __init__(self, output_dir: str, *, first: bool, on_held: Callable[[], None] = lambda: None):
        """on_held: called as soon as this launch is known to hold the folder, in which this process may write then."""
        self._root = Path(output_dir)
        self._first = first
        self.on_held = on_held
        self._lock: RunLock | None = None
        self.code = EXIT_FAILED  # to be set inside the block: what the process ends with, unless it raises

    def __enter__(self) -> ExitCodeFile:
        """Raises ConfigError where another run holds the folder, StorageError where it cannot be written."""
        if self._first:
            try:
                self._root.mkdir(parents=True, exist_ok=True)
                self._lock = RunLock(self._root)
                (self._root / FILE_NAME).unlink(missing_ok=True)
            except OSError as error:
                raise StorageError(f"--output_dir {self._root} cannot be written ({error}): choose another") from error
            self.on_held()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        ignore_requests()  # a signal that comes now must not keep the code from being written
        if self._first or error is not None:
            code = self.code if error is None else exit_code_of(error)
            self.record(code, wait_seconds=0.0 if code == EXIT_RESUME else HOLDER_SECONDS)
        if self._lock is not None:
            self._lock.close()

    def record(self, code: int, *, wait_seconds: float = 0.0) -> None:
        """Write `code`, unless a code of this run is there already.

        Called from the watching threads too (trainer/engine/peer_watch.py), before a process ends itself.

        wait_seconds  how long a process other than the first waits for the first one of its launch to hold the folder;
                      if that does not happen, the folder is another run's and nothing is written
        """
        if self._first or self._held_by_this_launch(wait_seconds):
            self.on_held()
            try:
                write_once(self._root / FILE_NAME, f"{code}\n".encode())
            except OSError as error:
                sys.stderr.write(f"{self._root / FILE_NAME}: {code} could not be written ({error})\n")

    def _held_by_this_launch(self, wait_seconds: float) -> bool:
        deadline = time.monotonic() + wait_seconds
        while True:
            with suppress(OSError):  # unreadable now is not held yet
                holder = read_holder(self._root)
                if holder is not None and holder.launch == launch_of(os.environ):
                    return True
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.1)
