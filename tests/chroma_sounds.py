"""Sounds whose notes are compared with audiocraft's: made here, and the clips of examples/."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from trainer.data import audio
from trainer.data.chroma import SAMPLE_RATE_HZ

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
DIGITS = "0123456789ab"  # of a note: those of recorded_chroma.json


def tone(semitone: float, samples: int, harmonics: int = 4) -> np.ndarray:
    """A tone so many semitones above the A of 220 Hz, with overtones that become quieter: float32 (samples,)."""
    times = np.arange(samples) / SAMPLE_RATE_HZ
    hertz = 220 * 2 ** (semitone / 12)
    waves = (np.sin(2 * np.pi * hertz * k * times) / k**2 for k in range(1, 1 + harmonics))
    return (0.2 * sum(waves)).astype(np.float32)


def tune(semitones: list[float], samples: int) -> np.ndarray:
    """Tones of so many samples, one after the other."""
    return np.concatenate([tone(semitone, samples) for semitone in semitones])


def noise(samples: int, seed: int) -> np.ndarray:
    return (0.1 * np.random.default_rng(seed).standard_normal(samples)).astype(np.float32)


def made() -> dict[str, np.ndarray]:
    """Tunes, noise, silence around a tone, and sounds of about one window, all mono at 32 kHz."""
    silence = np.zeros(40_000, np.float32)
    return {
        "all notes": tune([*range(13)], 15_000),
        "between the notes": tune([0.4, 3.6, 7.45, 12.3], 20_000),
        "noise": noise(200_000, 1),
        "tune in noise": tune([0, 4, 7, 12, 9, 5, 2], 11_111) + noise(77_777, 2),
        "silence around a tone": np.concatenate([silence, tone(3, 30_000), silence]),
        "silence": silence,
        **{f"{n} samples": tune([5, 8], n)[:n] + noise(n, n) for n in (1, 5_001, 16_383, 16_384, 16_385, 24_577)},
    }


def examples() -> dict[str, np.ndarray]:
    """The clips of examples/, whole, as a run hears them."""
    files = sorted(file for file in EXAMPLES.iterdir() if file.suffix in (".wav", ".flac", ".mp3", ".ogg"))
    return {file.name: np.concatenate(list(audio.stream(file, SAMPLE_RATE_HZ))) for file in files}


def as_text(notes: np.ndarray) -> str:
    """One digit a note."""
    return "".join(DIGITS[note] for note in notes)


def save(path: Path, sounds: Mapping[str, np.ndarray]) -> None:
    """As `tests/interop/real_chroma.py` reads them."""
    np.savez(path, **sounds)
