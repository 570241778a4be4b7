"""Runs with samples as a training writes them, cut from the clips of examples/."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import soxr

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
RATE_HZ = 32_000
PROMPTS = ("slow rock ballad with guitar", "fast metal, double bass drums", "8-bit arcade tune", "")


@lru_cache
def music(name: str) -> np.ndarray:
    """A clip of the examples, mono at RATE_HZ."""
    samples, rate_hz = soundfile.read(EXAMPLES / f"{name}.wav", dtype="float32", always_2d=True)
    return soxr.resample(samples.mean(axis=1), rate_hz, RATE_HZ)


def sound(number: int, *, seconds: float = 1.5, gain: float = 1.0) -> np.ndarray:
    """A piece of a clip: other numbers, other pieces."""
    names = ("rock_feelings", "metal_madness", "arcade_meadow", "arcade_return_home", "metal_war_of_freedom")
    clip = music(names[number % len(names)])
    start = (number * 7_001) % max(1, len(clip) - round(seconds * RATE_HZ))
    return clip[start : start + round(seconds * RATE_HZ)] * np.float32(gain)


def sample(prompt: str, *, seed: int = 0, **others: Any) -> dict[str, Any]:
    """An entry of samples.json, without its file."""
    entry = {"prompt": prompt, "seed": seed, "seconds": 1.5, "origin": "caption" if prompt else "given", "clip": None}
    return entry | {"continued_seconds": 0.0, "error": None} | others


def write_step(
    run: Path, step: int, sounds: Sequence[np.ndarray], samples: Sequence[Mapping[str, Any]], **values: Any
) -> Path:
    """A finished step of a run; a sound that is empty is one that failed. Returns its folder."""
    folder = run / "samples" / f"step-{step:08d}"
    folder.mkdir(parents=True)
    entries = []
    for number, (one, entry) in enumerate(zip(sounds, samples, strict=True), start=1):
        file = f"{number:02d}_sound.flac" if len(one) else None
        if file:
            soundfile.write(folder / file, one, RATE_HZ, "PCM_16", format="FLAC")
        entries.append({"file": file, **entry})
    whole = {
        "format": "musicgen-trainer samples", "version": 1, "step": step, "time": 1e9, "sample_rate_hz": RATE_HZ,
        "guidance": 3.0, "temperature": 1.0, "top_k": 250, "weights": "live", "samples": entries,
    }  # fmt: skip
    (folder / "samples.json").write_text(json.dumps(whole | values), encoding="utf-8")
    return folder


def write_run(
    run: Path, steps: Sequence[int] = (0, 60, 120), prompts: Sequence[str] = PROMPTS, *, seconds: float = 1.5
) -> Path:
    """A run with a sound of each prompt at each step; later steps are louder. Returns its folder."""
    for at, step in enumerate(steps):
        sounds = [sound(7 * at + number, seconds=seconds, gain=0.1 * 2**at) for number in range(len(prompts))]
        write_step(run, step, sounds, [sample(prompt, seed=number) for number, prompt in enumerate(prompts)])
    return run
