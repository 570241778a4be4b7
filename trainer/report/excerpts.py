"""Short mp3 excerpts of sounds, to be put into a page that is read where the sounds are not."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

import numpy as np
import soundfile
from tqdm import tqdm

from trainer.data.audio import AudioFault, stream
from trainer.data.inventory import ScannedFolder
from trainer.data.places import sound_at

SECONDS, RATE_HZ = 10.0, 32_000
MOST_BYTES = 48 << 20  # of all excerpts together: a browser holds the page in memory


def excerpts_of(folders: Sequence[ScannedFolder]) -> dict[bytes, str]:
    """The first seconds of each inspected sound as mp3 in base64, by reference, until they have MOST_BYTES together.

    A sound that can no longer be decoded has none.
    """
    sounds = [one for folder in folders for one in folder.inspected]
    made: dict[bytes, str] = {}
    total = 0
    for one in tqdm(sounds, desc="Making excerpts", unit="file", delay=2.0):
        if total >= MOST_BYTES:
            break
        try:
            made[one.reference] = base64.b64encode(_mp3(one.reference)).decode("ascii")
        except AudioFault:
            continue
        total += len(made[one.reference])
    return made


def _mp3(reference: bytes) -> bytes:
    blocks = stream(sound_at(reference), RATE_HZ, block_seconds=SECONDS)
    wanted, held = round(SECONDS * RATE_HZ), list[np.ndarray]()
    for block in blocks:
        held.append(block)
        if sum(map(len, held)) >= wanted:
            break
    samples = np.concatenate(held)[:wanted]
    file = io.BytesIO()
    soundfile.write(file, samples / max(1.0, float(np.abs(samples).max())), RATE_HZ, format="MP3")
    return file.getvalue()
