"""A thread that keeps a run's report.html up to date. It touches neither torch nor any random state.

What goes wrong with a page is one warning and ends no run: what a page needs is on the disk, so that
scripts/report.py makes it at any time.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from trainer.atomic import write_whole
from trainer.errors import EXIT_DONE, exit_code_of

if TYPE_CHECKING:
    from trainer.report.run_facts import RunReader

SECONDS_BETWEEN = 60.0
LOOK_SECONDS = 2.0  # between looks at whether the first step is reported
# How long the end of a run waits for its last page: after all steps, and where it was stopped or has failed.
DONE_SECONDS, STOPPED_SECONDS = 60.0, 3.0
PAGE = "report.html"


class Reporter:
    """While entered, writes the page once a step is reported and then at most once in SECONDS_BETWEEN; and at the end.

    exit_code  to be set inside the block: what the run ends with, unless it raises
    """

    def __init__(self, root: Path | None, defaults: Mapping[str, object]):
        """root: the run's output_dir; None on the processes that do not report."""
        self.exit_code = EXIT_DONE
        self._root, self._defaults = root, defaults
        self._ended = threading.Event()
        self._warned = False
        self._least_bytes = 0 if root is None else _size(root / "metrics.jsonl")
        self._thread = threading.Thread(target=self._work, name="report", daemon=True)

    def __enter__(self) -> Reporter:
        if self._root is not None:
            when = "after its first step and then about once a minute"
            print(f"the page of this run, {when}: {self._root / PAGE}", flush=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._root is None:
            return
        if error is not None:
            self.exit_code = exit_code_of(error)
        done = self.exit_code == EXIT_DONE
        self._ended.set()
        self._thread.join(DONE_SECONDS if done else STOPPED_SECONDS)
        if not self._thread.is_alive() and not self._warned:
            print(f"the page of this run: {self._root / PAGE}", flush=True)

    def pause_seconds(self, took_seconds: float) -> float:
        """From a page to the next: on a slow disk, or a busy machine, pages take at most a twentieth of the time."""
        return max(SECONDS_BETWEEN, 20 * took_seconds)

    def _work(self) -> None:
        assert self._root is not None
        metrics = self._root / "metrics.jsonl"
        while not self._ended.wait(LOOK_SECONDS):
            size = _size(metrics)
            if size > self._least_bytes:
                break
            self._least_bytes = size  # a resumed run cuts off what it computes anew
        try:
            from trainer.report.run_facts import RunReader  # soundfile, and jinja2 with the page: not before step 1
        except ImportError as error:
            self._warn(error)
            return
        reader = RunReader(self._root)
        while not self._ended.is_set():
            started = time.monotonic()
            self._write(reader, alive=True)
            self._ended.wait(self.pause_seconds(time.monotonic() - started))
        self._write(reader, alive=False)

    def _write(self, reader: RunReader, *, alive: bool) -> None:
        assert self._root is not None
        try:
            from trainer.report.run_page import page_of_run

            exit_code = None if alive else self.exit_code
            page = page_of_run(reader, self._root, self._defaults, exit_code=exit_code, alive=alive)
            write_whole(self._root / PAGE, page.encode("utf-8", "replace"))
        except (OSError, ImportError, MemoryError) as error:
            self._warn(error)

    def _warn(self, error: BaseException) -> None:
        if not self._warned:
            self._warned = True
            print(
                f"warning: {PAGE} could not be written: {error}. The training goes on; scripts/report.py makes the page"
                " at any time",
                file=sys.stderr,
            )


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
