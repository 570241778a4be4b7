"""Make music from prompts, with any model that a run wrote or can start from.

python scripts/generate.py --model models --prompt "slow rock ballad with guitar" --seconds 10
python scripts/generate.py --model models --prompts prompts.txt --repeat 4 --seconds 120 --format mp3
python scripts/generate.py --model models --prompts prompts.txt --compare
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

try:
    from generating import flags as command_line

    from trainer.errors import EXIT_DONE, EXIT_RESUME, TrainerError
    from trainer.run.console import Console
    from trainer.run.signals import interruptible
except ImportError as missing:
    sys.exit(f"error: {missing}. Install the project (bash scripts/setup.sh) and use its Python: .venv/bin/python")


def main(argv: Sequence[str]) -> int:
    """Run the program; returns its exit code (see trainer/errors.py)."""
    try:
        with interruptible():
            flags = read_flags(argv)
            prompts = command_line.prompts_of(flags)

            from generating.work import make_all  # torch with it, which --help and refusals need not wait for

            make_all(flags, prompts)
            return EXIT_DONE
    except KeyboardInterrupt:
        print("stopped: files that were named are whole and stay; the same command makes all again", file=sys.stderr)
        return EXIT_RESUME
    except TrainerError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


def read_flags(argv: Sequence[str]) -> argparse.Namespace:
    """The flags, each in its range. Raises ConfigError; --help leaves by SystemExit(0)."""
    return command_line.read_flags(argv, __doc__ or "")


if __name__ == "__main__":
    with Console(shows_libraries=True):
        sys.exit(main(sys.argv[1:]))
