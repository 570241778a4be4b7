"""How loud a sound is, where it is silent and how much of it is clipped, learnt from its blocks as they are decoded."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from trainer.data.loudness import LoudnessMeter

SILENCE = 1e-3  # of full scale, -60 dBFS: what silencedetect and silenceremove of ffmpeg take by default
SILENCE_CELL_SECONDS = 0.05  # silence in the middle of a sound is counted in pieces of so many seconds
CLIPPED = 32_767 / 32_768  # the largest number of 16 bits; what is decoded of a clipped mp3 lies above
CLIPPED_RUN = 3  # so many samples at full scale in a row were cut off there; one or two may be a true peak
# The first filter of BS.1770 raises what lies above 1,681 Hz. Below twice that rate there is no such filter.
LEAST_LOUDNESS_RATE_HZ = 4_000
MOST_LOUDNESS_RATE_HZ = 64 * 44_100  # of DSD; what a broken header gives beyond it would make 100 ms fill the memory
MOST_LOUDNESS_CHANNELS = 64  # as libebur128
GATE_SECONDS = 0.4  # what BS.1770 measures at once; a shorter sound has no loudness


@dataclass(frozen=True, kw_only=True)
class Levels:
    """How loud a sound is.

    peak           largest magnitude of a sample in any channel; full scale is 1
    clipped_share  of all samples of all channels, those in runs of 3 or more at full scale or beyond it
    silent_share   of its pieces of 50 ms, those in which no channel reaches -60 dBFS
    lead_seconds   before the first sample that reaches -60 dBFS in any channel; all of a sound in which none does
    tail_seconds   after the last such sample; 0 where there is none
    loudness_lufs  integrated loudness (ITU-R BS.1770-4) of all channels; None for a sound that is shorter than 0.4 s
                   or quieter than the gate at -70 LUFS, has a rate below 4 kHz or above 2.8 MHz, or more than 64
                   channels
    """

    peak: float
    clipped_share: float
    silent_share: float
    lead_seconds: float
    tail_seconds: float
    loudness_lufs: float | None


class LevelMeter:
    """The Levels of a sound, from its blocks in order; how it is cut into blocks changes nothing."""

    def __init__(self, rate_hz: int, channels: int) -> None:
        self._rate_hz, self._channels = rate_hz, channels
        self._frames, self._peak = 0, 0.0
        self._first_loud: int | None = None
        self._after_last_loud = 0
        self._silence = _SilentCells(max(1, round(SILENCE_CELL_SECONDS * rate_hz)))
        self._clipping = _ClippedRuns(channels)
        self._loudness = (
            LoudnessMeter(rate_hz, _channel_weights(channels))
            if LEAST_LOUDNESS_RATE_HZ <= rate_hz <= MOST_LOUDNESS_RATE_HZ and channels <= MOST_LOUDNESS_CHANNELS
            else None
        )

    def add(self, block: np.ndarray) -> None:
        """Count a block (n, channels) float32 of finite samples."""
        if len(block) == 0:
            return
        loudest = _loudest_of_frames(block)
        peak = float(loudest.max())
        if peak >= SILENCE:
            is_loud = loudest >= SILENCE
            if self._first_loud is None:
                self._first_loud = self._frames + int(is_loud.argmax())
            self._after_last_loud = self._frames + len(block) - int(is_loud[::-1].argmax())
        self._silence.add(loudest)
        self._clipping.add(block, peak)
        if self._loudness is not None:
            self._loudness.add(block)
        self._frames, self._peak = self._frames + len(block), max(self._peak, peak)

    def result(self) -> Levels:
        """Of all blocks so far, of which there must be one."""
        lead = self._frames if self._first_loud is None else self._first_loud
        tail = 0 if self._first_loud is None else self._frames - self._after_last_loud
        return Levels(
            peak=self._peak,
            clipped_share=self._clipping.samples() / (self._frames * self._channels),
            silent_share=self._silence.share(),
            lead_seconds=lead / self._rate_hz,
            tail_seconds=tail / self._rate_hz,
            loudness_lufs=self._loudness_lufs(),
        )

    def _loudness_lufs(self) -> float | None:
        if self._loudness is None or self._frames < round(GATE_SECONDS * self._rate_hz):
            return None
        return self._loudness.result()


class _SilentCells:
    """Counts the pieces of a sound, `cell_frames` each, the last one possibly shorter, that are silent throughout."""

    def __init__(self, cell_frames: int) -> None:
        self._cell_frames = cell_frames
        self._cells = self._silent = 0
        self._begun, self._begun_peak = 0, 0.0  # frames of the cell that the blocks so far have not filled

    def add(self, loudest: np.ndarray) -> None:
        """Count frames, of each of which `loudest` (n,) is the largest magnitude in any channel."""
        first = min(len(loudest), self._cell_frames - self._begun)
        self._begun, self._begun_peak = self._begun + first, max(self._begun_peak, float(loudest[:first].max()))
        if self._begun < self._cell_frames:
            return
        whole = (len(loudest) - first) // self._cell_frames
        middle = loudest[first : first + whole * self._cell_frames].reshape(whole, self._cell_frames)
        peaks = [self._begun_peak, *middle.max(axis=1).tolist()]
        self._cells, self._silent = self._cells + len(peaks), self._silent + sum(peak < SILENCE for peak in peaks)
        rest = loudest[first + whole * self._cell_frames :]
        self._begun, self._begun_peak = len(rest), float(rest.max()) if len(rest) else 0.0

    def share(self) -> float:
        """Silent cells as a share of all."""
        begun = self._begun > 0
        return (self._silent + (begun and self._begun_peak < SILENCE)) / (self._cells + begun)


class _ClippedRuns:
    """Counts samples in runs at full scale, in each channel by itself."""

    def __init__(self, channels: int) -> None:
        self._counted = 0
        self._open = [0] * channels  # how long the run is that each channel's samples so far end with

    def add(self, block: np.ndarray, peak: float) -> None:
        """Count the samples (n, channels) of a block with this peak."""
        if peak < CLIPPED:  # nearly every block, and looking at it once more would cost as much as all else here
            self._close_all()
            return
        for channel in range(block.shape[1]):
            at_full_scale = np.abs(block[:, channel]) >= CLIPPED
            edges = np.flatnonzero(np.diff(at_full_scale, prepend=False, append=False))
            starts, ends = edges[::2], edges[1::2]
            lengths = (ends - starts).tolist()
            if not lengths or starts[0] > 0:
                self._close(channel)
            else:
                lengths[0] += self._open[channel]
                self._open[channel] = 0
            if lengths and ends[-1] == len(block):
                self._open[channel] = lengths.pop()
            self._counted += sum(length for length in lengths if length >= CLIPPED_RUN)

    def samples(self) -> int:
        """Clipped samples of all channels."""
        return self._counted + sum(run for run in self._open if run >= CLIPPED_RUN)

    def _close_all(self) -> None:
        for channel in range(len(self._open)):
            self._close(channel)

    def _close(self, channel: int) -> None:
        if self._open[channel] >= CLIPPED_RUN:
            self._counted += self._open[channel]
        self._open[channel] = 0


def _loudest_of_frames(block: np.ndarray) -> np.ndarray:
    """The largest magnitude of any channel in each frame: (n, channels) float32 to (n,) float32."""
    # Channel by channel, because numpy reduces a short last axis many times slower than it compares whole columns.
    loudest = np.abs(block[:, 0])
    for channel in range(1, block.shape[1]):
        np.maximum(loudest, np.abs(block[:, channel]), out=loudest)
    return loudest


def _channel_weights(channels: int) -> tuple[float, ...]:
    """What each channel counts in the loudness, by where its speaker stands, in the order in which WAV, FLAC and
    libsndfile have channels (Microsoft's dwChannelMask).

    BS.1770-4, table 4: speakers from 60 to 120 degrees count 1.41, all others 1, low frequencies nothing.
    """
    front, low, side, back = (1.0, 1.0, 1.0), 0.0, 1.41, 1.0
    known = {
        4: (1.0, 1.0, side, side),
        5: (*front, side, side),
        6: (*front, low, side, side),
        7: (*front, low, back, side, side),
        8: (*front, low, back, back, side, side),
    }
    return known.get(channels, (1.0,) * channels)
