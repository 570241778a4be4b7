"""Upload what a finished run has trained to the Hugging Face hub: model or adapter, sounds that play, and a card.

python scripts/push_to_hub.py models --repo user/name
python scripts/push_to_hub.py models/exports/step-2000-strength-0.7 --repo user/name

The repository is a private one, unless --public is given. Stopped at any moment, the same command goes on; run again
when all is there, it changes nothing. docs/sharing.md says what is uploaded and what is not.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

try:
    from trainer.errors import EXIT_DONE, EXIT_RESUME, TrainerError
    from trainer.flags.paths import expanded
    from trainer.flags.run_config import read_config
    from trainer.flags.script_parser import ScriptParser
    from trainer.run.console import Console
except ImportError as missing:
    sys.exit(f"error: {missing}. Install the project (bash scripts/setup.sh) and use its Python: .venv/bin/python")


def main(argv: Sequence[str]) -> int:
    """Run the program; returns its exit code (see trainer/errors.py)."""
    try:
        push(read_flags(argv))
        return EXIT_DONE
    except KeyboardInterrupt:
        print("stopped: what was sent is kept there, unseen; run the same command to go on", file=sys.stderr)
        return EXIT_RESUME
    except TrainerError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


def read_flags(argv: Sequence[str]) -> argparse.Namespace:
    """The flags as they were typed. Raises ConfigError."""
    parser = ScriptParser(
        prog="push_to_hub.py",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "run", type=expanded, metavar="RUN", help="the output_dir of a finished run, or a folder in its exports/"
    )
    parser.add_argument("--repo", required=True, metavar="USER/NAME", help="the model repository, made if not there")
    parser.add_argument("--public", action="store_true", help="make a new repository public, or use a public one")
    parser.add_argument(
        "--part",
        choices=("model", "adapter"),
        help="of a run with --lora_rank: the whole model, or the adapter alone (default: the adapter, where the model"
        " that it fits is on the hub)",
    )
    return parser.parse_args(argv)


def push(flags: argparse.Namespace) -> None:
    """Ask the hub whether it may be done, and do it. Raises TrainerErrors."""
    run = Path(flags.run)
    if not (run / "export.json").is_file():
        read_config(run, "RUN")  # a wrong folder is told at once: what follows takes seconds to import
    from trainer.exports import hub_upload
    from trainer.model.source import quiet_libraries
    from trainer.wiring import sharing

    quiet_libraries()
    sharing.content_of(run, flags.repo, flags.part)  # what it would be refused for needs no network
    hub_upload.check(flags.repo, public=flags.public)
    sharing.push(run, flags.repo, public=flags.public, part=flags.part)


if __name__ == "__main__":
    with Console(shows_libraries=True):
        sys.exit(main(sys.argv[1:]))
