"""Sounds as a page holds them: a small mp3 in base64, and the outline of the waveform. Each is made once."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import soundfile

MP3_BITS_PER_SECOND = 64_000  # of each channel
MOST_OTHERS = 40  # besides those that must be inside
MOST_BYTES = 7_500_000  # of base64 in all: a page has 10 MB at most, and the rest of it is below 2
SHORTEST_SECONDS = 5.0  # to which sounds are cut, so that those that must be inside all fit
BARS = 100  # of a waveform


@dataclass(frozen=True, kw_only=True)
class Waveform:
    """The outline of a sound: its length, and the largest sample of each of BARS equal parts, from 0 to 99.

    channels  that are played: 1 or 2
    """

    seconds: float
    peaks: Sequence[int]
    channels: int = 1


@dataclass(frozen=True, kw_only=True)
class Embedded:
    """A sound inside the page. seconds: how much of it, from its start."""

    mp3: str
    seconds: float


class Sounds:
    """What was made of sound files, as long as they are as they were and a page still asks for them."""

    def __init__(self) -> None:
        self._waveforms: dict[Path, tuple[tuple[int, int], Waveform | None]] = {}
        self._embedded: dict[Path, tuple[tuple[int, int], float, Embedded | None]] = {}

    def waveforms(self, files: Iterable[Path]) -> dict[Path, Waveform]:
        """Of each file that can be read as a sound."""
        kept = {}
        for file in files:
            if (state := _state(file)) is not None:
                known = self._waveforms.get(file)
                kept[file] = known if known and known[0] == state else (state, _waveform(file))
        self._waveforms = kept
        return {file: made for file, (_, made) in kept.items() if made is not None}

    def embedded(
        self, must: Sequence[Path], others: Sequence[Path], waves: Mapping[Path, Waveform]
    ) -> dict[Path, Embedded]:
        """Those of `must`, then of `others`, that a page has room for.

        Where those of `must` are too long together, the first seconds of each are taken. Of `others`, only whole sounds
        are, and at most MOST_OTHERS.

        waves  of each file that is a sound
        """
        must, others = [one for one in must if one in waves], [one for one in others if one in waves]
        lengths = {file: wave.seconds for file, wave in waves.items()}
        channels = max((waves[file].channels for file in (*must, *others)), default=1)
        limit = _limit([lengths[file] for file in must], channels)
        kept: dict[Path, tuple[tuple[int, int], float, Embedded | None]] = {}
        total = 0
        for file, seconds in [*((one, limit) for one in must), *((one, lengths[one]) for one in others[:MOST_OTHERS])]:
            seconds, state = min(seconds, lengths[file]), _state(file)
            if state is None or total + _base64_bytes(seconds, channels) > MOST_BYTES:
                continue
            known = self._embedded.get(file)
            if known is None or known[:2] != (state, seconds):
                known = (state, seconds, _mp3(file, seconds))
            kept[file] = known
            total += 0 if known[2] is None else len(known[2].mp3)
        self._embedded = kept
        return {file: made for file, (_, _, made) in kept.items() if made is not None}


def _limit(lengths: Sequence[float], channels: int) -> float:
    """The number of seconds to which sounds of these lengths are cut, so that together they fit into MOST_BYTES."""
    limit, left = SHORTEST_SECONDS, MOST_BYTES
    for number, seconds in enumerate(sorted(lengths)):  # the shorter ones leave what they do not need to the others
        share = left / (len(lengths) - number) / _base64_bytes(1.0, channels)
        if seconds > share:
            return max(limit, share)
        left -= _base64_bytes(seconds, channels)
    return max([limit, *lengths])


def _base64_bytes(seconds: float, channels: int) -> int:
    return round(seconds * channels * MP3_BITS_PER_SECOND / 8 * 4 / 3) + 2_000


def _state(file: Path) -> tuple[int, int] | None:
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size


def _waveform(file: Path) -> Waveform | None:
    """None where the file is no sound."""
    try:
        with file.open("rb") as opened, soundfile.SoundFile(opened) as sound:  # which cannot take every name
            frames, rate, channels = sound.frames, sound.samplerate, 2 if sound.channels == 2 else 1
            edges = np.linspace(0, frames, BARS + 1).astype(int)
            peaks = [_peak(sound.read(stop - start, always_2d=True)) for start, stop in pairwise(edges)]
    except (soundfile.SoundFileError, OSError):
        return None
    return Waveform(seconds=frames / rate, peaks=[min(99, round(99 * peak)) for peak in peaks], channels=channels)


def _peak(samples: np.ndarray) -> float:
    largest = float(np.abs(samples).max(initial=0.0))
    return largest if np.isfinite(largest) else 0.0


def _mp3(file: Path, seconds: float) -> Embedded | None:
    """The first seconds of a sound, in mono or stereo; of more than two channels the mean. None where the file is no
    sound, or has a rate that mp3 does not know."""
    made = io.BytesIO()
    try:
        with file.open("rb") as opened, soundfile.SoundFile(opened) as sound:  # which cannot take every name
            rate = sound.samplerate
            samples = sound.read(round(seconds * rate), dtype="float32", always_2d=True)
        if samples.shape[1] != 2:
            samples = samples.mean(axis=1, keepdims=True)
        samples = np.clip(np.nan_to_num(samples), -1, 1)
        # libsndfile goes by a level from 0 (most bits per second) to 1 (fewest): MPEG-1 has 320 to 32 kbit/s, and the
        # lower rates of MPEG-2 have 160 to 8 (libsndfile 1.2, mpeg_l3_encode.c).
        most, fewest = (320_000, 32_000) if rate >= 32_000 else (160_000, 8_000)
        level = (most - samples.shape[1] * MP3_BITS_PER_SECOND) / (most - fewest)
        soundfile.write(made, samples, rate, format="MP3", bitrate_mode="CONSTANT", compression_level=level)
    except (soundfile.SoundFileError, OSError):
        return None
    return Embedded(mp3=base64.b64encode(made.getvalue()).decode("ascii"), seconds=len(samples) / rate)
