"""Made-up music with captions, as a folder for --dataset."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import soundfile

SAMPLE_RATE_HZ = 32_000


def write_clips(folder: Path, clips: int, seconds: float) -> list[np.ndarray]:
    """Write so many gliding, noisy tones of `seconds` with captions; returns their samples, float32 in [-1, 1]."""
    folder.mkdir(parents=True)
    draw = np.random.default_rng(0)
    time = np.arange(round(seconds * SAMPLE_RATE_HZ)) / SAMPLE_RATE_HZ
    sounds = []
    for clip in range(clips):
        glide = np.sin(2 * np.pi * (110 + 30 * clip + 20 * time) * time)
        sound = (0.3 * glide + 0.1 * draw.standard_normal(time.shape)).astype(np.float32)
        soundfile.write(folder / f"clip{clip:03}.wav", sound, SAMPLE_RATE_HZ, subtype="PCM_16")
        (folder / f"clip{clip:03}.txt").write_text(f"a synthetic glide, number {clip}, slow and noisy\n")
        sounds.append(sound)
    return sounds
