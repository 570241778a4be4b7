"""Export any saved step of a run, at any strength: lm_final.pt, huggingface/, audiocraft/, for LoRA adapter/.

python scripts/export.py models --step 2000
python scripts/export.py models --strength 0.7

A run exports one step when it ends. This takes another that is still there (a folder in checkpoints/, an lm_<step>.pt)
and writes it into a folder of its own. Strength is how much of the training shows: each weight is base + strength x
(tuned - base), where base is what the run started from. docs/strength.md says more.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

try:
    from trainer.errors import EXIT_DONE, TrainerError
    from trainer.flags.paths import expanded
    from trainer.flags.run_config import read_config
    from trainer.flags.script_parser import ScriptParser
    from trainer.run.console import Console
except ImportError as missing:
    sys.exit(f"error: {missing}. Install the project (bash scripts/setup.sh) and use its Python: .venv/bin/python")


def main(argv: Sequence[str]) -> int:
    """Run the program; returns its exit code (see trainer/errors.py)."""
    try:
        flags = read_flags(argv)
        read_config(Path(flags.run), "RUN")  # a wrong folder is told at once: what follows takes seconds to import
        export(flags)
        return EXIT_DONE
    except TrainerError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


def read_flags(argv: Sequence[str]) -> argparse.Namespace:
    """The flags. Raises ConfigError; --help leaves by SystemExit(0)."""
    parser = ScriptParser(prog="export.py", description=__doc__, allow_abbrev=False, formatter_class=Formatter)
    parser.add_argument("run", metavar="RUN", type=expanded, help="the output_dir of a run")
    parser.add_argument("--step", type=int, help="which; without it the one that the run exported, or saved last")
    parser.add_argument(
        "--strength",
        type=float,
        default=1.0,
        help="0 is what the run started from, 1 what it made, up to 2 more than that",
    )
    parser.add_argument(
        "--output", metavar="DIR", type=expanded, help="without it RUN/exports/step-N, or step-N-strength-S"
    )
    parser.add_argument(
        "--base", type=expanded, help="what the run started from, where that is not where the run found it"
    )
    return parser.parse_args(argv)


class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, and the description as it is written."""


def export(flags: argparse.Namespace) -> None:
    """Export, and say from what and where to. Raises TrainerErrors."""
    from trainer.exports.strength import check_strength

    check_strength(flags.strength)
    from trainer.model.source import quiet_libraries
    from trainer.wiring.step_export import export_step

    quiet_libraries()
    output = None if flags.output is None else Path(flags.output)
    saved, folder = export_step(
        Path(flags.run), step=flags.step, strength=flags.strength, base=flags.base, output=output
    )
    names = ("lm_final.pt", "text_embedding.safetensors", "huggingface", "audiocraft", "adapter")
    there = ", ".join(name for name in names if (folder / name).exists())
    print(f"step {saved.step} of {flags.run}, from {saved.path}, at strength {flags.strength:g}")
    print(f"{folder}: {there}; listen with\n  python scripts/generate.py --model {folder}/huggingface --prompt \"...\"")


if __name__ == "__main__":
    with Console(shows_libraries=True):
        sys.exit(main(sys.argv[1:]))
