"""Blind listening on the command line of scripts/report.py: --blind writes the page, --score joins what it saves."""

from __future__ import annotations

import argparse
import secrets
from collections.abc import Sequence
from pathlib import Path

from trainer.atomic import write_whole
from trainer.errors import ConfigError, StorageError
from trainer.flags.paths import expanded
from trainer.report.blind import blind_page
from trainer.report.blind_score import read_saved, score, table
from trainer.report.blind_sides import matched, sides_of

PAGE = "blind.html"
MOST_SEED = 2**53  # beyond it a browser's numbers have gaps


def add_flags(parser: argparse.ArgumentParser) -> None:
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


def check_flags(flags: argparse.Namespace) -> None:
    """Raise ConfigError for flags that have no effect together."""
    given = [name for name in ("steps", "seed", "rating") if getattr(flags, name) not in (None, False)]
    if given and not flags.blind:
        raise ConfigError(f"--{given[0]} has no effect without --blind: add --blind or leave it out")
    if flags.score and (flags.blind or flags.runs or flags.output):
        raise ConfigError("--score takes saved files and nothing else: leave out runs, --blind and --output")
    if flags.blind and not flags.runs:
        raise ConfigError("--blind needs the output_dir of a run, as in scripts/report.py models --blind")
    if flags.seed is not None and not 0 <= flags.seed < MOST_SEED:
        raise ConfigError(f"--seed {flags.seed} cannot be used: it takes a whole number from 0 to {MOST_SEED - 1}.")


def run(flags: argparse.Namespace) -> None:
    """Do what --blind or --score asks for."""
    if flags.score:
        print_score(flags.score)
    else:
        write_page(flags)


def write_page(flags: argparse.Namespace) -> None:
    """Write the listening page and say what it compares, but not which side is A and which B."""
    runs = [Path(run) for run in flags.runs]
    sides = sides_of(runs, [step.strip() for step in flags.steps.split(",")] if flags.steps is not None else ())
    prompts, notes = matched(sides)
    # Not 0 by default: who makes the page would know the order of the last one, and may be the one who listens.
    seed = secrets.randbelow(2**31) if flags.seed is None else flags.seed
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
    listened = [read_saved(Path(file)) for file in files]
    print(table(score(listened)))
