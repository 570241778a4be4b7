"""Write the page of a run, report.html, at any time: while it trains, after it, or for a folder of an older version.

python scripts/report.py models
python scripts/report.py sweep/* --output sweep.html

With --blind, a page on which a person listens without knowing which run, or which step, made a sound:

python scripts/report.py models --blind
python scripts/report.py --score listening_anna.json listening_ben.json
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

try:
    from listening import command
    from listening.report_page import write_page

    from trainer.errors import EXIT_DONE, ConfigError, TrainerError
    from trainer.flags.paths import expanded
    from trainer.flags.script_parser import ScriptParser
    from trainer.report.run_page import PAGE
    from trainer.run.console import Console
except ImportError as missing:
    sys.exit(f"error: {missing}. Install the project (bash scripts/setup.sh) and use its Python: .venv/bin/python")

PAGE_OF_RUNS = "runs.html"
OF_A_RUN = ("metrics.jsonl", "config.json", "checkpoints", "samples")


def main(argv: Sequence[str]) -> int:
    """Run the program; returns its exit code (see trainer/errors.py)."""
    try:
        request = read_request(argv)
        if request.blind or request.score:
            command.run(request)
            return EXIT_DONE
        runs = list(map(run_of, request.runs))
        goal = Path(request.output) if request.output else _page_of(runs)
        print(f"the page: {write_page(goal, runs)}")
    except TrainerError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return EXIT_DONE


def read_request(argv: Sequence[str]) -> argparse.Namespace:
    """The runs and the goal. Raises ConfigError; --help leaves by SystemExit(0)."""
    parser = ScriptParser(
        prog="report.py", description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", metavar="RUN", nargs="*", type=expanded, help="the output_dir of a run")
    parser.add_argument(
        "--output", metavar="FILE", type=expanded,
        help=f"the page to write; without it RUN/{PAGE}, and of several runs {PAGE_OF_RUNS} here; "
        f"with --blind {command.PAGE} in the first RUN",
    )  # fmt: skip
    command.add_flags(parser)
    request = parser.parse_args(argv)
    command.check_flags(request)
    if not request.runs and not request.score:
        raise ConfigError("give the output_dir of a run, as in: python scripts/report.py models")
    return request


def run_of(name: str) -> Path:
    """The folder of a run. Raises ConfigError where it is none."""
    folder = Path(name)
    if not folder.is_dir():
        raise ConfigError(f"{name} is no folder: give the --output_dir of a run")
    if not any((folder / one).exists() for one in OF_A_RUN):
        raise ConfigError(f"{name} holds no run: there is none of {', '.join(OF_A_RUN)} in it")
    return folder


def _page_of(runs: Sequence[Path]) -> Path:
    return runs[0] / PAGE if len(runs) == 1 else Path(PAGE_OF_RUNS)


if __name__ == "__main__":
    with Console(shows_libraries=True):
        sys.exit(main(sys.argv[1:]))
