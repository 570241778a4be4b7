"""Excerpts of the page: where they start, and that they are the sound of that place."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
import pytest
import soundfile

from trainer.data import audio
from trainer.data.inventory import InspectedFile, ScannedFolder
from trainer.report.excerpts import Sample, excerpts_of

RATE_HZ = 8_000
# Seconds of silence, of music that begins 400 Hz and rises 10 Hz each second, and of silence again; then the start.
PLACES = [
    ((1, 6, 2), 0.0),  # no more than an excerpt: all of it
    ((4, 6, 3), 4.0),
    ((0, 12, 0), 2.0),  # a third would leave less than 10 s
    ((2, 60, 2), 22.0),
    ((0, 240, 0), 60.0),  # a third is later than a minute
]


def tone(seconds: float) -> np.ndarray:
    """Music whose frequency says where one is in it."""
    time = np.arange(round(seconds * RATE_HZ)) / RATE_HZ
    return 0.3 * np.sin(2 * np.pi * (400 + 5 * time) * time)


def excerpt_of(path: Path, samples: np.ndarray) -> tuple[Sample, np.ndarray]:
    """What is made of a file of these samples, and its sound."""
    soundfile.write(path, samples, RATE_HZ)
    facts = audio.inspect(path)
    one = InspectedFile(
        path=path.name, reference=str(path).encode(), caption=None, caption_source="", caption_fields="", facts=facts
    )
    sample = excerpts_of([ScannedFolder(root=str(path.parent), fates=(), inspected=(one,))])[one.reference]
    return sample, soundfile.read(io.BytesIO(base64.b64decode(sample.mp3)))[0]


@pytest.mark.parametrize(("parts", "start"), PLACES)
def test_an_excerpt_starts_a_third_into_the_music_and_is_the_sound_of_that_place(
    tmp_path: Path, parts: tuple[int, int, int], start: float
) -> None:
    lead, music, tail = parts
    silence = [np.zeros(RATE_HZ * seconds) for seconds in (lead, tail)]
    sample, sound = excerpt_of(tmp_path / "a.wav", np.concatenate([silence[0], tone(music), silence[1]]))
    assert sample.start_seconds == pytest.approx(start, abs=0.01)
    assert len(sound) / 32_000 == pytest.approx(min(10, lead + music + tail - start), abs=0.06)
    second = sound[32_000:64_000]  # of the excerpt, in the middle of which its tone is this high:
    found = np.argmax(np.abs(np.fft.rfft(second * np.hanning(len(second)))))
    assert found == pytest.approx(400 + 10 * (start - lead + 1.5), abs=3)


def test_where_a_third_in_is_silent_the_excerpt_starts_with_the_first_sound(tmp_path: Path) -> None:
    samples = np.concatenate([np.zeros(RATE_HZ), tone(5), np.zeros(20 * RATE_HZ), tone(5)])
    sample, sound = excerpt_of(tmp_path / "a.wav", samples)
    assert sample.start_seconds == pytest.approx(1, abs=0.01) and np.abs(sound).max() > 0.2


def test_a_sound_whose_channels_cancel_each_other_is_heard_in_stereo(tmp_path: Path) -> None:
    music = tone(12)
    sample, sound = excerpt_of(tmp_path / "a.wav", np.stack([music, -music], axis=1))
    assert sample.start_seconds == pytest.approx(2, abs=0.01) and sound.shape[1] == 2
    assert np.abs(sound[:, 0]).max() > 0.2 and np.abs(sound.sum(axis=1)).max() < 0.01
    assert excerpt_of(tmp_path / "b.wav", np.stack([music, music / 2], axis=1))[1].ndim == 1


def test_a_file_that_changed_since_it_was_inspected_has_an_excerpt_of_what_is_there(tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    soundfile.write(path, tone(30), RATE_HZ)
    facts = audio.inspect(path)
    one = InspectedFile(
        path=path.name, reference=str(path).encode(), caption=None, caption_source="", caption_fields="", facts=facts
    )
    soundfile.write(path, tone(3), RATE_HZ)
    made = excerpts_of([ScannedFolder(root=str(tmp_path), fates=(), inspected=(one,))])
    assert made[one.reference].start_seconds == facts.levels.lead_seconds  # nothing is there at a third of what it was
    path.unlink()
    assert excerpts_of([ScannedFolder(root=str(tmp_path), fates=(), inspected=(one,))]) == {}
