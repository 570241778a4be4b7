"""Is what a run's model makes closer to held-out music than what its base makes?

python scripts/score.py models
python scripts/score.py models --reference other_songs
python scripts/score.py models --base_sounds before --tuned_sounds after

Both models generate for the captions of clips that were not trained on, from the same seeds. Their sounds are compared
with those clips by kernel audio distance (KAD) and Fréchet distance, on EnCodec's latents and on CLAP, with 95 %
intervals. The figures are written to RUN/score.json and RUN/report.html, the sounds to RUN/score_sounds/.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

try:
    from listening.report_page import remake_report
    from listening.score_table import table

    from trainer.atomic import write_whole
    from trainer.data.sound_kind import SOUND_SUFFIXES
    from trainer.errors import EXIT_DONE, ConfigError, StorageError, TrainerError
    from trainer.flags.paths import expanded
    from trainer.flags.run_config import read_config
    from trainer.flags.script_parser import ScriptParser
    from trainer.run.console import Console
except ImportError as missing:
    sys.exit(f"error: {missing}. Install the project (bash scripts/setup.sh) and use its Python: .venv/bin/python")

if TYPE_CHECKING:
    import torch

    from trainer.data.batches import Examples
    from trainer.evaluation.score import Sounds
    from trainer.flags.config import Config
    from trainer.model.source import Source

FILE = "score.json"
# Of the sounds that are made: they have no effect where sounds are given.
OF_MAKING: dict[str, Any] = {"count": 100, "guidance": 3.0, "top_k": 250}


def main(argv: Sequence[str]) -> int:
    """Run the program; returns its exit code (see trainer/errors.py)."""
    try:
        flags = read_flags(argv)
        run = Path(flags.run)
        read_config(run, "RUN")  # a wrong folder is told at once: what follows takes seconds to import
        result = judge(run, flags)
        _write(run, result)
        print(table(result))
        remake_report(run)
        return EXIT_DONE
    except TrainerError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


def read_flags(argv: Sequence[str]) -> argparse.Namespace:
    """The flags, each in its range. Raises ConfigError; --help leaves by SystemExit(0)."""
    parser = ScriptParser(
        prog="score.py", description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", metavar="RUN", type=expanded, help="the output_dir of a finished run")
    parser.add_argument(
        "--reference", metavar="FOLDER", type=expanded,
        help="sounds with captions, none of which was trained on; without it what --validation held out",
    )  # fmt: skip
    for name, whose in (("base_sounds", "base"), ("tuned_sounds", "tuned model")):
        parser.add_argument(
            f"--{name}", metavar="FOLDER", type=expanded,
            help=f"judge these sounds of the {whose} in place of new ones; equal names have equal prompts",
        )  # fmt: skip
    parser.add_argument("--seconds", type=float, default=10.0, help="of each sound, 1 to 30; default: 10")
    parser.add_argument("--count", type=int, help="at most so many sounds of each model, 3 or more; default: 100")
    parser.add_argument("--guidance", type=float, help="how strongly to follow the caption, 1 to 100; default: 3")
    parser.add_argument("--top_k", type=int, help="choose among the k most likely codes; 0 is all; default: 250")
    parser.add_argument("--seed", type=int, default=0, help="of the sounds and of the intervals; default: 0")
    parser.add_argument(
        "--clap", metavar="MODEL", type=expanded, default=None,
        help="a CLAP model, by hub id or folder; none leaves it out; default: laion/clap-htsat-unfused, where it is",
    )  # fmt: skip
    parser.add_argument(
        "--base", metavar="MODEL", type=expanded,
        help="what the run started from, where that is no longer where the run found it: a folder or a hub id",
    )  # fmt: skip
    parser.add_argument("--device", default="auto", help="auto is cuda where there is one, else cpu")
    flags = parser.parse_args(argv)
    _check(flags)
    return flags


def _check(flags: argparse.Namespace) -> None:
    """Raise ConfigError for what does not go together or is out of range; else fill in the defaults of OF_MAKING."""
    given = (flags.base_sounds, flags.tuned_sounds)
    if given.count(None) == 1:
        raise ConfigError("--base_sounds and --tuned_sounds belong together: give both folders, or none")
    for name, default in OF_MAKING.items():
        if getattr(flags, name) is None:
            setattr(flags, name, default)
        elif given != (None, None):
            raise ConfigError(f"--{name} has no effect on the sounds of --base_sounds, which are there: leave it out")
    ranges = {
        "seconds": (1 <= flags.seconds <= 30, "a number from 1 to 30"),
        "count": (flags.count >= 3, "a whole number of 3 or more"),
        "guidance": (1 <= flags.guidance <= 100, "a number from 1 to 100"),
        "top_k": (flags.top_k >= 0, "a whole number of 0 or more"),
        "seed": (0 <= flags.seed < 2**62, "a whole number of 0 or more"),
    }
    for name, (fits, allowed) in ranges.items():
        if not fits:
            raise ConfigError(f"--{name} {getattr(flags, name)} cannot be used: it takes {allowed}.")


def judge(run: Path, flags: argparse.Namespace) -> dict[str, Any]:
    """What score.json holds. Raises TrainerErrors."""
    from trainer.evaluation.embeddings import CLAP
    from trainer.evaluation.generation import device_of
    from trainer.evaluation.score import Ears, clap_or_reason, score
    from trainer.model.source import load_codec, quiet_libraries
    from trainer.run.output_dir import OutputDir
    from trainer.wiring.finished_run import base_and_tuned, config_of_run, start_of

    quiet_libraries()
    config, device = config_of_run(run, "RUN"), device_of(flags.device)
    given = None
    if flags.base_sounds is not None:
        given = given_sounds(Path(flags.base_sounds), Path(flags.tuned_sounds), flags.seconds)
    clap, not_run = clap_or_reason(flags.clap or CLAP, device)  # first, since it says at once what is not there
    base, tuned = base_and_tuned(str(run), flags.base)
    # The data know no word of --tune_text, which `base` has.
    start = start_of(run, config, flags.base)
    examples, clips, remarks = reference_of(run, config, start, device, flags.reference)
    not_run += remarks
    frames = round(flags.seconds * base.frame_rate_hz)
    sounds = given or made_sounds(run, base, tuned, examples, clips, device, frames, flags)
    ears = Ears(
        codec=load_codec(base).to(device), sample_rate_hz=base.sample_rate_hz, channels=base.channels, clap=clap,
        not_run=not_run,
    )  # fmt: skip
    found = score(ears, examples, clips, sounds, seconds=flags.seconds, frames=frames, seed=flags.seed)
    return found | {"exported_step": OutputDir(root=run).exported_step()}


def reference_of(
    run: Path, config: Config, base: Source, device: torch.device, folder: str | None
) -> tuple[Examples, list[int], list[str]]:
    """The clips that were held out, or those of a folder, which is encoded into the run's cache; which of them, by
    index, are not trained on too; and what is to be said of the others.

    Raises ConfigError where nothing was held out, and TrainerErrors as where sounds cannot be read.
    """
    from trainer.data.held_out import trained_on_too
    from trainer.flags.config import Config
    from trainer.spec.dataset_path import is_hub_id
    from trainer.wiring.finished_run import data_of_run

    if folder is None and config.validation_folder is None and config.validation_share == 0:
        raise ConfigError(
            f"RUN {run} held no clips out, and those that it was trained on would praise a model that learned them"
            " by heart: give sounds with captions by --reference, or train with --validation 0.1"
        )
    if folder is not None and not is_hub_id(config.dataset_path) and not Path(config.dataset_path).exists():
        of_dataset = ("dataset_split", "dataset_config", "dataset_revision", "validation", "validation_split")
        other = replace(config, **{name: getattr(Config, name) for name in of_dataset}, dataset_path=folder)
        examples: Examples | None = data_of_run(run, other, base, device).train
        assert examples is not None
        remark = f"whether held-out clips are trained on too: --dataset {config.dataset_path} is not there"
        return examples, list(range(len(examples.names))), [remark]
    data = data_of_run(run, config, base, device, held_out=None if folder is None else Path(folder))
    examples = data.validation
    assert examples is not None, "a run without held-out clips is refused by data_of_run"
    alike = trained_on_too(data.train, examples)
    names = ", ".join(examples.names[clip] for clip in alike[:3]) + (" ..." if len(alike) > 3 else "")
    remarks = [f"{len(alike)} of the held-out clips, whose music is trained on ({names})"] if alike else []
    return examples, sorted(set(range(len(examples.names))).difference(alike)), remarks


def given_sounds(base: Path, tuned: Path, seconds: float) -> Sounds:
    """The sounds of two folders. Raises ConfigError where there are not equally many."""
    from trainer.evaluation.score import Sounds

    of_base, of_tuned = _sounds_in(base, "--base_sounds"), _sounds_in(tuned, "--tuned_sounds")
    if len(of_base) != len(of_tuned):
        raise ConfigError(
            f"--base_sounds {base} has {len(of_base)} sounds and --tuned_sounds {tuned} {len(of_tuned)}: a Fréchet"
            " distance grows as sounds get fewer, so that there have to be equally many"
        )
    paired = [path.stem for path in of_base] == [path.stem for path in of_tuned]
    if not paired:
        print("note: the two folders have other names, so that no sound of one is paired with one of the other")
    return Sounds(base=of_base, tuned=of_tuned, seconds=[seconds] * len(of_base), captions=None, paired=paired)


def made_sounds(
    run: Path,
    base: Source,
    tuned: Source,
    examples: Examples,
    clips: Sequence[int],
    device: torch.device,
    frames: int,
    flags: argparse.Namespace,
) -> Sounds:
    """What both models make of the captions. Those that are there from an earlier call are not made again."""
    from trainer.evaluation.generation import Sampling
    from trainer.evaluation.score import Sounds, seconds_of_prompts
    from trainer.evaluation.score_sounds import FOLDER, make_sounds, prompts_of
    from trainer.spec.melody_generation import check_melody_generation

    if tuned.melody:
        check_melody_generation(f"RUN {run}, a run of a melody model,")
    sampling = Sampling(guidance=flags.guidance, top_k=flags.top_k, seed=flags.seed)
    prompts = prompts_of(examples, clips, flags.count, flags.seed)
    made = {
        name: make_sounds(
            source, examples, clips, prompts, run / FOLDER / name, device, frames=frames, sampling=sampling
        )
        for name, source in (("base", base), ("tuned", tuned))
    }
    return Sounds(
        base=made["base"],
        tuned=made["tuned"],
        seconds=seconds_of_prompts(examples, prompts, frames, base.frame_rate_hz),
        captions=[prompt.caption for prompt in prompts],
        paired=True,
    )


def _sounds_in(folder: Path, flag: str) -> list[Path]:
    """The sound files in a folder, by name. Raises ConfigError where it cannot be read."""
    try:
        return sorted(path for path in folder.iterdir() if path.suffix.lower() in SOUND_SUFFIXES)
    except OSError as error:
        raise ConfigError(f"{flag} {folder} cannot be opened ({error.strerror}): give a folder of sounds") from error


def _write(run: Path, result: dict[str, Any]) -> None:
    try:
        write_whole(run / FILE, json.dumps(result, indent=1, ensure_ascii=False).encode())
    except OSError as error:
        raise StorageError(f"{run / FILE} cannot be written ({error}): make room there") from error


if __name__ == "__main__":
    with Console(shows_libraries=True):
        sys.exit(main(sys.argv[1:]))
