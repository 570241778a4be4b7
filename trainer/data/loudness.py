"""The integrated loudness of a sound (ITU-R BS.1770-4), learnt from its blocks as they are decoded.

Numpy alone does it, because pyloudnorm wants a whole file in memory and scipy, and libebur128's bindings hold the GIL
and have no wheels for Python 3.13. Every step is a matrix product or a pass over a large array, so that other threads
run meanwhile. The mean square of every 100 ms is kept, which is exact and takes 288 kB per hour of sound.
"""

from __future__ import annotations

import math
from array import array
from functools import lru_cache

import numpy as np

HOPS_PER_SECOND = 10  # gating blocks of 400 ms overlap by 75 %: one begins every 100 ms
HOPS_PER_GATING_BLOCK = 4
ABSOLUTE_GATE_LUFS = -70.0
RELATIVE_GATE_LU = -10.0
OFFSET_LUFS = -0.691  # what makes a sine of 997 Hz at full scale in one front channel -3.01 LUFS
ROW_FRAMES = range(24, 65)  # the filter works on rows of so many frames: fastest on one core of a CPU, 2026-11-27
STATES = 4  # numbers that the filter, of the fourth order, carries from frame to frame
PIECE_ROWS = range(8, 100)  # and multiplies pieces of so many rows at once
# OpenBLAS starts threads of its own for a product of more multiplications than this (interface/gemm.c), for which the
# threads that inspect several files would wait in turn.
MOST_MULTIPLICATIONS = 1 << 18
VALUES_AT_ONCE = 1 << 16  # samples x channels that are filtered at once: 0.5 MiB of float64
DIGITS = 4  # of the result: coarser than rounding, so that other processors and other blocks give the same gain
NEGLIGIBLE = 1e-20  # what is left of a state by then is below the rounding of float64


class LoudnessMeter:
    """The integrated loudness of a sound, from its blocks in order; how it is cut into blocks changes nothing."""

    def __init__(self, rate_hz: int, weights: tuple[float, ...]) -> None:
        """`weights` are those of the channels (BS.1770-4, table 4)."""
        hop_frames = rate_hz // HOPS_PER_SECOND
        piece_rows, row_frames = _shape_of_pieces(hop_frames)
        # A hop is a whole number of pieces: shorter than 100 ms by 1 % at most, and by no frame at the usual rates.
        self._hop_frames = hop_frames - hop_frames % (piece_rows * row_frames)
        self._filter = _KWeighting(rate_hz, piece_rows, row_frames, len(weights))
        self._weights = np.array(weights) / self._hop_frames
        self._hops_at_once = max(1, VALUES_AT_ONCE // (self._hop_frames * len(weights)))
        self._mean_squares = array("d")  # of each hop, weighted and summed over channels
        self._begun: list[np.ndarray] = []  # copies of the last blocks, which together do not fill a hop
        self._begun_frames = 0

    def add(self, block: np.ndarray) -> None:
        """Count a block (n, channels) float32 of finite samples."""
        if self._begun_frames + len(block) >= self._hop_frames:
            block = np.concatenate([*self._begun, block])
            whole = len(block) // self._hop_frames * self._hop_frames
            step = self._hops_at_once * self._hop_frames
            for start in range(0, whole, step):
                self._add_hops(block[start : min(start + step, whole)])
            block = block[whole:]
            self._begun, self._begun_frames = [], 0
        self._begun.append(block.copy())
        self._begun_frames += len(block)

    def _add_hops(self, samples: np.ndarray) -> None:
        filtered = self._filter.of(samples).reshape(len(self._weights), -1, self._hop_frames)
        self._mean_squares.extend(self._weights @ np.einsum("cht,cht->ch", filtered, filtered))

    def result(self) -> float | None:
        """In LUFS, of all blocks so far; None where none of 400 ms is above the gate at -70 LUFS.

        BS.1770-4, annex 1, formulas 2 to 7. A last gating block that is not whole does not count.
        """
        if len(self._mean_squares) < HOPS_PER_GATING_BLOCK:
            return None
        hops = np.array(self._mean_squares)
        powers = np.lib.stride_tricks.sliding_window_view(hops, HOPS_PER_GATING_BLOCK).mean(axis=1)
        powers = powers[powers > _power(ABSOLUTE_GATE_LUFS)]
        if not len(powers):
            return None
        powers = powers[powers > powers.mean() * 10 ** (RELATIVE_GATE_LU / 10)]
        return round(OFFSET_LUFS + 10 * math.log10(powers.mean()), DIGITS)


# A folder has sounds of few rates, and searching the shapes takes as long as measuring a second of sound.
@lru_cache(maxsize=64)
def _shape_of_pieces(hop_frames: int) -> tuple[int, int]:
    """Rows, and frames per row, of the pieces that leave the fewest frames of a hop over; the largest such pieces."""
    shapes = [
        (rows, frames) for rows in PIECE_ROWS for frames in ROW_FRAMES
        if rows * frames <= hop_frames and rows * frames * (frames + STATES) <= MOST_MULTIPLICATIONS
    ]
    return min(shapes, key=lambda shape: (hop_frames % (shape[0] * shape[1]), -shape[0] * shape[1]))


class _KWeighting:
    """The filter of BS.1770 over several channels, in rows of `row_frames` frames instead of frame by frame.

    The filter is a state-space system: state s' = A s + B x and output y = C s + D x for each frame. A row x of N
    frames that begins in state s is then filtered by two products: y = s observe + x respond, where `respond` is the
    Toeplitz matrix of the impulse response, and s' = s decay + x gather, where `decay` is A to the power N.
    """

    def __init__(self, rate_hz: int, piece_rows: int, row_frames: int, channels: int) -> None:
        self._gather, self._respond, self._decays = _products(rate_hz, row_frames)
        self._piece_rows, self._row_frames = piece_rows, row_frames
        self._state = np.zeros((channels, STATES))

    def of(self, samples: np.ndarray) -> np.ndarray:
        """(whole pieces, channels) float32, filtered: (channels, frames) float64."""
        channels = samples.shape[1]
        rows = np.empty((channels, len(samples) // self._row_frames, self._row_frames + STATES))
        sound, states = rows[:, :, : self._row_frames], rows[:, :, self._row_frames :]
        sound[...] = samples.T.reshape(channels, -1, self._row_frames)
        states[...] = self._states_before(sound)
        pieces = rows.reshape(-1, self._piece_rows, self._row_frames + STATES)
        return (pieces @ self._respond).reshape(channels, -1)

    def _states_before(self, sound: np.ndarray) -> np.ndarray:
        """The state (channels, rows, states) in which each row begins; keeps the one after the last."""
        states = np.concatenate([self._state[:, None], sound @ self._gather], axis=1)
        # Each row's own state plus what is left of the 1, 3, 7 ... rows before it: a prefix sum by doubling.
        reach = 1
        for decay in self._decays:
            if reach >= states.shape[1]:
                break
            states[:, reach:] += states[:, :-reach] @ decay
            reach *= 2
        self._state = np.where(np.abs(states[:, -1]) < NEGLIGIBLE, 0, states[:, -1])  # denormals are slow
        return states[:, :-1]


@lru_cache(maxsize=64)  # they are the same for all sounds of a rate, and short sounds are many
def _products(rate_hz: int, row_frames: int) -> tuple[np.ndarray, np.ndarray, tuple[np.ndarray, ...]]:
    """What rows and states are multiplied by, see _KWeighting: `gather` (row, state); `respond` with `observe` below
    it, (row + state, row); `decay` to the powers 1, 2, 4 and so on, as far as anything is left of a state by then."""
    advance, enter, leave, through = _state_space(rate_hz)
    powers = [np.eye(STATES)]
    for _ in range(row_frames):
        powers.append(advance @ powers[-1])
    observe = np.stack([leave @ power for power in powers[:-1]], 1)
    gather = np.stack([power @ enter for power in reversed(powers[:-1])])
    response = np.array([through, *(leave @ power @ enter for power in powers[: row_frames - 1])])
    lag = np.arange(row_frames) - np.arange(row_frames)[:, None]
    respond = np.where(lag >= 0, response[np.maximum(lag, 0)], 0)
    decays, decay = [], powers[-1].T
    while np.abs(decay).max() > NEGLIGIBLE:
        decays.append(decay)
        decay = decay @ decay
    return gather, np.concatenate([respond, observe]), tuple(decays)


def _state_space(rate_hz: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """A (4, 4), B (4,), C (4,) and D of the two filters of BS.1770 in series."""
    (shelf_a, shelf_b, shelf_c, shelf_d), (pass_a, pass_b, pass_c, pass_d) = map(_biquad, *_coefficients(rate_hz))
    advance = np.block([[shelf_a, np.zeros((2, 2))], [np.outer(pass_b, shelf_c), pass_a]])
    enter = np.concatenate([shelf_b, pass_b * shelf_d])
    return advance, enter, np.concatenate([pass_d * shelf_c, pass_c]), pass_d * shelf_d


def _biquad(b: np.ndarray, a: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """A, B, C, D of the filter b(z) / a(z) with a[0] = 1, in the transposed direct form II."""
    return np.array([[-a[1], 1], [-a[2], 0]]), b[1:] - a[1:] * b[0], np.array([1.0, 0.0]), float(b[0])


def _coefficients(rate_hz: int) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Numerators and denominators of the high shelf and of the high pass.

    BS.1770-4 tabulates them for 48 kHz only. The analogue filters behind its tables, carried to other rates by the
    bilinear transform, are those of libebur128 1.2.6 (ebur128_init_filter) and of pyloudnorm's class "DeMan".
    """
    k, q = math.tan(math.pi * 1681.974450955533 / rate_hz), 0.7071752369554196
    high = 10 ** (3.999843853973347 / 20)
    middle = high**0.4996667741545416
    scale = 1 + k / q + k * k
    shelf = np.array([high + middle * k / q + k * k, 2 * (k * k - high), high - middle * k / q + k * k]) / scale
    shelf_poles = np.array([1, 2 * (k * k - 1) / scale, (1 - k / q + k * k) / scale])
    k, q = math.tan(math.pi * 38.13547087602444 / rate_hz), 0.5003270373238773
    scale = 1 + k / q + k * k
    pass_poles = np.array([1, 2 * (k * k - 1) / scale, (1 - k / q + k * k) / scale])
    return (shelf, np.array([1.0, -2.0, 1.0])), (shelf_poles, pass_poles)


def _power(loudness_lufs: float) -> float:
    """The weighted mean square of this loudness."""
    return 10 ** ((loudness_lufs - OFFSET_LUFS) / 10)
