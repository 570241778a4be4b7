"""Builds sound files, good and broken, for tests."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import numpy as np
import soundfile


def noise(seconds: float, rate_hz: int = 8_000, channels: int = 1, seed: int = 0) -> np.ndarray:
    """Noise well below full scale: float32 (n,), or (n, channels) for several channels."""
    draw = np.random.default_rng(seed)
    shape = (round(seconds * rate_hz),) if channels == 1 else (round(seconds * rate_hz), channels)
    return (draw.standard_normal(shape) * 0.1).astype(np.float32)


def write_clip(path: Path, caption: str | None = None, seconds: float = 1.0, seed: int = 0) -> Path:
    """A .wav of noise that `seed` makes, and its caption beside it; folders are made as needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:  # soundfile itself cannot take every name
        soundfile.write(file, noise(seconds, seed=seed), 8_000, format="WAV", subtype="PCM_16")
    if caption is not None:
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")
    return path


def wav_header(data_bytes: int, riff_bytes: int | None = None, rate_hz: int = 8_000, channels: int = 1) -> bytes:
    """The 44 bytes before 16-bit PCM samples, claiming these sizes whatever follows."""
    riff_bytes = data_bytes + 36 if riff_bytes is None else riff_bytes
    form = struct.pack("<HHIIHH", 1, channels, rate_hz, rate_hz * channels * 2, channels * 2, 16)
    chunks = b"WAVEfmt " + struct.pack("<I", 16) + form + b"data" + struct.pack("<I", data_bytes)
    return b"RIFF" + struct.pack("<I", riff_bytes) + chunks


def pcm16(seconds: float, seed: int = 0) -> bytes:
    """Samples of mono noise at 8 kHz, as they stand in a .wav file."""
    return (noise(seconds, seed=seed) * 32_767).astype("<i2").tobytes()


def write_sparse_hours(path: Path, hours: float) -> Path:
    """A .wav at 44.1 kHz that is all zeros but for a second of noise at its end; almost no disk is used."""
    samples = round(hours * 3600) * 44_100
    path.write_bytes(wav_header(samples * 2, rate_hz=44_100))
    os.truncate(path, 44 + samples * 2)
    with open(path, "rb+") as file:
        file.seek(-88_200, os.SEEK_END)
        file.write((noise(1, 44_100) * 32_767).astype("<i2").tobytes())
    return path
