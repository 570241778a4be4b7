"""The flags of scripts/generate.py: each in its range, and none without an effect."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from trainer.errors import ConfigError, DataError
from trainer.flags.paths import expanded
from trainer.flags.script_parser import ScriptParser

FORMATS = ("wav", "flac", "mp3")
# Of the published models, which were trained on 30 s, and of audiocraft 1.3.0, which goes on by 18 s.
WINDOW_SECONDS, STRIDE_SHARE = 30.0, 18 / 30
LEAST_OVERLAP_SECONDS = 0.1
MOST_SECONDS = 3600.0
CONTINUED_SECONDS = 3.0
MOST_STRENGTH = 2.0


def read_flags(argv: Sequence[str], description: str) -> argparse.Namespace:
    """The flags, with the values of those that were not typed. Raises ConfigError; --help leaves by SystemExit(0)."""
    parser = ScriptParser(prog="generate.py", description=description, allow_abbrev=False, formatter_class=Formatter)
    add_model(parser)
    add_prompts(parser)
    add_length(parser)
    add_sounds(parser)
    add_draws(parser)
    add_device(parser)
    flags = parser.parse_args(argv)
    typed = {word.partition("=")[0].removeprefix("--") for word in argv if word.startswith("--")}
    check_ranges(flags)
    check_windows(flags)
    check_sounds(flags)
    check_effects(flags, typed)
    return flags


def add_model(parser: ScriptParser) -> None:
    """Which models are heard, and where their sounds go."""
    parser.add_argument(
        "--model", type=expanded, default="models",
        help="a run's output_dir, its huggingface/ or audiocraft/ folder, an lm_*.pt, a checkpoint, a hub id, small,"
        " medium, large, melody and so on, or debug",
    )  # fmt: skip
    parser.add_argument(
        "--base", type=expanded, help="the model that --model was trained from; found by itself beside its run"
    )
    parser.add_argument(
        "--text_embedding", metavar="FILE", type=expanded,
        help="a learned word: the text_embedding.safetensors of a run with --tune_text 1, with --model its base model",
    )  # fmt: skip
    parser.add_argument(
        "--strength", type=float,
        help=f"how much of the training is heard, 0 to {MOST_STRENGTH:g}: 0 is the base model, 1 the trained one, 0.5"
        " lies between them, above 1 is more than was learned; without it 1",
    )  # fmt: skip
    parser.add_argument(
        "--compare", action="store_true",
        help="make the same sounds by the base model too, into OUTPUT/base, OUTPUT/tuned and, with --strength,"
        " OUTPUT/strength-S, and a page on which they stand beside each other: OUTPUT/comparison.html",
    )  # fmt: skip
    parser.add_argument("--output", type=expanded, default="generated", help="folder for the sounds")
    parser.add_argument(
        "--format", choices=FORMATS, default="wav", help="of the files: wav and flac of 16 bit, mp3 of 192 kbit/s"
    )


def add_prompts(parser: ScriptParser) -> None:
    """What music is asked for, and how often."""
    parser.add_argument("--prompt", action="append", default=[], help='may be repeated; "" is music without a prompt')
    parser.add_argument("--prompts", metavar="FILE", type=expanded, help="a text file with one prompt a line")
    parser.add_argument("--seed", type=int, default=0, help="of each prompt: same prompt and seed, same sound")
    parser.add_argument(
        "--repeat", type=int, default=1, help="sounds of each prompt, with the seeds SEED, SEED + 1 and so on"
    )
    parser.add_argument(
        "--batch_size", type=int, default=8, help="sounds made at once; fewer where memory does not suffice"
    )


def add_length(parser: ScriptParser) -> None:
    """How long the music is, and how much of it the model makes at once."""
    parser.add_argument(
        "--seconds", type=float, default=10.0, help=f"length, 0.1 to {MOST_SECONDS:g}; beyond a window by several"
    )
    parser.add_argument(
        "--window_seconds", type=float,
        help=f"the most that the model makes at once; without it {WINDOW_SECONDS:g}, as Meta's models were trained",
    )  # fmt: skip
    parser.add_argument(
        "--stride_seconds", type=float,
        help="how much further each window begins than the one before it, whose end it goes on from; without it"
        f" {STRIDE_SHARE:g} of a window: {STRIDE_SHARE * WINDOW_SECONDS:g}",
    )  # fmt: skip


def add_sounds(parser: ScriptParser) -> None:
    """The flags that name a sound, which the music goes on from or follows."""
    parser.add_argument(
        "--continue_from", metavar="FILE", type=expanded,
        help="a sound file, from whose beginning the music of each prompt goes on; what is written begins with it",
    )  # fmt: skip
    parser.add_argument(
        "--continue_seconds", type=float,
        help=f"how much of its beginning is taken, part of --seconds; without it {CONTINUED_SECONDS:g}",
    )  # fmt: skip
    parser.add_argument(
        "--melody", metavar="FILE", type=expanded,
        help="a sound file whose melody the music of each prompt follows, from its beginning and again where it ends;"
        " for melody models alone",
    )  # fmt: skip
    parser.add_argument(
        "--stems", choices=("mix", "demucs", "auto"),
        help="what the melody is heard in, as in training. mix: all of FILE, also without this flag; demucs: its voice"
        " and other instruments without drums and bass, as published models were trained; auto: demucs on a GPU where"
        " it is installed and has its weights, else mix",
    )  # fmt: skip


def add_draws(parser: ScriptParser) -> None:
    """How the next code is chosen."""
    parser.add_argument("--guidance", type=float, default=3.0, help="how strongly to follow the prompt; 1 is plain")
    parser.add_argument("--temperature", type=float, default=1.0, help="above 0; higher is more varied")
    parser.add_argument("--top_k", type=int, default=250, help="choose among the k most likely codes; 0 is all")
    parser.add_argument("--greedy", action="store_true", help="always the most likely code: no randomness")


def add_device(parser: ScriptParser) -> None:
    """What it is computed on, and how."""
    parser.add_argument("--device", default="auto", help="auto is cuda where there is one, else cpu")
    parser.add_argument(
        "--precision", choices=("auto", "bf16", "fp32"), default="auto",
        help="of the language model's products; auto is bf16 on a GPU that has it, else fp32",
    )  # fmt: skip
    parser.add_argument(
        "--compile", type=int, choices=(0, 1), default=0,
        help="1 compiles the model's step first, which takes a minute for each new length and number of sounds, and"
        " pays for many sounds on a GPU",
    )  # fmt: skip


class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults where there are any, and the description as it is written."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False, []) else super()._get_help_string(action)


def check_ranges(flags: argparse.Namespace) -> None:
    """Raise ConfigError for the first number that is out of its range."""
    ranges = {
        "seconds": (0.1 <= flags.seconds <= MOST_SECONDS, f"a number from 0.1 to {MOST_SECONDS:g}"),
        "guidance": (1 <= flags.guidance <= 100, "a number from 1 to 100"),
        "temperature": (0 < flags.temperature <= 100, "a number above 0, at most 100"),
        "top_k": (flags.top_k >= 0, "a whole number of 0 or more"),
        "seed": (0 <= flags.seed < 2**63, "a whole number of 0 or more"),
        "repeat": (1 <= flags.repeat <= 1000, "a whole number from 1 to 1000"),
        "batch_size": (1 <= flags.batch_size <= 1000, "a whole number from 1 to 1000"),
    }
    if flags.strength is not None:
        fits = 0 <= flags.strength <= MOST_STRENGTH
        ranges["strength"] = (fits, f"a number from 0, the base model, over 1, the trained one, to {MOST_STRENGTH:g}")
    for name, (fits, allowed) in ranges.items():
        if not fits:
            raise ConfigError(f"--{name} {getattr(flags, name)} cannot be used: it takes {allowed}.")
    if flags.seed + flags.repeat > 2**63:
        raise ConfigError(f"--repeat {flags.repeat} goes beyond the largest seed with --seed {flags.seed}: lower it")


def check_windows(flags: argparse.Namespace) -> None:
    """Raise ConfigError for windows that music cannot be made of; else give both flags their values."""
    window, stride = flags.window_seconds, flags.stride_seconds
    if window is None:
        window = WINDOW_SECONDS
    if not 0.5 <= window <= 300:
        raise ConfigError(f"--window_seconds {window:g} cannot be used: it takes a number from 0.5 to 300")
    if flags.seconds <= window:
        for name in ("window_seconds", "stride_seconds"):
            if getattr(flags, name) is not None:
                raise ConfigError(
                    f"--{name} has no effect with --seconds {flags.seconds:g}, which one window of {window:g} s holds:"
                    " leave it out, or make longer music"
                )
    if stride is None:
        stride = STRIDE_SHARE * window
    if not 0.1 <= stride <= window - LEAST_OVERLAP_SECONDS:
        raise ConfigError(
            f"--stride_seconds {stride:g} cannot be used with windows of {window:g} s: it takes 0.1 to"
            f" {window - LEAST_OVERLAP_SECONDS:g}, so that each window has something to go on from"
        )
    flags.window_seconds, flags.stride_seconds = window, stride


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
    # Two frames: both lengths are rounded to whole ones, and one must be left to make.
    if not 0.02 <= flags.continue_seconds <= flags.seconds - 0.04:
        raise ConfigError(
            f"--continue_seconds {flags.continue_seconds:g} cannot be used with --seconds {flags.seconds:g}, which is"
            " the length of all: it takes 0.02 or more, and 0.04 less than --seconds at most"
        )
    if flags.continue_seconds > flags.window_seconds - 0.04:
        raise ConfigError(
            f"--continue_seconds {flags.continue_seconds:g} cannot be used: the model makes {flags.window_seconds:g} s"
            " at once (--window_seconds), and what it goes on from is part of that. Take less; to go on from a later"
            " place, cut the file to begin there"
        )


def check_effects(flags: argparse.Namespace, typed: set[str]) -> None:
    """Raise ConfigError for a flag that was typed and changes nothing."""
    if flags.greedy:
        for name in ("temperature", "top_k", "seed", "repeat"):
            if name in typed:
                raise ConfigError(f"--{name} has no effect with --greedy, which draws nothing: leave one of them out")
    if flags.compare and flags.strength in (0, 1):
        raise ConfigError(
            f"--strength {flags.strength:g} has no effect with --compare, which makes the sounds of 0 and 1 as it is:"
            " leave it out, or give another one"
        )


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
    for prompt in prompts:
        try:
            prompt.encode()
        except UnicodeEncodeError:  # bytes of the command line that the terminal's encoding does not know
            raise ConfigError(f"--prompt {prompt!r} is no text in UTF-8: give it in a file, by --prompts") from None
    if not prompts:
        raise ConfigError('nothing to generate: give --prompt "..." (it may be repeated) or --prompts FILE')
    return prompts
