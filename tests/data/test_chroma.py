"""The notes of a sound: those of audiocraft, whole or block by block, and in a crop those of the crop."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from tests import chroma_sounds
from tests.chroma_sounds import noise, tone, tune
from trainer.data import chroma
from trainer.data.chroma import FRAME_SAMPLES, NOTE_SAMPLES, PASS_WINDOWS, WINDOW_SAMPLES

# Recorded from audiocraft itself; the file says with which versions. tests/interop/test_audiocraft_chroma.py.
RECORDED = json.loads(Path(__file__).with_name("recorded_chroma.json").read_text())["notes"]
SOUND = tune([0, 7, 3, 10, 5, 2, 9], 24_000) + noise(168_000, 3)


@pytest.mark.parametrize("name", RECORDED)
def test_the_notes_of_whole_sounds_are_those_of_audiocraft(name):
    assert chroma_sounds.as_text(chroma.notes_of(sounds()[name])) == RECORDED[name]


@functools.cache
def sounds() -> dict[str, np.ndarray]:
    return {**chroma_sounds.made(), **chroma_sounds.examples()}


def slow_notes(sound: np.ndarray, hop: int) -> np.ndarray:
    """Window by window in float64, the sound mirrored sample by sample; by a filter bank of the same source."""
    _, bank_CF = chroma._window_and_bank(chroma.CPU)
    if len(sound) < WINDOW_SAMPLES:
        missing = WINDOW_SAMPLES - len(sound)
        sound = np.concatenate([np.zeros(missing // 2), sound, np.zeros(missing - missing // 2)])
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(WINDOW_SAMPLES) / WINDOW_SAMPLES)
    last = len(sound) - 1
    notes = []
    for centre in range(0, len(sound) + 1, hop):
        places = np.abs(np.arange(centre - WINDOW_SAMPLES // 2, centre + WINDOW_SAMPLES // 2))
        power = np.abs(np.fft.rfft(window * sound[last - np.abs(last - places)])) ** 2
        notes.append(int(np.argmax(bank_CF.double().numpy() @ power)))
    return np.array(notes, np.uint8)


EDGES = st.builds(
    lambda unit, count, more: max(1, unit * count + more),
    st.sampled_from([FRAME_SAMPLES, NOTE_SAMPLES, WINDOW_SAMPLES, PASS_WINDOWS * FRAME_SAMPLES]),
    st.integers(0, 6),
    st.integers(-1, 1),
).filter(lambda samples: samples <= len(SOUND))


@given(samples=EDGES, sizes=st.lists(st.integers(1, 70_000), min_size=1, max_size=8))
@hypothesis_settings(max_examples=40, deadline=None, derandomize=True)
def test_blocks_of_any_size_give_the_notes_of_the_whole(samples, sizes):
    sound, blocks, done = SOUND[:samples], [], 0
    while done < samples:
        blocks.append(sound[done : done + sizes[len(blocks) % len(sizes)]])
        done += len(blocks[-1])
    assert np.array_equal(chroma.frame_notes(blocks), chroma.frame_notes([sound]))


@pytest.mark.parametrize("hop", [FRAME_SAMPLES, NOTE_SAMPLES])
@pytest.mark.parametrize("samples", [1, 777, 8_193, 16_383, 16_384, 16_385, 24_000, 56_704, 57_344])
def test_notes_are_those_of_each_window_by_itself(hop, samples):
    sound = SOUND[:samples]
    found = chroma.frame_notes([sound]) if hop == FRAME_SAMPLES else chroma.notes_of(sound)
    assert len(found) == 1 + max(samples, WINDOW_SAMPLES) // hop
    assert found.dtype == np.uint8 and np.array_equal(found, slow_notes(sound, hop))


def test_blocks_of_a_sample_give_the_notes_of_the_whole():
    sound = SOUND[:20_000]
    blocks = (sound[at : at + 1] for at in range(len(sound)))
    assert np.array_equal(chroma.frame_notes(blocks), chroma.frame_notes([sound]))


def test_every_tone_has_its_note_however_loud():
    """Note 0 is C, three semitones above A: the filter bank's notes begin there."""
    for semitone in range(12):
        for loudness in (1e-4, 1, 100):
            found = chroma.notes_of(np.float32(loudness) * tone(semitone, 40_000, harmonics=1))
            assert set(found) == {(semitone + 9) % 12}


def test_of_nothing_there_are_no_notes_and_silence_has_note_0():
    assert chroma.frame_notes([]).shape == chroma.notes_of(np.zeros(0, np.float32)).shape == (0,)
    assert chroma.frame_notes([np.zeros(40_000, np.float32)]).tolist() == [0] * 63


def test_of_a_long_sound_no_more_is_held_than_a_pass_and_a_block():
    finder = chroma.NoteFinder(FRAME_SAMPLES, chroma.CPU)
    most = 0
    for seed in range(40):
        finder.add(noise(16_000, seed))
        most = max(most, sum(len(piece) for piece in finder._held))
    assert most <= WINDOW_SAMPLES + PASS_WINDOWS * FRAME_SAMPLES + 16_000
    assert len(finder.notes()) == 1 + 40 * 16_000 // FRAME_SAMPLES
