"""The melody of --melody, as each window's model reads it."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from generating.length import Length
from trainer.data.chroma import SAMPLE_RATE_HZ
from trainer.data.melody_places import melody_places
from trainer.data.stems import stems_of
from trainer.errors import ConfigError
from trainer.evaluation.melody import first_samples, melody_of_file, notes_of_window
from trainer.model.source import Source
from trainer.spec.melody_generation import check_melody_generation
from trainer.spec.shapes import KNOWN, MELODY_SECONDS


def melody_of(
    flags: argparse.Namespace, source: Source, device: torch.device, length: Length
) -> Callable[[int], Tensor | None] | None:
    """The melody that is followed from a frame on, where a window begins; None without one. Says what it is heard in,
    and what is done with its length.

    Music of one window follows the notes of the file, which are repeated where they end, and that of several the sound
    itself from each window's place on, which begins anew where it ends: as audiocraft 1.3.0 has it.

    Raises ConfigError where the model reads none, or cannot with the installed transformers, and where demucs is asked
    for and missing; DataError for a file that cannot be decoded.
    """
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
    if len(length.starts) == 1:
        return _of_one_window(flags, device)
    return _of_windows(flags, device, length.starts, source.frame_rate_hz)


def _of_one_window(flags: argparse.Namespace, device: torch.device) -> Callable[[int], Tensor | None]:
    notes, seconds = melody_of_file(Path(flags.melody), stems_of(flags.stems or "mix", device).blocks)
    if seconds > MELODY_SECONDS:
        print(f"note: of {flags.melody} the first {MELODY_SECONDS:g} s are followed, which is all that models read")
    elif seconds < min(flags.seconds, MELODY_SECONDS):
        _tell_repeated(flags, seconds)
    if not notes.any():
        _tell_none(flags)
    melody_C = melody_places(notes)
    return lambda start_frame: melody_C


def _of_windows(
    flags: argparse.Namespace, device: torch.device, starts: range, frame_rate_hz: float
) -> Callable[[int], Tensor | None]:
    window = round(flags.window_seconds * SAMPLE_RATE_HZ)
    places = {start: round(start / frame_rate_hz * SAMPLE_RATE_HZ) for start in starts}
    samples_n = first_samples(
        Path(flags.melody), places[starts[-1]] + window, stems_of(flags.stems or "mix", device).blocks
    )
    if len(samples_n) < flags.seconds * SAMPLE_RATE_HZ:
        _tell_repeated(flags, len(samples_n) / SAMPLE_RATE_HZ)
    notes = {start: notes_of_window(samples_n, place, window) for start, place in places.items()}
    if not any(found.any() for found in notes.values()):
        _tell_none(flags)
    return lambda start_frame: melody_places(notes[start_frame])


def _tell_repeated(flags: argparse.Namespace, seconds: float) -> None:
    print(f"note: {flags.melody} has {seconds:.1f} s: its melody is repeated until the music's end")


def _tell_none(flags: argparse.Namespace) -> None:
    print(f"note: {flags.melody} gives no melody to follow: it is silent in mono, or nothing but the note C")
