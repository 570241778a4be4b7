"""A page on which a person listens to the sounds of runs without knowing which run, or which step, made them.

python scripts/report.py models --blind
python scripts/report.py models other_models --blind --steps last --output blind.html
python scripts/report.py --score listening_anna.json listening_ben.json
"""

from __future__ import annotations

import argparse
import re
import secrets
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

try:
    from trainer.atomic import write_whole
    from trainer.errors import EXIT_DONE, ConfigError, StorageError, TrainerError
    from trainer.flags.flag import did_you_mean
    from trainer.flags.paths import expanded
    from trainer.run.console import Console
except ImportError as missing:
    sys.exit(f"error: {missing}. Install the project (bash scripts/setup.sh) and use its Python: .venv/bin/python")

PAGE = "blind.html"


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose refusals are ConfigErrors, with the nearest flag."""

    def error(self, message: str) -> NoReturn:
        unknown = re.match(r"unrecognized arguments: (--[\w-]+)", message)
        if unknown:
            names = [option for action in self._actions for option in action.option_strings]
            raise ConfigError(f"{unknown[1]} is no flag.{did_you_mean(unknown[1], names, '')}")
        raise ConfigError(f"{message}. All flags: --help")


def main(argv: Sequence[str]) -> int:
    """Run the program; returns its exit code (see trainer/errors.py)."""
    try:
        flags = read_flags(argv)
        if flags.score:
            print_score(flags.score)
        else:
            write_blind(flags)
        return EXIT_DONE
    except TrainerError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


def read_flags(argv: Sequence[str]) -> argparse.Namespace:
    """The flags. Raises ConfigError; --help leaves by SystemExit(0)."""
    parser = Parser(
        prog="report.py", description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", metavar="RUN", nargs="*", type=expanded, help="the output_dir of a run")
    parser.add_argument("--output", type=expanded, help="the page to write (default: blind.html in the first RUN)")
    add_blind_flags(parser)
    flags = parser.parse_args(argv)
    if not flags.score and not flags.blind:
        raise ConfigError("nothing to do: give --blind with the output_dir of a run, or --score with saved files")
    check_blind_flags(flags)
    return flags


def add_blind_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of blind listening."""
    blind = parser.add_argument_group("blind listening")
    blind.add_argument("--blind", action="store_true", help="write the page on which sounds are judged blindly")
    blind.add_argument(
        "--steps",
        help="with --blind: the steps to compare, as in 0,best,last (default: of one run its first and the one that it"
        " exports, of several the last)",
    )
    blind.add_argument("--seed", type=int, help="with --blind: which sound is A and which B (default: drawn)")
    blind.add_argument("--rating", action="store_true", help="with --blind: ask for marks from 1 to 5 and no choice")
    blind.add_argument(
        "--score", nargs="+", metavar="FILE.json", type=expanded, help="print the joined outcome of saved files"
    )


def check_blind_flags(flags: argparse.Namespace) -> None:
    """Raise ConfigError for flags that have no effect together."""
    given = [name for name in ("steps", "seed", "rating") if getattr(flags, name) not in (None, False)]
    if given and not flags.blind:
        raise ConfigError(f"--{given[0]} has no effect without --blind: add --blind or leave it out")
    if flags.score and (flags.blind or flags.runs or flags.output):
        raise ConfigError("--score takes saved files and nothing else: leave out runs, --blind and --output")
    if flags.blind and not flags.runs:
        raise ConfigError("--blind needs the output_dir of a run, as in scripts/report.py models --blind")
    if flags.seed is not None and flags.seed < 0:
        raise ConfigError(f"--seed {flags.seed} cannot be used: it takes a whole number of 0 or more.")


def write_blind(flags: argparse.Namespace) -> None:
    """Write the listening page and say what it compares, but not which side is A and which B."""
    from trainer.report.blind import blind_page
    from trainer.report.blind_sides import matched, sides_of

    runs = [Path(run) for run in flags.runs]
    sides = sides_of(runs, [step.strip() for step in flags.steps.split(",")] if flags.steps is not None else ())
    prompts, notes = matched(sides)
    # Not 0 by default: who makes the page would know the order of the last one, and may be the one who listens.
    seed = secrets.randbelow(1 << 31) if flags.seed is None else flags.seed
    page = blind_page(sides, prompts, seed=seed, marks_only=flags.rating, notes=notes)
    path = Path(flags.output) if flags.output else runs[0] / PAGE
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, page.text.encode())
    except OSError as error:
        raise StorageError(f"the page {path} cannot be written ({error.strerror}): give another --output") from error
    for side in sides:
        print(f"compared: {side.name}")
    for note in page.notes:
        print(f"note: {note}")
    noun = "prompt" if page.prompts == 1 else "prompts"
    print(f"{page.prompts} {noun} to judge, {len(page.text) / 1e6:.1f} MB: {path}")


def print_score(files: Sequence[str]) -> None:
    """Print the joined outcome of the files that listeners have saved."""
    from trainer.report.blind_score import read_saved, score, table

    listened = [read_saved(Path(file)) for file in files]
    print(table(score(listened)))


if __name__ == "__main__":
    with Console(shows_libraries=True):
        sys.exit(main(sys.argv[1:]))
