"""How a run ends, for whoever started it: `output_dir/exit_code`, since launchers make 1 of every code but 0."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from types import TracebackType

from trainer.atomic import write_once
from trainer.errors import EXIT_FAILED, EXIT_RESUME, StorageError, exit_code_of
from trainer.run.lock import RunLock, launch_of, read_holder
from trainer.run.signals import ignore_requests

NAME = "exit_code"
# Longest wait of a rank that fails at once for the first process to hold the folder.
FIRST_SECONDS = 5.0


class ExitCode:
    """Holds output_dir while entered, and leaves there the number that the run ended with.

    The first process takes the lock, removes the former run's number and writes its own. Another writes
    only if it fails. The first number stays: those who end because of another's failure change nothing, and
    neither does a process whose first process was refused the folder.
    """

    def __init__(self, output_dir: str, *, first: bool):
        self._root = Path(output_dir)
        self._first = first
        self._lock: RunLock | None = None
        self.value = EXIT_FAILED  # what the process ends with, unless it raises

    def __enter__(self) -> ExitCode:
        """Raises ConfigError where another run holds the folder, StorageError where it cannot be written."""
        if self._first:
            try:
                self._root.mkdir(parents=True, exist_ok=True)
                self._lock = RunLock(self._root)
                (self._root / NAME).unlink(missing_ok=True)
            except OSError as error:
                raise StorageError(f"--output_dir {self._root} cannot be written ({error}): choose another") from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        ignore_requests()
        if self._first or error is not None:
            code = self.value if error is None else exit_code_of(error)
            self.record(code, wait_seconds=0.0 if code == EXIT_RESUME else FIRST_SECONDS)
        if self._lock is not None:
            self._lock.close()

    def record(self, code: int, *, wait_seconds: float = 0.0) -> None:
        """Write `code`, unless this run has one already, or does not hold the folder after so many seconds."""
        if self._first or self._is_ours(wait_seconds):
            try:
                write_once(self._root / NAME, f"{code}\n".encode())
            except OSError as error:
                sys.stderr.write(f"\n{self._root / NAME}: {code} could not be written ({error})\n")

    def _is_ours(self, seconds: float) -> bool:
        """Whether this launch's first process holds the folder, or comes to within so many seconds."""
        deadline = time.monotonic() + seconds
        while True:
            holder = read_holder(self._root)
            if holder is not None and holder.launch == launch_of(os.environ):
                return True
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.1)
