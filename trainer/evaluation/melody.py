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
    held: list[np.ndarray] = []
    samples = 0
    try:
        for block in blocks(path, SAMPLE_RATE_HZ, 1.0, None):
            held.append(block[: HEARD_SAMPLES - samples])
            samples += len(held[-1])
            if not np.isfinite(held[-1]).all():
                raise AudioFault("not finite", "NaN or infinite samples: repair or export it again")
            if samples == HEARD_SAMPLES:
                break
        if not samples:
            raise AudioFault("empty", "holds no samples: export it again")
    except AudioFault as fault:
        raise DataError(f"{path} gives no melody: {fault}") from fault
    return notes_of(np.concatenate(held))[:MELODY_PLACES], samples / SAMPLE_RATE_HZ
