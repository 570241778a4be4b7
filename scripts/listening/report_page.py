"""report.html, made again by whoever has added something that it shows: scripts/report.py, recall.py and score.py."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from trainer.atomic import write_whole
from trainer.errors import StorageError
from trainer.flags.config import Config
from trainer.flags.flag import defaults_of
from trainer.report.run_facts import RunReader
from trainer.report.run_page import PAGE, page_of_run, page_of_runs


def remake_report(run: Path) -> None:
    """Write the run's report.html anew and say where it is. Where that cannot be done, it is a warning: what the page
    shows is on the disk already, and scripts/report.py makes the page at any time."""
    try:
        print(f"the page: {write_page(run / PAGE, [run])}")
    except StorageError as error:
        print(f"warning: {error}", file=sys.stderr)


def write_page(goal: Path, runs: Sequence[Path]) -> Path:
    """Write the page of one run, or that of several side by side; returns `goal`. Raises StorageError."""
    try:
        goal.parent.mkdir(parents=True, exist_ok=True)
        readers = list(map(RunReader, runs))
        if len(readers) == 1:
            page = page_of_run(readers[0], goal.parent, defaults_of(Config))
        else:
            page = page_of_runs(readers, goal.parent)
        write_whole(goal, page.encode("utf-8", "replace"), shared=True)  # the run itself may write it just now
    except OSError as error:
        raise StorageError(
            f"the page {goal} cannot be made ({error}): scripts/report.py writes it elsewhere with --output"
        ) from error
    return goal
