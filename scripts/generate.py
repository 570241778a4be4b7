"""Write .wav files from prompts, with any model that a run wrote or can start from.

python scripts/generate.py --model models --prompt "slow rock ballad with guitar" --seconds 10
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

try:
    from trainer.errors import EXIT_DONE, ConfigError, DataError, StorageError, TrainerError
    from trainer.flags.paths import expanded
    from trainer.flags.script_parser import ScriptParser
    from trainer.run.console import Console
    from trainer.spec.shapes import MELODY_SECONDS
except ImportError as missing:
    sys.exit(f"error: {missing}. Install the project (bash scripts/setup.sh) and use its Python: .venv/bin/python")

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from trainer.model.source import Source

# MusicGen was trained on crops of 30 s; longer pieces lose their thread.
TRAINED_SECONDS = 30.0
CONTINUED_SECONDS = 3.0


def main(argv: Sequence[str]) -> int:
    """Run the program; returns its exit code (see trainer/errors.py)."""
    try:
        flags = read_flags(argv)
        write_all(flags, prompts_of(flags))
        return EXIT_DONE
    except TrainerError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


def read_flags(argv: Sequence[str]) -> argparse.Namespace:
    """The flags, each in its range. Raises ConfigError; --help leaves by SystemExit(0)."""
    parser = ScriptParser(prog="generate.py", description=__doc__, allow_abbrev=False, formatter_class=Formatter)
    parser.add_argument(
        "--model",
        type=expanded,
        default="models",
        help="a run's output_dir, its huggingface/ or audiocraft/ folder, an lm_*.pt, a checkpoint, a hub id, small,"
        " medium, large, melody and so on, or debug",
    )
    parser.add_argument(
        "--base", type=expanded, help="the model that an lm_*.pt was trained from; found by itself beside its run"
    )
    parser.add_argument(
        "--text_embedding",
        metavar="FILE",
        type=expanded,
        help="a learned word: the text_embedding.safetensors of a run with --tune_text 1, with --model its base model",
    )
    parser.add_argument("--prompt", action="append", default=[], help='may be repeated; "" is music without a prompt')
    parser.add_argument("--prompts", metavar="FILE", type=expanded, help="a text file with one prompt a line")
    add_sounds(parser)
    parser.add_argument("--output", type=expanded, default="generated", help="folder for the .wav files")
    parser.add_argument("--seconds", type=float, default=10.0, help="length, 0.1 to 300; models know up to 30")
    parser.add_argument("--guidance", type=float, default=3.0, help="how strongly to follow the prompt; 1 is plain")
    parser.add_argument("--temperature", type=float, default=1.0, help="above 0; higher is more varied")
    parser.add_argument("--top_k", type=int, default=250, help="choose among the k most likely codes; 0 is all")
    parser.add_argument("--greedy", action="store_true", help="always the most likely code: no randomness")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same sound")
    parser.add_argument("--device", default="auto", help="auto is cuda where there is one, else cpu")
    flags = parser.parse_args(argv)
    ranges = {
        "seconds": (0.1 <= flags.seconds <= 300, "a number from 0.1 to 300"),
        "guidance": (1 <= flags.guidance <= 100, "a number from 1 to 100"),
        "temperature": (0 < flags.temperature <= 100, "a number above 0, at most 100"),
        "top_k": (flags.top_k >= 0, "a whole number of 0 or more"),
        "seed": (0 <= flags.seed < 2**63, "a whole number of 0 or more"),
    }
    for name, (fits, allowed) in ranges.items():
        if not fits:
            raise ConfigError(f"--{name} {getattr(flags, name)} cannot be used: it takes {allowed}.")
    check_sounds(flags)
    return flags


def add_sounds(parser: ScriptParser) -> None:
    """The flags that name a sound, which the music goes on from or follows."""
    parser.add_argument(
        "--continue_from",
        metavar="FILE",
        type=expanded,
        help="a sound file, from whose beginning the music of each prompt goes on; the .wav file begins with it",
    )
    parser.add_argument(
        "--continue_seconds",
        type=float,
        help=f"how much of its beginning is taken, part of --seconds; without it {CONTINUED_SECONDS:g}",
    )
    parser.add_argument(
        "--melody",
        metavar="FILE",
        type=expanded,
        help=f"a sound file whose melody the music of each prompt follows, its first {MELODY_SECONDS:g} s; for melody"
        " models alone",
    )
    parser.add_argument(
        "--stems",
        choices=("mix", "demucs", "auto"),
        help="what the melody is heard in, as in training. mix: all of FILE, also without this flag; demucs: its voice"
        " and other instruments without drums and bass, as published models were trained; auto: demucs on a GPU where"
        " it is installed and has its weights, else mix",
    )


def check_sounds(flags: argparse.Namespace) -> None:
    """Raise ConfigError where a sound cannot be followed or continued so; else give --continue_seconds its value."""
    if flags.melody is not None and not Path(flags.melody).is_file():
        raise ConfigError(f"--melody {flags.melody}: there is no such file")
    if flags.stems is not None and flags.melody is None:
        raise ConfigError(f"--stems {flags.stems} has no effect without --melody FILE: add it, or leave it out")
    if flags.continue_from is None:
        if flags.continue_seconds is not None:
            raise ConfigError("--continue_seconds has no effect without --continue_from FILE: add it, or leave it out")
        return
    if not Path(flags.continue_from).is_file():
        raise ConfigError(f"--continue_from {flags.continue_from}: there is no such file")
    if flags.continue_seconds is None:
        flags.continue_seconds = CONTINUED_SECONDS
    if not 0.02 <= flags.continue_seconds <= flags.seconds - 0.02:
        raise ConfigError(
            f"--continue_seconds {flags.continue_seconds:g} cannot be used with --seconds {flags.seconds:g}, which is"
            " the length of all: it takes 0.02 or more, and less than --seconds"
        )


class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, and the description as it is written."""


def prompts_of(flags: argparse.Namespace) -> list[str]:
    """The prompts of --prompt, then those of the file. Raises ConfigError, and DataError for an empty file."""
    prompts = list(flags.prompt)
    if flags.prompts is not None:
        try:
            text = Path(flags.prompts).read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--prompts {flags.prompts} cannot be read as a text in UTF-8 ({error})") from error
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        if not lines:
            raise DataError(f"--prompts {flags.prompts} is empty: write one prompt a line")
        prompts += lines
    if not prompts:
        raise ConfigError('nothing to generate: give --prompt "..." (it may be repeated) or --prompts FILE')
    return prompts


def melody_of(flags: argparse.Namespace, source: Source, device: torch.device) -> Tensor | None:
    """The melody of --melody as the model reads it; None without one. Says what it is heard in, and what is done with
    its length.

    Raises ConfigError where the model reads none, or cannot with the installed transformers, and where demucs is asked
    for and missing; DataError for a file that cannot be decoded.
    """
    from trainer.data.melody_places import melody_places
    from trainer.data.stems import stems_of
    from trainer.evaluation.melody import melody_of_file
    from trainer.spec.melody_generation import check_melody_generation
    from trainer.spec.shapes import KNOWN

    if source.melody:
        check_melody_generation(f"--model {flags.model}, a melody model,")
    if flags.melody is None:
        return None
    if not source.melody:
        models = ", ".join(name for name, shape in KNOWN.items() if shape.melody)
        raise ConfigError(
            f"--melody {flags.melody} has no effect with --model {flags.model}, which reads no melody: leave it out, or"
            f" use {models}, or what was trained from one of them"
        )
    if flags.stems is None:
        print(
            f"note: the melody is heard in all of {flags.melody}, drums and bass in it (--stems mix). Meta's models,"
            " and those trained with --stems demucs, know melodies without these: --stems demucs"
        )
    notes, seconds = melody_of_file(Path(flags.melody), stems_of(flags.stems or "mix", device).blocks)
    if seconds > MELODY_SECONDS:
        print(f"note: of {flags.melody} the first {MELODY_SECONDS:g} s are followed, which is all that models read")
    elif seconds < min(flags.seconds, MELODY_SECONDS):
        print(f"note: {flags.melody} has {seconds:.1f} s: its melody is repeated until the music's end")
    if not notes.any():
        print(f"note: {flags.melody} gives no melody to follow: it is silent in mono, or nothing but the note C")
    return melody_places(notes)


def write_all(flags: argparse.Namespace, prompts: Sequence[str]) -> None:
    """Generate one prompt after the other, so that none depends on its neighbours, and write each at once."""
    from trainer.evaluation.continuation import codes_of_beginning
    from trainer.evaluation.generation import Sampling, device_of, generate, load_for_generation, write_wav
    from trainer.evaluation.samples import file_name
    from trainer.exports.saved_models import open_saved
    from trainer.model.new_word import read_text_embedding, with_embedding
    from trainer.model.source import quiet_libraries

    quiet_libraries()
    device = device_of(flags.device)
    folder = Path(flags.output)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"--output {folder} cannot be made ({error}): choose another folder") from error
    source = open_saved(flags.model, base=flags.base)
    if flags.text_embedding is not None:
        embedding = read_text_embedding(Path(flags.text_embedding))
        source = with_embedding(source, embedding)
        if not any(embedding.placeholder.word in prompt for prompt in prompts):
            print(f"note: no prompt has {embedding.placeholder.word} in it, so that the text embedding has no effect")
    melody = melody_of(flags, source, device)
    model = load_for_generation(source, device)
    prefix = None
    if flags.continue_from is not None:
        prefix = codes_of_beginning(
            model.codec, Path(flags.continue_from), flags.continue_seconds, channels=source.channels
        )
    sampling = Sampling(
        guidance=flags.guidance,
        greedy=flags.greedy,
        temperature=flags.temperature,
        top_k=flags.top_k,
        seed=flags.seed,
    )
    if flags.seconds > TRAINED_SECONDS:
        print(f"note: the models were trained on {TRAINED_SECONDS:g} s; beyond that music loses its thread")
    for number, prompt in enumerate(prompts, start=1):
        frames = round(flags.seconds * source.frame_rate_hz)
        made = generate(model, prompt, frames=frames, sampling=sampling, prefix_KT=prefix, melody_C=melody)
        path = folder / file_name(number, prompt, "wav")
        write_wav(path, made.audio, source.sample_rate_hz)
        print(f"{path}  {len(made.audio) / source.sample_rate_hz:.2f} s  {prompt or '(no prompt)'}")


if __name__ == "__main__":
    with Console(shows_libraries=True):
        sys.exit(main(sys.argv[1:]))
