"""Decodes through FFmpeg (PyAV, the extra `ffmpeg`) what libsndfile does not read: m4a, aac, mp4, webm, mka, wma, ...

Front to back only: PyAV's seek lands up to 71 ms off (measured with av 18.1).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from itertools import chain
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from trainer.data.audio_fault import COPY_AGAIN, AudioFault, changes, damaged
from trainer.data.sound_kind import SoundKind

if TYPE_CHECKING:
    from av import AudioFrame

BUFFER_BYTES = 1 << 18
# Containers that say how much they hold. Where the last packet of another one is cut, as in a recorded radio stream,
# the rest is a whole sound.
WITH_TABLES = frozenset(("mov", "matroska", "asf", "avi", "ape", "wv", "tta", "tak", "dsf"))
COUNTED = frozenset(("mov", "ape", "wv", "tta"))  # FFmpeg reads their length in samples, and does not estimate it
CHECKED = frozenset(("flac", "wavpack", "tta", "ape", "tak"))  # have checksums, which FFmpeg does not look at unasked
SPARE_SECONDS = 0.1  # of that length: an edit list counts in units of its own
PADDING_FRAMES = 8192  # the most that an encoder adds to fill its last frame: 2,048 of HE-AAC, 4,096 of USAC
# PyAV 18.1 finds the channels of a frame by the null pointer behind them, which is not there from 8 on: it would read
# memory that is not its own, and crash. Such frames are laid out by FFmpeg.
SAFE_PLANES = 8
INTEGER_SCALES = {"u1": 2.0**7, "i2": 2.0**15, "i4": 2.0**31, "i8": 2.0**63}


class FfmpegDecoder:
    """The best audio stream of one file; see Decoder for its attributes. Pictures and other streams are passed over.

    Samples that an encoder put before the sound are left out by FFmpeg, where the container names them (edit lists,
    CodecDelay, iTunSMPB), those behind it here. A bare .aac stream names none.
    """

    def __init__(self, file: BinaryIO, kind: SoundKind, stack: ExitStack):
        """file  at its start, open for as long as `stack` is; raises AudioFault for what FFmpeg does not read"""
        try:
            import av
        except ModuleNotFoundError as error:
            detail = f"{kind.label} needs FFmpeg: bash scripts/setup.sh ffmpeg, or convert it to .wav"
            raise AudioFault("unsupported format", detail) from error
        try:
            # The demuxer is named, so that no other (playlists, which open other files) can be taken for the content.
            container: Any = av.open(file, format=kind.demuxer, metadata_errors="replace", buffer_size=BUFFER_BYTES)
        except av.FFmpegError as error:
            detail = f"damaged, or no {kind.label} file that FFmpeg reads ({_reason(error)}): {COPY_AGAIN}"
            raise AudioFault("unreadable", detail) from error
        stack.enter_context(container)
        stream = container.streams.best("audio")
        if stream is None:
            raise AudioFault("unreadable", f"a {kind.label} file without sound: take it out")
        if stream.codec_context is None:
            raise AudioFault("unreadable", f"a {kind.label} file of an unknown coding: convert it to .wav")
        context: Any = stream.codec_context
        if context.codec.canonical_name in CHECKED:
            context.options = {"err_detect": "crccheck+explode"}
        self._av: Any = av
        self._packer: Any = None
        self._container, self._stream = container, stream
        self._has_tables = kind.demuxer in WITH_TABLES
        self._first_pts: int | None = None  # of a packet, in the stream's time base
        self._rest = self._frames()
        self._first = first = next(self._rest, None)
        self.format: str = context.codec.canonical_name.upper()
        self.rate_hz: int = first.sample_rate if first else context.sample_rate
        self.channels: int = first.layout.nb_channels if first else 1
        self.declared_frames: int | None = None
        if kind.demuxer in COUNTED and stream.duration and stream.time_base:
            # Of an mp4 in fragments, which has no table of its frames, FFmpeg counts what an edit list leaves out.
            left_out = 0 if stream.frames else max(0, -(self._first_pts or 0))
            self.declared_frames = round((stream.duration - left_out) * stream.time_base * self.rate_hz)
        self.spare_frames = round(SPARE_SECONDS * self.rate_hz)
        self.is_exact = True
        self.remark = ""

    def blocks(self, block_frames: int) -> Iterator[np.ndarray]:
        """See Decoder."""
        held: list[np.ndarray] = []
        count = 0
        for samples in self._without_padding():
            held.append(samples)
            count += len(samples)
            if count >= block_frames:
                joined, start = np.concatenate(held), 0
                while count - start >= block_frames:
                    yield joined[start : start + block_frames]
                    start += block_frames
                held, count = [joined[start:]], count - start
        if count:
            yield np.concatenate(held)

    def _without_padding(self) -> Iterator[np.ndarray]:
        """The samples of each frame, (n, channels) float32, without what fills the last frames behind the sound."""
        end, done, beyond = self.declared_frames or 0, 0, list[np.ndarray]()
        expected = (self.rate_hz, self.channels)
        for frame in chain([self._first] if self._first else [], self._rest):
            found = (frame.sample_rate, frame.layout.nb_channels)
            if found != expected:
                raise changes(done / self.rate_hz, expected, found)
            samples = self._samples(frame)
            kept = max(0, end - done) if end else len(samples)
            done += len(samples)
            if kept >= len(samples):
                yield samples
                continue
            if kept:
                yield samples[:kept]
            beyond.append(samples[kept:])
            if done - end > PADDING_FRAMES:  # this is sound: the length in the file is wrong
                yield from beyond
                end, beyond = 0, []

    def _frames(self) -> Iterator[AudioFrame]:
        """Every decoded frame; raises AudioFault where decoding fails before the end."""
        failed, seconds = None, 0.0
        try:
            for packet in self._container.demux(self._stream):
                if self._first_pts is None:
                    self._first_pts = packet.pts
                if failed and packet.size:
                    raise damaged(seconds, _reason(failed)) from failed
                try:
                    frames = packet.decode()
                except self._av.FFmpegError as error:
                    failed = error
                    continue
                for frame in frames:
                    if frame.samples and frame.sample_rate:
                        seconds += frame.samples / frame.sample_rate
                        yield frame
        except self._av.FFmpegError as error:
            failed, self._has_tables = error, True
        if failed and self._has_tables:
            raise damaged(seconds, _reason(failed)) from failed

    def _samples(self, frame: AudioFrame) -> np.ndarray:
        """The samples of a frame, (n, channels) float32, full scale 1; of numbers as libsndfile scales them."""
        if not frame.format.is_planar:
            return _as_float(frame.to_ndarray().reshape(-1, self.channels))
        if self.channels < SAFE_PLANES:
            return _as_float(frame.to_ndarray().T)
        self._packer = self._packer or self._av.AudioResampler(format="flt")
        pieces = [piece.to_ndarray().reshape(-1, self.channels) for piece in self._packer.resample(frame)]
        return np.concatenate([np.zeros((0, self.channels), np.float32), *pieces])


def _as_float(values: np.ndarray) -> np.ndarray:
    """(n, channels) of numbers of any kind to float32."""
    kind = values.dtype.str[1:]
    if kind not in INTEGER_SCALES:
        return np.ascontiguousarray(values, np.float32)
    # As float32 first: what is rounded of 32-bit numbers is rounded alike in libsndfile.
    scaled = values.astype(np.float32)
    if kind == "u1":
        scaled -= np.float32(128)
    return np.ascontiguousarray(scaled / np.float32(INTEGER_SCALES[kind]))


def _reason(error: Any) -> str:
    return str(error.strerror or error).strip().rstrip(".")
