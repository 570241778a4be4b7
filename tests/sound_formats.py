"""Encodes samples in every format that is read, for tests: by libsndfile, or by FFmpeg (PyAV)."""

from __future__ import annotations

import io
from dataclasses import dataclass

import av
import numpy as np
import soundfile

LAYOUTS = {1: "mono", 2: "stereo", 6: "5.1", 8: "7.1"}


@dataclass(frozen=True)
class Format:
    """One format. `form` and `coding` are libsndfile's names, or FFmpeg's where `ffmpeg`.

    lossless  whether the samples come back as they were, rounded to 16 bits
    lag       of the decoded sound behind the original, where the format does not say how much was put before it
    padding   the most samples that are put behind the sound, where the format does not say how many
    options   of FFmpeg's muxer
    """

    suffix: str
    form: str
    coding: str
    ffmpeg: bool = False
    lossless: bool = False
    rate_hz: int = 44_100
    lag: int = 0
    padding: int = 0
    options: tuple[tuple[str, str], ...] = ()


IN_FRAGMENTS = (("movflags", "delay_moov+frag_keyframe"), ("frag_duration", "300000"))
# The head is written first, and so does not say how much the encoder puts before the sound: 1,024 samples are kept.
HEAD_FIRST = (("movflags", "frag_keyframe+empty_moov"), ("frag_duration", "300000"))
FORMATS = {
    "wav": Format(".wav", "WAV", "PCM_16", lossless=True),
    "w64": Format(".w64", "W64", "PCM_16", lossless=True),
    "rf64": Format(".rf64", "RF64", "PCM_16", lossless=True),
    "aiff": Format(".aiff", "AIFF", "PCM_16", lossless=True),
    "caf": Format(".caf", "CAF", "PCM_16", lossless=True),
    "alac in caf": Format(".caf", "CAF", "ALAC_16", lossless=True),
    "au": Format(".au", "AU", "PCM_16", lossless=True),
    "flac": Format(".flac", "FLAC", "PCM_16", lossless=True),
    "vorbis": Format(".ogg", "OGG", "VORBIS"),
    "opus": Format(".opus", "OGG", "OPUS", rate_hz=48_000),
    "mp3": Format(".mp3", "MP3", "MPEG_LAYER_III"),
    "m4a": Format(".m4a", "ipod", "aac", ffmpeg=True),
    "mp4": Format(".mp4", "mp4", "aac", ffmpeg=True),
    "mp4 in fragments": Format(".mp4", "mp4", "aac", ffmpeg=True, options=IN_FRAGMENTS),
    "mp4 in fragments, head first": Format(".mp4", "mp4", "aac", ffmpeg=True, lag=1_024, options=HEAD_FIRST),
    "alac": Format(".m4a", "ipod", "alac", ffmpeg=True, lossless=True),
    "webm": Format(".webm", "webm", "libopus", ffmpeg=True, rate_hz=48_000),
    "mka": Format(".mka", "matroska", "aac", ffmpeg=True, padding=1_024),
    "mka of flac": Format(".mka", "matroska", "flac", ffmpeg=True, lossless=True),
    "wavpack": Format(".wv", "wv", "wavpack", ffmpeg=True, lossless=True),
    # FFmpeg's decoder drops two frames, as Microsoft's encoder puts them before the sound. FFmpeg's puts one.
    "wma": Format(".wma", "asf", "wmav2", ffmpeg=True, lag=-2_048, padding=4_096),
    "aac": Format(".aac", "adts", "aac", ffmpeg=True, lag=1_024, padding=1_024),
}
SNDFILE = {name: format for name, format in FORMATS.items() if not format.ffmpeg}
FFMPEG = {name: format for name, format in FORMATS.items() if format.ffmpeg}


def chirp(seconds: float, rate_hz: int, channels: int = 2, seed: int = 0) -> np.ndarray:
    """A rising tone with a click, (n, channels) float32, rounded to 16 bits, so that any offset shows."""
    time = np.arange(round(seconds * rate_hz)) / rate_hz
    tone = 0.3 * np.sin(2 * np.pi * (200 + 40 * seed + 300 * time) * time)
    tone[len(tone) // 3 : len(tone) // 3 + 10] = 0.9
    samples = np.repeat(tone[:, None], channels, axis=1) * np.linspace(1, 0.8, channels)
    return (np.round(samples * 32_767) / 32_768).astype(np.float32)


def encoded(format: Format, samples: np.ndarray, rate_hz: int | None = None) -> bytes:
    """A file of these samples (n, channels) in this format."""
    rate_hz, file = rate_hz or format.rate_hz, io.BytesIO()
    if format.ffmpeg:
        _encode(file, format, samples, rate_hz)
    else:
        soundfile.write(file, samples, rate_hz, format=format.form, subtype=format.coding)
    return file.getvalue()


def _encode(file: io.BytesIO, format: Format, samples: np.ndarray, rate_hz: int) -> None:
    layout = LAYOUTS[samples.shape[1]]
    with av.open(file, "w", format=format.form, options=dict(format.options)) as container:
        stream = container.add_stream(format.coding, rate=rate_hz)
        context = stream.codec_context
        numbers = [one.name for one in context.codec.audio_formats]
        context.format = next((name for name in ("s16p", "s16") if name in numbers and format.lossless), numbers[0])
        context.layout, context.bit_rate = layout, 128_000
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples.reshape(1, -1)), format="flt", layout=layout)
        frame.sample_rate, frame.pts = rate_hz, 0
        resampler = av.AudioResampler(
            format=context.format, layout=layout, rate=rate_hz, frame_size=context.frame_size or 1_024
        )
        for piece in (*resampler.resample(frame), *resampler.resample(None)):
            container.mux(stream.encode(piece))
        container.mux(stream.encode(None))
