"""Tempo and key of synthetic loops whose tempo and key are known."""

from __future__ import annotations

import numpy as np
import pytest
from captioning.tempo_and_key import PITCHES, RATE_HZ, key_of, tempo_of


def loop(bpm: float, tonic: int, minor: bool, seconds: float = 25.0) -> np.ndarray:
    """Kick, snare and hi-hat, with the chords I IV V I of a key and their roots, one for each bar."""
    noise = np.random.default_rng(0)
    out = np.zeros(round(seconds * RATE_HZ))
    beat = 60 / bpm

    def add(start: float, sound: np.ndarray) -> None:
        first = round(start * RATE_HZ)
        out[first : first + len(sound)] += sound[: max(0, len(out) - first)]

    def tone(semitones: float, length: float) -> np.ndarray:
        t = np.arange(round(length * RATE_HZ)) / RATE_HZ
        hertz = 440 * 2 ** (semitones / 12)
        return np.exp(-3 * t / length) * sum(np.sin(2 * np.pi * hertz * h * t) / h for h in (1, 2, 3))

    t = np.arange(round(0.2 * RATE_HZ)) / RATE_HZ
    third = 3 if minor else 4
    chords = ((0, third, 7), (5, 5 + third, 12), (7, 11, 14), (0, third, 7))
    for number in range(int(seconds / beat)):
        add(number * beat, np.exp(-30 * t) * np.sin(2 * np.pi * 60 * t))
        if number % 2:
            add(number * beat, 0.4 * np.exp(-30 * t) * noise.normal(size=len(t)))
        add((number + 0.5) * beat, 0.15 * np.exp(-90 * t) * noise.normal(size=len(t)))
        if number % 4 == 0:
            chord = chords[number // 4 % 4]
            for note in (*chord, chord[0] - 12):
                add(number * beat, 0.3 * tone(tonic + note - 9 - 12, 3 * beat))
    return (out / np.abs(out).max()).astype(np.float32)


LOOPS = [(72, 0, False), (80, 9, True), (90, 2, True), (100, 7, False), (120, 4, True), (128, 5, True), (140, 6, True),
         (150, 10, False), (174, 1, True)]  # fmt: skip


@pytest.mark.parametrize(("bpm", "tonic", "minor"), LOOPS)
@pytest.mark.parametrize("gain", [1.0, 0.01])
def test_a_loop_s_tempo_and_key_are_found(bpm: float, tonic: int, minor: bool, gain: float) -> None:
    samples = loop(bpm, tonic, minor) * np.float32(gain)
    tempo, key = tempo_of(samples), key_of(samples)
    assert tempo is not None and key is not None
    found = float(tempo.text.removesuffix(" bpm"))
    assert min(abs(found * octave - bpm) for octave in (0.5, 1, 2)) <= 1, "the tempo, or its double or half"
    assert 70 <= found <= 180 and tempo.confidence >= 0.5
    assert key.text == f"{PITCHES[tonic]} {'minor' if minor else 'major'}" and key.confidence >= 0.5


def test_a_tempo_that_changes_is_less_sure_than_one_that_stays() -> None:
    steady = tempo_of(loop(128, 0, True, 60))
    changing = tempo_of(np.concatenate([loop(128, 0, True, 30), loop(100, 0, True, 30)]))
    assert steady is not None and changing is not None
    assert changing.confidence < 0.6 * steady.confidence


def test_noise_a_held_tone_silence_and_short_clips_have_neither() -> None:
    t = np.arange(20 * RATE_HZ) / RATE_HZ
    noise = np.random.default_rng(0).normal(0, 0.1, len(t))
    for samples in (noise, np.sin(2 * np.pi * 440 * t), np.zeros(len(t)), loop(120, 0, False, 14)):
        assert tempo_of(samples.astype(np.float32)) is None
        assert key_of(samples.astype(np.float32)) is None
    assert tempo_of(np.zeros(0, np.float32)) is None and key_of(np.zeros(0, np.float32)) is None
