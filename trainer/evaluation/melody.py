"""The melody of a sound file, for a melody model to follow."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from trainer.data import audio
from trainer.data.audio_fault import AudioFault
from trainer.data.chroma import NOTE_SAMPLES, SAMPLE_RATE_HZ, WINDOW_SAMPLES, notes_of
from trainer.data.excerpt import Excerpt
from trainer.errors import DataError
from trainer.spec.shapes import MELODY_PLACES

# A sound of 30 s has a note at each of a model's places. The last one's window reaches beyond its end, as it does in a
# crop of a clip, whose notes are those of the whole clip; more of the file has no effect.
HEARD_SAMPLES = (MELODY_PLACES - 1) * NOTE_SAMPLES + WINDOW_SAMPLES
# How a sound is decoded: audio.stream, or the `blocks` of stems, which leave drums and bass out.
Blocks = Callable[[Path, int, float, Excerpt | None], Iterator[np.ndarray]]


def melody_of_file(path: Path, blocks: Blocks = audio.stream) -> tuple[np.ndarray, float]:
    """The notes (n,) uint8 in [0, 12) of a sound file, n from 5 to MELODY_PLACES; and how many seconds were read.

    blocks  gives the file as mono blocks: path, sample rate, seconds of a block, part

    Raises DataError for a file that cannot be decoded, or has samples there that are not numbers.
    """
    samples_n = first_samples(path, HEARD_SAMPLES, blocks)
    return notes_of(samples_n)[:MELODY_PLACES], len(samples_n) / SAMPLE_RATE_HZ


def first_samples(path: Path, most: int, blocks: Blocks = audio.stream) -> np.ndarray:
    """The file's first samples in mono, (n,) float32 at 32 kHz, 1 to `most`: 128 KB a second. Raises DataError."""
    held: list[np.ndarray] = []
    samples = 0
    try:
        for block in blocks(path, SAMPLE_RATE_HZ, 1.0, None):
            held.append(block[: most - samples])
            samples += len(held[-1])
            if not np.isfinite(held[-1]).all():
                raise AudioFault("not finite", "NaN or infinite samples: repair or export it again")
            if samples == most:
                break
        if not samples:
            raise AudioFault("empty", "holds no samples: export it again")
    except AudioFault as fault:
        raise DataError(f"{path} gives no melody: {fault}") from fault
    return np.concatenate(held)


def notes_of_window(samples_n: np.ndarray, start: int, length: int) -> np.ndarray:
    """The notes (m,) uint8 of `length` samples from `start` on, of a sound that begins anew wherever it ends.

    m = 1 + length // 4096 of half a second or more. What lies around the window is not heard, as in audiocraft 1.3.0
    (MusicGen._generate_tokens), so that the notes at its ends may be others than those of the whole sound.
    """
    return notes_of(np.take(samples_n, np.arange(start, start + length), mode="wrap"))
