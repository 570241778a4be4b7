"""What a folder of music holds, roughly and at once: names of all files, headers of some, and no sound is decoded."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from trainer.data.audio_fault import AudioFault
from trainer.data.folder_walk import Sound, walk
from trainer.data.sound_file import opened

SAMPLED = 200  # files whose headers are read
# From a disk that answers slowly fewer headers are read: those that were drawn first are as good a sample as all.
MOST_SECONDS = 0.7
BYTES_PER_SECOND = 24_000  # of a file whose header does not say how long it lasts: some mp3, of 192 kbit/s or so
LETTERS_PER_TOKEN = 4  # of an English caption, roughly, as T5 splits it
TOKENS_WITHOUT_FILE = 30  # of a caption that stands in a table or a tag


@dataclass(frozen=True, kw_only=True)
class Outline:
    """A folder of music, as far as names and some headers tell.

    sounds          how many sound files there are, melodies of others left out
    seconds         of some of them, drawn among all; as many as there are where there are few
    caption_tokens  of a caption, on average, roughly
    """

    sounds: int
    seconds: Sequence[float]
    caption_tokens: float

    @property
    def total_seconds(self) -> float:
        """Of all sounds together."""
        return self.sounds * sum(self.seconds) / len(self.seconds) if self.seconds else 0.0


def outline_of(folder: str) -> Outline | None:
    """None where there is no such folder, or nothing in it that is a sound."""
    if not os.path.isdir(folder):
        return None
    sounds = [found for found in walk(folder) if isinstance(found, Sound)]
    drawn = random.Random(0).sample(sounds, min(SAMPLED, len(sounds)))  # the same ones each time
    seconds: list[float] = []
    tokens: list[float] = []
    until = time.monotonic() + MOST_SECONDS
    for sound in drawn:
        length = _seconds_of(os.path.join(folder, sound.name))
        if length is not None:
            seconds.append(length)
            tokens.append(_tokens_of(folder, sound))
        if time.monotonic() > until:
            break
    if not seconds:
        return None
    return Outline(sounds=len(sounds), seconds=seconds, caption_tokens=sum(tokens) / len(tokens))


def _seconds_of(path: str) -> float | None:
    """Of a sound by its header, or by its size where that says nothing; None where it is no sound."""
    with suppress(AudioFault, OSError), opened(Path(path)) as decoder:
        if decoder.declared_frames is None:
            return os.stat(path).st_size / BYTES_PER_SECOND
        return decoder.declared_frames / decoder.rate_hz
    return None


def _tokens_of(folder: str, sound: Sound) -> float:
    with suppress(OSError):
        if sound.caption_name:
            return 1 + os.stat(os.path.join(folder, sound.caption_name)).st_size / LETTERS_PER_TOKEN
    return TOKENS_WITHOUT_FILE
