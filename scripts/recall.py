"""How much of its own training clips a run's model reproduces, before and after the training.

python scripts/recall.py --run models

Each clip's caption, and for a melody model its melody, is given to the model, which generates greedily and without
guidance. Those of its codes are counted that equal the clip's, and their sound is compared with that of the clip's own
codes: signal to noise in dB, where above 60 nobody hears a difference, and below 3 it is another sound. Near 100 % the
model has learned its clips by heart, which is right where it is tested whether training works at all, and overfitting
elsewhere. Before the training means: the model that --model_id named, with --stereo 1 made stereo.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

try:
    from trainer.errors import EXIT_DONE, TrainerError
    from trainer.flags.paths import expanded
    from trainer.run.console import Console
except ImportError as missing:
    sys.exit(f"error: {missing}. Install the project (bash scripts/setup.sh) and use its Python: .venv/bin/python")

if TYPE_CHECKING:
    from trainer.evaluation.recall import Recall

INAUDIBLE_DB = 60.0  # the difference is then a thousandth of the sound


def main(argv: Sequence[str]) -> int:
    """Run the program; returns its exit code (see trainer/errors.py)."""
    parser = argparse.ArgumentParser(prog="recall.py", description=__doc__, formatter_class=Formatter)
    parser.add_argument("--run", type=expanded, default="models", help="the output_dir of a finished run")
    parser.add_argument("--clips", type=int, default=10, help="at most so many clips, the first by name")
    parser.add_argument(
        "--wav", metavar="FOLDER", type=expanded, help="write each clip's own codes and the generated ones as sound"
    )
    parser.add_argument("--device", default="auto", help="auto is cuda where there is one, else cpu")
    try:
        flags = parser.parse_args(argv)
        run = Path(flags.run)
        rows = measure(run, most_clips=flags.clips, wav=flags.wav, device_name=flags.device)
        (run / "recall.json").write_text(json.dumps([asdict(row) for row in rows], indent=1), encoding="utf-8")
        print(table(rows))
        return EXIT_DONE
    except TrainerError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, and the description as it is written."""


def measure(run: Path, *, most_clips: int, wav: str | None, device_name: str) -> list[Recall]:
    """The recall of the run's first clips by name. Raises TrainerErrors."""
    from trainer.evaluation import recall
    from trainer.evaluation.generation import device_of
    from trainer.exports.saved_models import open_saved
    from trainer.model.source import quiet_libraries
    from trainer.spec.melody_generation import check_melody_generation
    from trainer.wiring.finished_run import base_of_run, config_of_run, data_of_run

    quiet_libraries()
    config = config_of_run(run)
    device = device_of(device_name)
    base, trained = base_of_run(config), open_saved(str(run))
    if trained.melody:
        check_melody_generation(f"--run {run}, a run of the melody model {config.model_id},")
    data = data_of_run(run, config, base, device)
    return recall.measure(data, base, trained, device, most_clips=most_clips, wav=None if wav is None else Path(wav))


def table(rows: Sequence[Recall]) -> str:
    """Clip by clip and in all: codes in per cent, sound in dB."""
    lines = [f"{'':<32}{'':>8}{'codes played back':>20}{'signal to noise, dB':>22}"]
    lines += [f"{'clip':<32}{'codes':>8}{'before':>10}{'after':>10}{'before':>11}{'after':>11}"]
    for row in rows:
        sounds = "".join(f"{in_words(ratio_db):>11}" for ratio_db in (row.snr_before_db, row.snr_after_db))
        lines.append(_line(row.clip, row.codes, row.before, row.after) + sounds)
    codes, before, after = (sum(getattr(row, name) for row in rows) for name in ("codes", "before", "after"))
    alike = sum(row.snr_after_db is None or row.snr_after_db > INAUDIBLE_DB for row in rows)
    lines.append(_line("all", codes, before, after))
    lines.append(f"{alike} of {len(rows)} clips cannot be told from the true ones after the training")
    return "\n".join(lines)


def in_words(ratio_db: float | None) -> str:
    return "the same" if ratio_db is None else f"{ratio_db:.1f}"


def _line(name: str, codes: int, before: int, after: int) -> str:
    return f"{name[-31:]:<32}{codes:>8}{before / codes:>10.2%}{after / codes:>10.2%}"


if __name__ == "__main__":
    with Console(shows_libraries=True):
        sys.exit(main(sys.argv[1:]))
