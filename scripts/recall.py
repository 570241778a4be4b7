"""What a run's model knows of its training clips by heart, before and after the training.

python scripts/recall.py --run models
python scripts/recall.py --run models --held_out more_music --clips 100

Three things are measured, and written to RUN/recall.json and RUN/report.html (docs/recall.md says how to read them):
- Each clip is asked for by its caption, and for a melody model by its melody, greedily and without guidance. Those
  codes are counted that equal the clip's, and the sound is compared with that of the clip's own codes: signal to noise
  in dB, where above 60 nobody hears a difference, and below 3 it is another sound.
- After the first 0, 1, 5 and 10 s of a clip's own codes the model goes on for 5 s: how many clips it continues exactly,
  and how many to 80 % or more. Clips that were not trained on, those that validated in the run, are the control.
- Captions are played as a listener would hear them, and the training clip is searched that comes nearest.

Before the training means: what the run started from, the model of --model_id or the weights of --init_from, with
--stereo 1 made stereo, and with --tune_text 1 with the new word as it was before it was learned.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

try:
    from listening.report_page import remake_report

    from trainer.atomic import write_whole
    from trainer.errors import EXIT_DONE, ConfigError, StorageError, TrainerError
    from trainer.flags.paths import expanded
    from trainer.flags.run_config import read_config
    from trainer.flags.script_parser import ScriptParser
    from trainer.run.console import Console
except ImportError as missing:
    sys.exit(f"error: {missing}. Install the project (bash scripts/setup.sh) and use its Python: .venv/bin/python")

if TYPE_CHECKING:
    from trainer.evaluation.memorisation import Row, Shares
    from trainer.evaluation.recall import Findings, Recall, Settings

INAUDIBLE_DB = 60.0  # the difference is then a thousandth of the sound
MUCH = 0.5  # of the first codebook's codes in the nearest place: from there on it is more copy than likeness


def main(argv: Sequence[str]) -> int:
    """Run the program; returns its exit code (see trainer/errors.py)."""
    try:
        flags = read_flags(argv)
        check_numbers(flags)
        run = Path(flags.run)
        read_config(run, "--run")  # a wrong folder is told at once: what follows takes seconds to import
        findings = measure(
            run, settings_of(flags), wav=flags.wav, device_name=flags.device, held_out=flags.held_out,
            base_name=flags.base,
        )  # fmt: skip
        write(run, findings)
        print(in_words(findings), end="\n\n")
        remake_report(run)
    except TrainerError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return EXIT_DONE


def read_flags(argv: Sequence[str]) -> argparse.Namespace:
    """The command line. Raises ConfigError."""
    parser = ScriptParser(prog="recall.py", description=__doc__, allow_abbrev=False, formatter_class=Formatter)
    parser.add_argument("--run", metavar="FOLDER", type=expanded, default="models", help="output_dir of a finished run")
    parser.add_argument("--clips", type=int, default=10, help="at most so many training and so many held-out clips")
    parser.add_argument(
        "--held_out", metavar="FOLDER", type=expanded,
        help="clips that the run was not trained on, with captions, as the control; without it those that validated",
    )
    parser.add_argument(
        "--prompt_seconds", metavar="SECONDS", type=float, nargs="+", default=[0, 1, 5, 10],
        help="how much of a clip is given before the model goes on",
    )
    parser.add_argument("--continued_seconds", type=float, default=5.0, help="for how long it goes on")
    parser.add_argument("--sampled", type=int, default=3, help="so many captions are played as a listener hears them")
    parser.add_argument("--searched_clips", type=int, default=20_000, help="training clips searched for their sound")
    parser.add_argument("--seed", type=int, default=0, help="of which clips are drawn, and of the sampling")
    parser.add_argument(
        "--wav", metavar="FOLDER", type=expanded, help="write each clip's own codes and the generated ones as sound"
    )
    parser.add_argument(
        "--base", metavar="MODEL", type=expanded,
        help="what the run started from, where that is no longer where the run found it: a folder or a hub id",
    )
    parser.add_argument("--device", default="auto", help="auto is cuda where there is one, else cpu")
    return parser.parse_args(argv)


class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, and the description as it is written."""


def check_numbers(flags: argparse.Namespace) -> None:
    """Raise ConfigError for numbers that cannot be."""
    for name, least in (("clips", 1), ("sampled", 0), ("searched_clips", 1), ("seed", 0)):
        if getattr(flags, name) < least:
            raise ConfigError(f"--{name} {getattr(flags, name)} is too few: use {least} or more")
    if not 0.1 <= flags.continued_seconds <= 30:
        raise ConfigError(f"--continued_seconds {flags.continued_seconds:g}: use 0.1 to 30")
    if not all(0 <= seconds <= 30 for seconds in flags.prompt_seconds):
        raise ConfigError(f"--prompt_seconds {' '.join(f'{one:g}' for one in flags.prompt_seconds)}: each is 0 to 30")


def settings_of(flags: argparse.Namespace) -> Settings:
    """What is measured."""
    from trainer.evaluation.recall import Settings

    return Settings(
        clips=flags.clips,
        prompt_seconds=tuple(sorted(set(flags.prompt_seconds))),
        continued_seconds=flags.continued_seconds,
        sampled=flags.sampled,
        searched_clips=flags.searched_clips,
        seed=flags.seed,
    )


def measure(
    run: Path, settings: Settings, *, wav: str | None, device_name: str, held_out: str | None, base_name: str | None
) -> Findings:
    """What the run's model knows by heart. Raises TrainerErrors."""
    from trainer.evaluation import recall
    from trainer.evaluation.generation import device_of
    from trainer.model.source import quiet_libraries
    from trainer.spec.melody_generation import check_melody_generation
    from trainer.wiring.finished_run import base_and_tuned, config_of_run, data_of_run, start_of

    quiet_libraries()
    config = config_of_run(run)
    device = device_of(device_name)
    base, trained = base_and_tuned(str(run), base_name)
    if trained.melody:
        check_melody_generation(f"--run {run}, a run of the melody model {config.model_id},")
    start = start_of(run, config, base_name)  # the data know no word of --tune_text, which `base` has
    data = data_of_run(run, config, start, device, held_out=None if held_out is None else Path(held_out))
    return recall.measure(data, base, trained, device, settings, wav=None if wav is None else Path(wav))


def write(run: Path, findings: Findings) -> None:
    """Write RUN/recall.json. Raises StorageError."""
    from trainer.run.output_dir import OutputDir

    content: dict[str, Any] = {
        "format": "musicgen-trainer recall",
        "version": 2,
        "exported_step": OutputDir(root=run).exported_step(),
        "played_back": list(map(asdict, findings.played_back)),
        "memorisation": {
            "continued_seconds": findings.continued_seconds,
            "rows": list(map(asdict, findings.rows)),
            "nearest": list(map(asdict, findings.nearest)),
            "searched_clips": findings.searched_clips,
            "training_clips": findings.training_clips,
        },
        "remarks": list(findings.remarks),
    }
    try:
        write_whole(run / "recall.json", json.dumps(content, indent=1, ensure_ascii=False).encode("utf-8", "replace"))
    except OSError as error:
        raise StorageError(f"{run / 'recall.json'} cannot be written: {error}") from error


def in_words(findings: Findings) -> str:
    """All that was found, as tables and sentences."""
    parts = [memorised(findings)]
    if findings.played_back:
        parts.insert(0, table(findings.played_back))
    if findings.nearest:
        parts.append(near(findings))
    parts += [f"note: {remark}" for remark in findings.remarks]
    return "\n\n".join(parts)


def table(rows: Sequence[Recall]) -> str:
    """Clip by clip and in all: codes in per cent, sound in dB."""
    lines = [f"{'':<32}{'':>8}{'codes played back':>20}{'signal to noise, dB':>22}"]
    lines += [f"{'clip':<32}{'codes':>8}{'before':>10}{'after':>10}{'before':>11}{'after':>11}"]
    for row in rows:
        sounds = "".join(f"{_ratio(ratio_db):>11}" for ratio_db in (row.snr_before_db, row.snr_after_db))
        lines.append(_line(row.clip, row.codes, row.before, row.after) + sounds)
    codes, before, after = (sum(getattr(row, name) for row in rows) for name in ("codes", "before", "after"))
    alike = sum(row.snr_after_db is None or row.snr_after_db > INAUDIBLE_DB for row in rows)
    lines.append(_line("all", codes, before, after))
    lines.append(f"{alike} of {len(rows)} clips cannot be told from the true ones after the training")
    return "\n".join(lines)


def memorised(findings: Findings) -> str:
    """The rows of the papers' protocol, training clips and held-out ones beside chance, and what they mean."""
    titles = ("exact", "80 %", "codes", "chance")
    lines = [
        f"Continued for {findings.continued_seconds:g} s after the first seconds of a clip's own codes and its caption",
        f"{'':<36}{'first codebook':>28}{'all codebooks':>32}",
        f"{'clips':<22}{'given':>6}{'model':>8}" + "".join(f"{title:>8}" for title in (*titles, *titles)),
    ]
    for row in findings.rows:
        name = f"{row.clips} {'trained on' if row.group == 'training' else 'held out'}"
        shares = "".join(map(_shares, (row.first_codebook, row.all_codebooks)))
        lines.append(f"{name:<22}{row.prompt_seconds:>4g} s{row.model:>8}{shares}")
    return "\n".join([*lines, meaning(findings.rows)])


def meaning(rows: Sequence[Row]) -> str:
    """What the trained model's rows say: of the length of prompt after which most training clips are continued."""
    after = [row for row in rows if row.model == "after"]
    held_out = [row for row in after if row.group != "training"]
    known = max((row for row in after if row.group == "training"), key=_by_heart)
    control = next((row for row in held_out if row.prompt_seconds == known.prompt_seconds), None)
    share, share_of_control = (0.0 if row is None else row.first_codebook.partial for row in (known, control))
    by_heart = "By heart:" if share else "Nothing is known by heart: even"
    if share_of_control >= share / 2 > 0:
        by_heart = "No verdict:"
    given = f"after {known.prompt_seconds:g} s of a clip" if known.prompt_seconds else "from captions alone"
    said = (
        f"{by_heart} {given} the trained model continues {_count(known)} clips that it was trained"
        f" on{'' if control is None else f' and {_count(control)} held-out ones'} (80 % of the first codebook or more)."
        f"\nOf its codes there, {known.first_codebook.equal:.1%} are right"
        + ("" if control is None else f", in held-out clips {control.first_codebook.equal:.1%}")
        + ("." if known.first_codebook.chance is None else f"; by chance {known.first_codebook.chance:.1%}.")
    )
    if any(row.first_codebook.partial for row in held_out):
        said += "\nHeld-out clips that are continued too are music that goes on as anybody would guess."
    return said


def near(findings: Findings) -> str:
    """The nearest training clips of what a listener would hear."""
    lines = [
        f"The training clips that sampled outputs are most like, for {findings.continued_seconds:g} s at most"
        f" ({findings.searched_clips:,} of {findings.training_clips:,} clips searched)",
        f"{'asked for':<28}{'model':>8}{'at':>8}  {'nearest':<28}{'at':>7}{'first':>8}{'all':>8}{'chance':>8}",
    ]
    for one in findings.nearest:
        lines.append(
            f"{one.prompt[:27]:<28}{one.model:>8}{one.output_seconds:>6.1f} s  {one.clip[-27:]:<28}"
            f"{one.clip_seconds:>5.1f} s{one.first_codebook:>8.1%}{one.equal:>8.1%}{one.chance:>8.1%}"
        )
    after = [one for one in findings.nearest if one.model == "after"]
    copies = sum(one.first_codebook >= MUCH > one.first_codebook_chance for one in after)
    lines.append(
        f"{copies} of {len(after)} outputs after the training repeat half of a clip's first codebook or more, which"
        " played backwards they do not"
    )
    return "\n".join(lines)


def _by_heart(row: Row) -> tuple[float, float]:
    return row.first_codebook.partial * row.clips, row.first_codebook.equal


def _count(row: Row) -> str:
    return f"{round(row.first_codebook.partial * row.clips)} of {row.clips}"


def _shares(shares: Shares) -> str:
    chance = f"{'-':>8}" if shares.chance is None else f"{shares.chance:>8.1%}"
    return f"{shares.exact:>8.0%}{shares.partial:>8.0%}{shares.equal:>8.1%}{chance}"


def _ratio(ratio_db: float | None) -> str:
    return "the same" if ratio_db is None else f"{ratio_db:.1f}"


def _line(name: str, codes: int, before: int, after: int) -> str:
    return f"{name[-31:]:<32}{codes:>8}{before / codes:>10.2%}{after / codes:>10.2%}"


if __name__ == "__main__":
    with Console(shows_libraries=True):
        sys.exit(main(sys.argv[1:]))
