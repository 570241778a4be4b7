"""Short mp3 excerpts of sounds, to be put into a page that is read where the sounds are not."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import soundfile
from tqdm import tqdm

from trainer.data.audio import AudioFacts, AudioFault, stream
from trainer.data.excerpt import Excerpt
from trainer.data.inventory import InspectedFile, ScannedFolder
from trainer.data.levels import SILENCE
from trainer.data.places import sound_at

SECONDS, RATE_HZ = 10.0, 32_000
LATEST_SECONDS = 60.0  # into the music: what lies before is decoded and dropped, and of an hour a third takes long
MORE_SECONDS = 1.0  # read behind an excerpt, since a resampler gives the last samples of a place only with the next
MOST_BYTES = 48 << 20  # of all excerpts together: a browser holds the page in memory


@dataclass(frozen=True, kw_only=True)
class Sample:
    """An excerpt as a page has it: an mp3 file in base64, and where in its sound it starts."""

    start_seconds: float
    mp3: str


def excerpts_of(folders: Sequence[ScannedFolder]) -> dict[bytes, Sample]:
    """An excerpt of each inspected sound, by reference, until they have MOST_BYTES together.

    It starts where `start_of` says, and with the first sound where nothing is heard in it. A sound that can no longer
    be decoded has none.
    """
    sounds = [one for folder in folders for one in folder.inspected]
    made: dict[bytes, Sample] = {}
    total = 0
    for one in tqdm(sounds, desc="Making excerpts", unit="file", delay=2.0):
        if total >= MOST_BYTES:
            break
        try:
            made[one.reference] = _sample(one)
        except AudioFault:
            continue
        total += len(made[one.reference].mp3)
    return made


def start_of(facts: AudioFacts) -> float:
    """Seconds into a file at which its excerpt starts: a third into what lies between the silence at both ends, but no
    later than LATEST_SECONDS into it, and no later than that a whole excerpt is left. A file that is no longer than an
    excerpt is there whole.

    The first seconds are often a fade-in, and tell little of the music.
    """
    if facts.seconds <= SECONDS:
        return 0.0
    lead = facts.levels.lead_seconds
    music = facts.seconds - lead - facts.levels.tail_seconds
    return lead + max(0.0, min(music / 3, LATEST_SECONDS, music - SECONDS))


def _sample(one: InspectedFile) -> Sample:
    start = start_of(one.facts)
    samples = _samples(one, start)
    if not len(samples) or np.abs(samples).max() < SILENCE:
        start = one.facts.levels.lead_seconds
        samples = _samples(one, start)
    if not len(samples):
        raise AudioFault("empty", "shorter than it was when it was inspected")
    file = io.BytesIO()
    soundfile.write(file, samples / max(1.0, float(np.abs(samples).max())), RATE_HZ, format="MP3")
    return Sample(start_seconds=start, mp3=base64.b64encode(file.getvalue()).decode("ascii"))


def _samples(one: InspectedFile, start_seconds: float) -> np.ndarray:
    """The sound from there on, (n,) float32 at RATE_HZ, in mono: as stereo it would take twice the room of a page. One
    whose channels cancel each other there is (n, 2). Raises AudioFault where it cannot be decoded."""
    rate, wanted = one.facts.sample_rate_hz, round(SECONDS * RATE_HZ)
    part = Excerpt(first_frame=round(start_seconds * rate), frames=round((SECONDS + MORE_SECONDS) * rate), gain=1.0)
    channels = 2 if one.facts.cancels else 1
    held, count = [np.zeros(0 if channels == 1 else (0, channels), np.float32)], 0
    for block in stream(sound_at(one.reference), RATE_HZ, MORE_SECONDS, part, channels):
        held.append(block)
        count += len(block)
        if count >= wanted:
            break
    return np.concatenate(held)[:wanted]
