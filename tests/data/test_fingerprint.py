"""Fingerprints are equal for equal sound at another gain, rate and format, and for nothing else, in n log n."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import soundfile
import soxr

from trainer.data.fingerprint import (
    BYTES,
    CHANGES,
    KEYS,
    MOST_FRAMES,
    NEIGHBOURS,
    Fingerprint,
    groups_of,
    near_pairs,
    unpacked,
)

EXAMPLES = sorted((Path(__file__).resolve().parents[2] / "examples").glob("*.wav"))


def fingerprint(samples: np.ndarray, rate_hz: int, block: int = 65_536) -> str:
    meter = Fingerprint(rate_hz)
    samples = samples.reshape(len(samples), -1).astype(np.float32)
    for start in range(0, len(samples), block):
        meter.add(samples[start : start + block])
    return meter.result()


def coded(samples: np.ndarray, rate_hz: int, file_format: str, subtype: str) -> tuple[np.ndarray, int]:
    file = io.BytesIO()
    soundfile.write(file, samples, rate_hz, format=file_format, subtype=subtype)
    file.seek(0)
    return soundfile.read(file, dtype="float32")


def versions(samples: np.ndarray, rate_hz: int) -> dict[str, tuple[np.ndarray, int]]:
    return {
        "-6 dB": (samples * 0.5, rate_hz),
        "32 kHz": (soxr.resample(samples, rate_hz, 32_000), 32_000),
        "8 kHz": (soxr.resample(samples, rate_hz, 8_000), 8_000),
        "stereo": (np.stack([samples, samples], axis=1) if samples.ndim == 1 else samples.mean(axis=1), rate_hz),
        "mp3": coded(samples, rate_hz, "MP3", "MPEG_LAYER_III"),
        "vorbis": coded(samples, rate_hz, "OGG", "VORBIS"),
        "opus": coded(soxr.resample(samples, rate_hz, 48_000), 48_000, "OGG", "OPUS"),
    }


@pytest.mark.parametrize("paths", [EXAMPLES[::4], pytest.param(EXAMPLES, marks=pytest.mark.full)], ids=["some", "all"])
def test_another_gain_rate_or_format_is_found_and_other_clips_and_other_parts_of_a_song_are_not(
    paths: list[Path],
) -> None:
    names, prints, seconds = [], [], []
    for path in paths:
        samples, rate_hz = soundfile.read(path, dtype="float32")
        half = len(samples) // 2
        for part, piece in (("start", samples[:half]), ("end", samples[half : 2 * half])):
            for name, (sound, sound_rate_hz) in {"": (piece, rate_hz), **versions(piece, rate_hz)}.items():
                names.append((path.stem, part, name))
                prints.append(fingerprint(sound, sound_rate_hz))
                seconds.append(len(sound) / sound_rate_hz)
    found = groups_of((one, other) for one, other in near_pairs(prints, seconds).pairs.tolist())
    assert sorted(len(group) for group in found) == [8] * (2 * len(paths))
    assert all(len({names[number][:2] for number in group}) == 1 for group in found)


def test_a_fingerprint_has_at_most_64_bytes_and_does_not_depend_on_the_blocks() -> None:
    samples, rate_hz = soundfile.read(EXAMPLES[0], dtype="float32")
    whole = fingerprint(samples, rate_hz)
    assert len(bytes.fromhex(whole)) == BYTES == 64
    assert all(fingerprint(samples, rate_hz, block) == whole for block in (501, 4_410, 10**9))


@pytest.mark.parametrize("samples", [1, 100, 4_000])
def test_a_sound_of_less_than_a_quarter_of_a_second_has_none(samples: int) -> None:
    assert fingerprint(np.ones(samples), 44_100) == ""


def test_silence_has_none_and_is_nobodys_near_duplicate() -> None:
    assert fingerprint(np.zeros(44_100), 44_100) == ""
    assert len(near_pairs(["", "", "00" * BYTES], [1.0, 1.0, 1.0]).pairs) == 0
    assert len(near_pairs([], []).pairs) == 0


def test_steady_tones_of_another_pitch_differ_and_of_another_gain_do_not() -> None:
    time = np.arange(32_000 * 2) / 32_000
    low, high = np.sin(2 * np.pi * 220 * time), np.sin(2 * np.pi * 880 * time)
    prints = [fingerprint(sound, 32_000) for sound in (low, 0.1 * low, high)]
    assert near_pairs(prints, [2.0] * 3).pairs.tolist() == [[0, 1]]


def test_equal_sounds_of_another_length_are_other_sounds() -> None:
    assert near_pairs(["a5" * BYTES] * 2, [10.0, 12.0]).pairs.tolist() == []


def test_a_long_sound_takes_the_memory_of_a_short_one_and_is_found_all_the_same() -> None:
    chance = np.random.default_rng(0)
    meter, other = Fingerprint(1_000), Fingerprint(1_000)
    for _ in range(200):  # 400 s, so that rows are joined
        block = (chance.standard_normal((2_000, 1)) * chance.uniform(0.05, 1)).astype(np.float32)
        meter.add(block)
        other.add(0.5 * block)
    assert meter._power.shape[0] == MOST_FRAMES and meter._joined > 1
    assert near_pairs([meter.result(), other.result()], [400.0, 400.0]).pairs.tolist() == [[0, 1]]


def test_pairs_among_20_000_are_found_with_some_comparisons_for_each() -> None:
    chance, n = np.random.default_rng(1), 20_000
    packed = chance.integers(0, 256, (n, BYTES), dtype=np.uint8)
    twins = chance.choice(n, 200, replace=False)
    packed[twins[:100]] = packed[twins[100:]]
    packed[twins[:100], chance.integers(0, CHANGES // 4, 100)] ^= 0b01_01_01_01  # each differs in four changes
    found = near_pairs([row.tobytes().hex() for row in packed], [10.0] * n)
    pairs = {tuple(sorted(pair)) for pair in zip(twins[:100].tolist(), twins[100:].tolist(), strict=True)}
    assert {tuple(pair) for pair in found.pairs.tolist()} == pairs
    assert found.comparisons <= n * KEYS * NEIGHBOURS  # all pairs would be 2e8
    alike = near_pairs([packed[0].tobytes().hex()] * n, [10.0] * n)  # the worst case: all are equal
    assert alike.comparisons <= n * KEYS * NEIGHBOURS
    assert len(groups_of((one, other) for one, other in alike.pairs.tolist())) == 1


def test_what_is_packed_comes_out_again() -> None:
    packed = np.arange(BYTES, dtype=np.uint8)[None]
    steps, spectra = unpacked(packed)
    assert steps.shape == (1, CHANGES) and spectra.shape == (1, 16)
    assert steps[0, :8].tolist() == [0, 0, 0, 0, 0, 0, 0, 1] and spectra[0, :2].tolist() == [3, 8]
