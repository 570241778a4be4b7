"""A sound in 64 bytes that stay nearly the same at another gain, sample rate or lossy format, and pairs of such sounds.

The bytes are a small picture of the whole sound, cut into equal parts of time and into bands of 150 to 3,400 Hz, which
lossy formats and low sample rates keep. They say how the difference between the levels of neighbouring bands changes
from one part to the next, after Haitsma and Kalker, "A Highly Robust Audio Fingerprinting System", ISMIR 2002, section
4.2; gains cancel out. There it is one bit a change. Here it is two, because the sign of a change of next to nothing is
chance: such changes are told from large ones. The mean spectrum follows, which tells steady sounds apart.

Another part of the same song is another sound, and so is a file to which a second was added.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from trainer.data.decoder import mono

HOP_SECONDS = 0.05
WINDOW_HOPS = 2  # 0.1 s, so that the lowest band has several bins
LOWEST_HZ, HIGHEST_HZ = 150.0, 3_400.0
BANDS, PARTS = 8, 33  # 7 differences of neighbouring bands, 32 changes between parts of time: 224 changes
SPECTRUM_BANDS = 16
CHANGE_DB = 1.5  # smaller changes of a level may be a codec's
SPECTRUM_STEP_DB = 3.0
FLOOR = 1e-5  # of a sound's mean power in all bands: 50 dB below, what a codec leaves in a band is its own
WINDOWS_AT_ONCE = 16  # a megabyte of spectra at 192 kHz
SHORTEST_SECONDS = 0.25
MOST_FRAMES = 4_096  # of a longer sound pairs of frames are joined, again and again: memory does not grow with hours
CHANGES = (BANDS - 1) * (PARTS - 1)
BYTES = CHANGES // 4 + SPECTRUM_BANDS // 2

# Two sounds are near-duplicates where the steps of their changes and of their spectra differ by less than this in the
# mean, and their lengths by less than this. Measured with 245 excerpts of 1 to 30 s of 22 recordings (2026-11-27): of
# every sixth, other gains and rates lay within 0.005 of the original, mp3, vorbis and opus within 0.18. The nearest
# excerpts of other sound, a repeated riff of 1 s, lay at 0.57.
NEAR_CHANGES, NEAR_SPECTRA = 0.4, 0.6
NEAR_SECONDS, NEAR_LENGTHS = 0.15, 0.005
# Candidates are found by sorting: sounds that are equal in all bits of one of these random choices stand together, and
# of those each is compared with the next few.
KEYS, KEY_BITS, NEIGHBOURS = 20, 16, 8
BATCH = 65_536  # pairs that are compared at once: 30 MB


class Fingerprint:
    """The meter that takes a sound's blocks, in constant memory."""

    def __init__(self, sample_rate_hz: int):
        self._rate = sample_rate_hz
        self._taper, self._length, self._bins = _analysis(sample_rate_hz)
        self._window = len(self._taper)
        self._waiting = np.zeros(0, np.float32)  # from the start of the next window on
        self._dropped = 0  # samples before those
        self._windows, self._samples = 0, 0
        self._power = np.zeros((MOST_FRAMES, SPECTRUM_BANDS))
        self._rows, self._joined = 0, 1  # rows of `_power` in use, and how many windows each of them holds
        self._part, self._in_part = np.zeros(SPECTRUM_BANDS), 0  # the power of so many windows of the next row

    def add(self, block: np.ndarray) -> None:
        """Take (n, channels) float32 samples."""
        samples = mono(block)
        self._samples += len(samples)
        self._waiting = np.concatenate([self._waiting, samples])
        self._take_windows()

    def result(self) -> str:
        """The fingerprint as 128 hexadecimal digits; "" for a sound of less than SHORTEST_SECONDS or without power."""
        if self._samples < SHORTEST_SECONDS * self._rate:
            return ""
        missing = self._start(self._windows) + self._window - self._dropped - len(self._waiting)
        if missing < self._window // 2 or self._windows == 0:  # the last window is filled up where most of it is there
            self._waiting = np.concatenate([self._waiting, np.zeros(max(0, missing), np.float32)])
            self._take_windows()
        power = np.concatenate([self._power[: self._rows], self._part[None]])  # the last row may hold nothing
        weights = np.array([*[self._joined] * self._rows, self._in_part], dtype=float)
        total = power.sum()
        if not total > 0:
            return ""
        return _packed(power / total, weights / weights.sum()).tobytes().hex()

    def _start(self, window: int) -> int:
        return round(window * HOP_SECONDS * self._rate)

    def _take_windows(self) -> None:
        """Measure all windows that are there whole, and forget the samples before the next one."""
        held = self._dropped + len(self._waiting)
        most = int(held / (HOP_SECONDS * self._rate)) + 1
        numbers = np.arange(self._windows, max(self._windows, most))
        places = np.round(numbers * HOP_SECONDS * self._rate).astype(np.int64)
        starts = places[places + self._window <= held] - self._dropped
        self._windows += len(starts)
        for at in range(0, len(starts), WINDOWS_AT_ONCE):
            few = starts[at : at + WINDOWS_AT_ONCE]
            frames = np.lib.stride_tricks.sliding_window_view(self._waiting, self._window)[few]
            # Only the bins below the highest band are squared.
            spectra = np.fft.rfft(frames * self._taper, self._length, axis=1)[:, : self._bins[-1]]
            squares = spectra.real**2 + spectra.imag**2
            sums = np.pad(np.cumsum(squares, axis=1, dtype=np.float64), ((0, 0), (1, 0)))
            self._keep(np.diff(sums[:, self._bins], axis=1))
        if len(starts):
            drop = min(len(self._waiting), self._start(self._windows) - self._dropped)
            self._waiting = self._waiting[drop:].copy()
            self._dropped += drop

    def _keep(self, powers: np.ndarray) -> None:
        """Add the powers (windows, SPECTRUM_BANDS) to the rows, and join rows where there are too many."""
        while len(powers):
            if self._joined == 1:
                few = powers[: MOST_FRAMES - self._rows]
                self._power[self._rows : self._rows + len(few)] = few
                self._rows += len(few)
            else:
                few = powers[: self._joined - self._in_part]
                self._part += few.sum(axis=0)
                self._in_part += len(few)
                if self._in_part == self._joined:
                    self._power[self._rows] = self._part
                    self._rows, self._in_part = self._rows + 1, 0
                    self._part = np.zeros(SPECTRUM_BANDS)
            powers = powers[len(few) :]
            if self._rows == MOST_FRAMES:
                self._power[: MOST_FRAMES // 2] = self._power[0::2] + self._power[1::2]
                self._rows, self._joined = MOST_FRAMES // 2, 2 * self._joined


@lru_cache(maxsize=64)  # the same for all sounds of a rate, and short sounds are many
def _analysis(sample_rate_hz: int) -> tuple[np.ndarray, int, np.ndarray]:
    """The taper of a window, float32; the length of its FFT; and the bins between which the bands lie."""
    window = max(2, round(WINDOW_HOPS * HOP_SECONDS * sample_rate_hz))
    length = _fast_length(window)
    edges = np.geomspace(LOWEST_HZ, HIGHEST_HZ, SPECTRUM_BANDS + 1) * length / sample_rate_hz
    return np.hanning(window + 1)[:-1].astype(np.float32), length, np.minimum(np.round(edges).astype(int), length // 2)


def _fast_length(least: int) -> int:
    """The smallest length from `least` on that has no prime factor above 5: numpy's FFT of 4410 takes 1.3 times as long
    as that of 4500."""
    length = least
    while True:
        rest = length
        for prime in (2, 3, 5):
            while rest % prime == 0:
                rest //= prime
        if rest == 1:
            return length
        length += 1


def _packed(power: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The bytes, (BYTES,) uint8, of powers (frames, SPECTRUM_BANDS) and the share of the time that each frame has."""
    at = np.concatenate([[0.0], np.cumsum(weights)])
    sums = np.concatenate([np.zeros((1, SPECTRUM_BANDS)), np.cumsum(power, axis=0)])
    # Each part overlaps half of the next, so that a codec's delay of some milliseconds moves little between them.
    edges = np.arange(PARTS + 2) / (PARTS + 1)
    upto = np.stack([np.interp(edges, at, sums[:, band]) for band in range(SPECTRUM_BANDS)], axis=1)
    parts = (upto[2:] - upto[:-2]).reshape(PARTS, BANDS, SPECTRUM_BANDS // BANDS).sum(axis=2)
    floor = FLOOR * 2 / (PARTS + 1)
    levels = 10 * np.log10(parts + floor)
    changes = np.diff(np.diff(levels, axis=1), axis=0).ravel()
    steps = np.digitize(changes, (-CHANGE_DB, 0.0, CHANGE_DB)).astype(np.uint8)
    spectrum = 10 * np.log10(power.sum(axis=0) + FLOOR)
    nibbles = np.clip(np.round(-spectrum / SPECTRUM_STEP_DB), 0, 15).astype(np.uint8)
    four, two = steps.reshape(-1, 4).T, nibbles.reshape(-1, 2).T
    return np.concatenate([four[0] << 6 | four[1] << 4 | four[2] << 2 | four[3], two[0] << 4 | two[1]])


def unpacked(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The steps (n, CHANGES) and the spectra (n, SPECTRUM_BANDS), both uint8, of fingerprints (n, BYTES) uint8."""
    fours, twos = packed[:, : CHANGES // 4], packed[:, CHANGES // 4 :]
    steps = np.stack([fours >> 6 & 3, fours >> 4 & 3, fours >> 2 & 3, fours & 3], axis=2).reshape(len(packed), CHANGES)
    return steps, np.stack([twos >> 4, twos & 15], axis=2).reshape(len(packed), SPECTRUM_BANDS)


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """Which sounds are near-duplicates.

    pairs        (n, 2) int64 of their numbers, the smaller one first, sorted
    comparisons  how many pairs were looked at
    """

    pairs: np.ndarray
    comparisons: int


def near_pairs(fingerprints: Sequence[str], seconds: Sequence[float]) -> Pairs:
    """The near-duplicates among n sounds, in a time of n log n: at most n * KEYS * NEIGHBOURS pairs are compared.

    fingerprints  of each sound; "" is nobody's near-duplicate
    seconds       of each sound

    Of more than NEIGHBOURS sounds that are all near-duplicates of each other, some pairs are left out, but none of the
    sounds.
    """
    rows = np.array([row for row, text in enumerate(fingerprints) if text], dtype=np.int64)
    if len(rows) < 2:
        return Pairs(pairs=np.zeros((0, 2), np.int64), comparisons=0)
    packed = np.frombuffer(bytes.fromhex("".join(fingerprints[row] for row in rows)), np.uint8).reshape(-1, BYTES)
    lengths = np.array([seconds[row] for row in rows])
    steps, spectra = unpacked(packed)
    candidates = _candidates(packed, steps, lengths)
    batches = range(0, len(candidates), BATCH)
    near = [_are_near(steps, spectra, lengths, candidates[at : at + BATCH]) for at in batches]
    found = rows[candidates[np.concatenate(near)]] if near else np.zeros((0, 2), np.int64)
    return Pairs(pairs=found, comparisons=len(candidates))


def groups_of(pairs: Iterable[tuple[int, int]]) -> list[list[int]]:
    """The sets of numbers that the pairs join, directly or through others; each sorted, and by their first."""
    leader: dict[int, int] = {}

    def find(number: int) -> int:
        while leader.setdefault(number, number) != number:
            leader[number] = number = leader[leader[number]]
        return number

    for one, other in pairs:
        low, high = sorted((find(one), find(other)))
        leader[high] = low
    groups: dict[int, list[int]] = {}
    for number in sorted(leader):
        groups.setdefault(find(number), []).append(number)
    return sorted(groups.values())


def _candidates(packed: np.ndarray, steps: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Pairs (n, 2) int64 worth a comparison, each once, the smaller number first, sorted."""
    chance = np.random.default_rng(0)
    n = len(steps)
    codes = []
    for key in range(KEYS):
        chosen = chance.choice(CHANGES, KEY_BITS, replace=False)
        # By turns whether a level rises, and whether it rises much: of a steady sound the first is chance.
        bits = steps[:, chosen] >= (2 if key % 2 else 3)
        bucket = bits @ (1 << np.arange(KEY_BITS))
        # Within a bucket by length and by the whole, in which equal files stand together.
        order = np.lexsort((*packed.T[:8], np.round(lengths, 1), bucket))
        for distance in range(1, NEIGHBOURS + 1):
            one, other = order[:-distance], order[distance:]
            equal = bucket[one] == bucket[other]
            low, high = np.minimum(one[equal], other[equal]), np.maximum(one[equal], other[equal])
            codes.append(low * n + high)
    # Not np.unique, which takes 20 times as long as this with numpy 2.4.6: it fills a hash table, and sorts after that.
    ordered = np.sort(np.concatenate(codes))
    distinct = ordered[np.diff(ordered, prepend=-1) > 0]
    return np.stack([distinct // n, distinct % n], axis=1)


def _are_near(steps: np.ndarray, spectra: np.ndarray, lengths: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Whether each of the pairs (n, 2) is one of near-duplicates; bool (n,)."""
    one, other = pairs.T
    longer = np.maximum(lengths[one], lengths[other])
    near = np.abs(lengths[one] - lengths[other]) <= NEAR_SECONDS + NEAR_LENGTHS * longer
    for values, most in ((spectra, NEAR_SPECTRA), (steps, NEAR_CHANGES)):
        rows = np.flatnonzero(near)
        differences = np.abs(values[one[rows]].astype(np.int8) - values[other[rows]].astype(np.int8))
        near[rows] = differences.mean(axis=1) < most
    return near
