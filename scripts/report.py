"""A page on which a person listens to the sounds of runs without knowing which run, or which step, made them.

python scripts/report.py models --blind
python scripts/report.py models other_models --blind --steps last --output blind.html
python scripts/report.py --score listening_anna.json listening_ben.json
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from typing import NoReturn

try:
    from listening import command

    from trainer.errors import EXIT_DONE, ConfigError, TrainerError
    from trainer.flags.flag import did_you_mean
    from trainer.flags.paths import expanded
    from trainer.run.console import Console
except ImportError as missing:
    sys.exit(f"error: {missing}. Install the project (bash scripts/setup.sh) and use its Python: .venv/bin/python")


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
        command.run(flags)
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
    command.add_flags(parser)
    flags = parser.parse_args(argv)
    if not flags.score and not flags.blind:
        raise ConfigError("nothing to do: give --blind with the output_dir of a run, or --score with saved files")
    command.check_flags(flags)
    return flags


if __name__ == "__main__":
    with Console(shows_libraries=True):
        sys.exit(main(sys.argv[1:]))
