"""Write the page of a run, report.html, at any time: while it trains, after it, or for a folder of an older version.

python scripts/report.py models
python scripts/report.py sweep/* --output sweep.html
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

try:
    from trainer.atomic import write_whole
    from trainer.errors import EXIT_DONE, ConfigError, StorageError, TrainerError
    from trainer.flags.config import Config
    from trainer.flags.flag import defaults_of
    from trainer.flags.paths import expanded
    from trainer.report.run_facts import RunReader
    from trainer.report.run_page import PAGE, page_of_run, page_of_runs
    from trainer.run.console import Console
except ImportError as missing:
    sys.exit(f"error: {missing}. Install the project (bash scripts/setup.sh) and use its Python: .venv/bin/python")

PAGE_OF_RUNS = "runs.html"
OF_A_RUN = ("metrics.jsonl", "config.json", "checkpoints", "samples")


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose refusals are ConfigErrors."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}. All flags: --help")


def main(argv: Sequence[str]) -> int:
    """Run the program; returns its exit code (see trainer/errors.py)."""
    try:
        request = read_request(argv)
        runs = list(map(run_of, request.runs))
        goal = Path(request.output) if request.output else _page_of(runs)
        write(goal, runs)
    except TrainerError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return EXIT_DONE


def read_request(argv: Sequence[str]) -> argparse.Namespace:
    """The runs and the goal. Raises ConfigError; --help leaves by SystemExit(0)."""
    parser = Parser(
        prog="report.py", description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", type=expanded, help="the output_dir of a run")
    parser.add_argument(
        "--output", metavar="FILE", type=expanded,
        help=f"the page to write; without it RUN/{PAGE}, and of several runs {PAGE_OF_RUNS} here",
    )  # fmt: skip
    return parser.parse_args(argv)


def run_of(name: str) -> Path:
    """The folder of a run. Raises ConfigError where it is none."""
    folder = Path(name)
    if not folder.is_dir():
        raise ConfigError(f"{name} is no folder: give the --output_dir of a run")
    if not any((folder / one).exists() for one in OF_A_RUN):
        raise ConfigError(f"{name} holds no run: there is none of {', '.join(OF_A_RUN)} in it")
    return folder


def write(goal: Path, runs: Sequence[Path]) -> None:
    """Write the page of one run, or that of several side by side. Raises StorageError."""
    try:
        goal.parent.mkdir(parents=True, exist_ok=True)
        readers = list(map(RunReader, runs))
        if len(readers) == 1:
            page = page_of_run(readers[0], goal.parent, defaults_of(Config))
        else:
            page = page_of_runs(readers, goal.parent)
        write_whole(goal, page.encode("utf-8", "replace"), shared=True)  # the run itself may write it just now
    except OSError as error:
        raise StorageError(f"the page {goal} cannot be made ({error}): give another --output") from error
    print(f"the page: {goal}")


def _page_of(runs: Sequence[Path]) -> Path:
    return runs[0] / PAGE if len(runs) == 1 else Path(PAGE_OF_RUNS)


if __name__ == "__main__":
    with Console(shows_libraries=True):
        sys.exit(main(sys.argv[1:]))
