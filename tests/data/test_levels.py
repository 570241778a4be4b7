"""The levels of a sound are those that its samples have, however it is cut into blocks."""

from __future__ import annotations

import math
import tracemalloc
from itertools import groupby

import numpy as np
import pyloudnorm
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.audio_files import noise
from trainer.data import loudness
from trainer.data.levels import CLIPPED, SILENCE, LevelMeter, Levels
from trainer.data.loudness import _coefficients


def levels_of(sound: np.ndarray, rate_hz: int = 8_000, block_frames: int = 1 << 30) -> Levels:
    sound = sound.reshape(len(sound), -1)
    meter = LevelMeter(rate_hz, sound.shape[1])
    for start in range(0, len(sound), block_frames):
        meter.add(sound[start : start + block_frames])
    return meter.result()


def music(seconds: float, rate_hz: int, channels: int, seed: int = 0) -> np.ndarray:
    """Noise and tones whose level changes by 40 dB, so that both gates of BS.1770 act: float32 (n, channels)."""
    frames = round(seconds * rate_hz)
    times = np.arange(frames)[:, None] / rate_hz
    level = 10 ** (-1 - np.abs(np.sin(times * 0.7)) * 2)
    tones = np.sin(2 * math.pi * 220 * times * np.arange(1, channels + 1))
    noises = np.random.default_rng(seed).standard_normal((frames, channels)) * 0.3
    return ((tones + noises) * level).astype(np.float32)


def sine(frequency_hz: float, parts: list[tuple[float, float]]) -> np.ndarray:
    """A sine at 48 kHz whose peak is at these levels (dBFS) for so many seconds: float32 (n,)."""
    levels = np.concatenate([np.full(round(seconds * 48_000), 10 ** (dbfs / 20)) for dbfs, seconds in parts])
    return (levels * np.sin(2 * math.pi * frequency_hz / 48_000 * np.arange(len(levels)))).astype(np.float32)


# pyloudnorm's class "DeMan" has the same analogue filters, so that only our four digits are between the two; its
# default is another design, 0.25 LU off at 8 kHz and 0.04 at 48 kHz. At 11,025 Hz its pieces of 100 ms are in turn
# 1,102 and 1,103 frames, ours 1,102.
@pytest.mark.parametrize("rate_hz", [4_000, 8_000, 11_025, 16_000, 22_050, 32_000, 44_100, 48_000, 96_000])
@pytest.mark.parametrize("channels", [1, 2, 5])
def test_loudness_is_that_of_pyloudnorm(rate_hz: int, channels: int):
    sound = music(2, rate_hz, channels)
    expected = pyloudnorm.Meter(rate_hz, filter_class="DeMan").integrated_loudness(sound.astype(np.float64))
    tolerance = 1e-4 if rate_hz % 10 == 0 else 0.02
    assert levels_of(sound, rate_hz).loudness_lufs == pytest.approx(expected, abs=tolerance)


def test_low_frequencies_of_six_channels_do_not_count():
    sound = music(3, 44_100, 6)
    without = np.delete(sound, 3, axis=1).astype(np.float64)
    expected = pyloudnorm.Meter(44_100, filter_class="DeMan").integrated_loudness(without)
    assert levels_of(sound, 44_100).loudness_lufs == pytest.approx(expected, abs=1e-4)


def test_filters_are_those_that_the_recommendation_tabulates():
    # BS.1770-4, annex 1, tables 1 and 2: coefficients at 48 kHz.
    (shelf, high_pass), (shelf_poles, high_pass_poles) = _coefficients(48_000)
    assert shelf == pytest.approx([1.53512485958697, -2.69169618940638, 1.19839281085285], abs=1e-8)
    assert shelf_poles == pytest.approx([1, -1.69065929318241, 0.73248077421585], abs=1e-8)
    assert list(high_pass) == [1, -2, 1]
    assert high_pass_poles == pytest.approx([1, -1.99004745483398, 0.99007225036621], abs=1e-8)


def test_a_tone_at_full_scale_has_the_loudness_that_the_recommendation_gives():
    # BS.1770-4, annex 1: a sine of 997 Hz at 0 dBFS in one front channel measures -3.01 LKFS.
    tone = sine(997, [(0, 5)])
    assert levels_of(tone, 48_000).loudness_lufs == pytest.approx(-3.01, abs=0.01)
    assert levels_of(np.stack([tone, tone], 1), 48_000).loudness_lufs == pytest.approx(0, abs=0.01)


# EBU Tech 3341, table 1, cases 1 to 5: a sine of 1,000 Hz in both channels at these levels (dBFS) for so many seconds,
# each to be measured as -23 LUFS within 0.1 (case 2: -33).
@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ([(-23, 20)], -23),
        ([(-33, 20)], -33),
        ([(-36, 10), (-23, 60), (-36, 10)], -23),
        ([(-72, 10), (-36, 10), (-23, 60), (-36, 10), (-72, 10)], -23),
        ([(-26, 20), (-20, 20.1), (-26, 20)], -23),
    ],
)
def test_gates_pass_what_the_ebu_asks_of_meters(parts: list[tuple[float, float]], expected: float):
    tone = sine(1_000, parts)
    found = levels_of(np.stack([tone, tone], 1), 48_000, 1 << 17).loudness_lufs
    assert found == pytest.approx(expected, abs=0.1)


def test_surround_channels_weigh_what_the_ebu_asks_of_meters():
    # EBU Tech 3341, table 1, case 6: five channels, 20 s.
    sound = np.stack([sine(1_000, [(level, 20)]) for level in (-28, -28, -24, -30, -30)], 1)
    assert levels_of(sound, 48_000).loudness_lufs == pytest.approx(-23, abs=0.1)


@pytest.mark.parametrize(
    ("channels", "weights"),
    [
        (4, (1, 1, 1.41, 1.41)),
        (5, (1, 1, 1, 1.41, 1.41)),
        (6, (1, 1, 1, 0, 1.41, 1.41)),
        (7, (1, 1, 1, 0, 1, 1.41, 1.41)),
        (8, (1, 1, 1, 0, 1, 1, 1.41, 1.41)),
        (9, (1,) * 9),
    ],
)
def test_each_speaker_counts_with_its_weight_of_the_recommendation(channels: int, weights: tuple[float, ...]):
    alone = music(2, 48_000, 1)
    front = levels_of(alone, 48_000).loudness_lufs
    assert front is not None
    for channel, weight in enumerate(weights):
        sound = np.zeros((len(alone), channels), np.float32)
        sound[:, channel] = alone[:, 0]
        loudness = levels_of(sound, 48_000).loudness_lufs
        if weight == 0:
            assert loudness is None
        else:
            assert loudness == pytest.approx(front + 10 * math.log10(weight), abs=1e-4)


def test_a_sound_too_short_too_quiet_or_too_slow_has_no_loudness():
    assert levels_of(noise(0.39)).loudness_lufs is None
    assert levels_of(noise(0.41)).loudness_lufs is not None
    assert levels_of(noise(1) * 1e-4).loudness_lufs is None  # under the gate of -70 LUFS
    assert levels_of(noise(2, rate_hz=2_000), 2_000).loudness_lufs is None
    assert levels_of(noise(1, rate_hz=3_000_000), 3_000_000).loudness_lufs is None
    assert levels_of(np.zeros((8_000, 65), np.float32)).loudness_lufs is None


def slow_levels(sound: np.ndarray, rate_hz: int) -> tuple[float, float, float, int, int]:
    """Peak, clipped share, silent share, and frames of lead and tail, sample by sample in Python."""
    loud = [max(abs(float(value)) for value in frame) >= SILENCE for frame in sound]
    clipped = 0
    for channel in sound.T:
        for at_full_scale, run in groupby(channel, key=lambda value: abs(float(value)) >= CLIPPED):
            length = len(list(run))
            clipped += length if at_full_scale and length >= 3 else 0
    cell = max(1, round(0.05 * rate_hz))
    cells = [not any(loud[start : start + cell]) for start in range(0, len(loud), cell)]
    lead = loud.index(True) if any(loud) else len(loud)
    tail = loud[::-1].index(True) if any(loud) else 0
    return max(abs(float(value)) for value in sound.flat), clipped / sound.size, sum(cells) / len(cells), lead, tail


values = st.sampled_from([0.0, 0.0, 0.0, 9e-4, -9e-4, 1e-3, -1e-3, 0.5, 0.99, 1.0, 1.0, 1.0, -1.0, 1.7])
runs = st.lists(st.tuples(values, st.integers(1, 9)), min_size=1, max_size=12)


def check_any_sound(channels: list[list[tuple[float, int]]], block_frames: int) -> None:
    columns = [np.repeat([value for value, _ in runs], [times for _, times in runs]) for runs in channels]
    sound = np.zeros((max(map(len, columns)), len(columns)), np.float32)
    for index, column in enumerate(columns):
        sound[: len(column), index] = column
    rate_hz = 100  # pieces of 5 frames
    found = levels_of(sound, rate_hz, block_frames)
    peak, clipped, silent, lead, tail = slow_levels(sound, rate_hz)
    assert (found.peak, found.clipped_share, found.silent_share) == (np.float32(peak), clipped, silent)
    assert (round(found.lead_seconds * rate_hz), round(found.tail_seconds * rate_hz)) == (lead, tail)
    assert found == levels_of(sound, rate_hz)


any_sound = given(channels=st.lists(runs, min_size=1, max_size=3), block_frames=st.integers(1, 12))


@any_sound
@settings(max_examples=120, derandomize=True, deadline=None)
def test_what_is_counted_is_what_counting_sample_by_sample_gives(channels, block_frames):
    check_any_sound(channels, block_frames)


@pytest.mark.full
@any_sound
@settings(max_examples=8_000, deadline=None)
def test_what_is_counted_is_what_counting_sample_by_sample_gives_in_thousands_of_sounds(channels, block_frames):
    check_any_sound(channels, block_frames)


@pytest.mark.parametrize("channels", [1, 2, 6])
def test_blocks_of_any_size_give_the_same(channels: int):
    sound = music(3, 44_100, channels)
    sound[:20_000] = 0
    sound[60_000:60_200] = 1
    whole = levels_of(sound, 44_100)
    assert whole.loudness_lufs is not None and whole.clipped_share > 0 and 0 < whole.silent_share < 1
    for block_frames in (137, 4_409, 4_410, 44_100, 100_003):
        assert levels_of(sound, 44_100, block_frames) == whole


def test_a_block_may_be_overwritten_once_it_is_counted():
    sound = music(1, 8_000, 2)
    meter, buffer = LevelMeter(8_000, 2), np.empty((137, 2), np.float32)
    for start in range(0, len(sound), 137):
        block = buffer[: len(sound[start : start + 137])]
        block[:] = sound[start : start + 137]
        meter.add(block)
    assert meter.result() == levels_of(sound)


def test_an_hour_of_sound_takes_a_number_per_100_ms():
    block = noise(10).reshape(-1, 1)
    meter = LevelMeter(8_000, 1)

    def held_after(blocks: int) -> int:
        for _ in range(blocks):
            meter.add(block)
        return tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        early = held_after(6)
        assert held_after(360) - early < 36_000 * 8 * 1.2 + 10_000  # an array grows by an eighth at a time
    finally:
        tracemalloc.stop()


def test_what_the_loudness_filter_multiplies_by_is_made_once_for_all_sounds_of_a_rate() -> None:
    made = [function.cache_info().misses for function in (loudness._products, loudness._shape_of_pieces)]
    for _ in range(5):
        LevelMeter(31_313, 2).add(np.zeros((20, 2), np.float32))
    made_now = [function.cache_info().misses for function in (loudness._products, loudness._shape_of_pieces)]
    assert made_now == [count + 1 for count in made]
