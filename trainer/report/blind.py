"""A page on which a person judges sounds without knowing what made them: one file that makes no request.

The sounds of a prompt are A, B and so on in an order that is drawn per prompt, and equally loud. Which is which stands
in the page in a form that nobody reads by accident; it is no secret.
"""

from __future__ import annotations

import base64
import hashlib
import io
import itertools
import json
import random
import string
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import soxr

from trainer.data.loudness import LoudnessMeter
from trainer.errors import DataError
from trainer.report.blind_sides import Prompt, Side
from trainer.report.template import rendered

FORMAT, VERSION = "musicgen-trainer listening", 1  # of the files that the page saves; blind_score.py reads them
RATE_HZ = 32_000  # MusicGen's
# LAME's constant bitrate at this level of libsndfile 1.2.2 is 64 kbit/s at 32 kHz. Constant, so that no sound's length
# in the page tells what it is.
BITRATE = {"bitrate_mode": "CONSTANT", "compression_level": 0.88}
BITRATE_STEREO = {"bitrate_mode": "CONSTANT", "compression_level": 0.66}  # 128 kbit/s
MOST_BYTES = 10_000_000
FRAME_BYTES = 60_000  # of the page besides the sounds and texts: program, style, markup
LOUDEST_LUFS, QUIETEST_LUFS = -16.0, -32.0
HIGHEST_PEAK = 10 ** (-1.5 / 20)  # mp3 gives peaks a few tenths of a dB higher than those of what was coded


@dataclass(frozen=True, kw_only=True)
class BlindPage:
    """The page as text, and what the person who made it should know."""

    text: str
    prompts: int
    notes: tuple[str, ...]


def blind_page(
    sides: Sequence[Side], prompts: Sequence[Prompt], *,
    seed: int, marks_only: bool = False, notes: Sequence[str] = (), most_bytes: int = MOST_BYTES,
) -> BlindPage:
    """The page for `prompts`, or for as many of them as most_bytes take.

    seed        which side is A, which is B and so on, for each prompt
    marks_only  ask for a mark of each sound and for no choice among them
    notes       what a person must know of the comparison; the page shows them once it has revealed what was which

    Raises DataError where no prompt has sounds that can be read, or where the first is too large.
    """
    heard, unread = _heard(prompts, most_bytes - FRAME_BYTES)
    if not heard:
        why = f"the sounds of one prompt alone exceed {most_bytes / 1e6:g} MB: compare fewer --steps or runs"
        raise DataError(f"no sound of any prompt can be read: {unread[0]}" if unread else why)
    notes = [*notes, *unread]
    if len(heard) + len(unread) < len(prompts):
        notes.append(
            f"only the first {len(heard)} of {len(prompts)} prompts are inside: with more, the page would exceed"
            f" {most_bytes / 1e6:g} MB"
        )
    if same := sum(len(set(one.mp3s)) == 1 for one in heard):
        notes.append(f"exactly the same sound on all sides: {same} of {len(heard)} prompts")
    shown, places = [], []
    for one, order in zip(heard, orders_of(len(sides), len(heard), seed), strict=True):
        shown.append(one.told() | {"sounds": [one.mp3s[side] for side in order]})
        places.append([{"side": side, "file": one.prompt.files[side].name} for side in order])
    key = {
        "sides": [{"name": one.name, "run": one.run, "step": one.step, "weights": one.weights} for one in sides],
        "prompts": places,
        "notes": notes,
    }
    return BlindPage(text=_rendered(shown, key, seed, marks_only), prompts=len(shown), notes=tuple(notes))


@dataclass(frozen=True, kw_only=True)
class _Heard:
    """A prompt with the sounds of its sides, in base64, and whether these are equally loud."""

    prompt: Prompt
    mp3s: tuple[str, ...]
    even: bool

    def told(self) -> dict[str, Any]:
        """What the page says of it before anything is revealed."""
        one = self.prompt
        told = {"text": one.text, "seed": one.seed, "clip": one.clip, "continued": one.continued_seconds}
        return told | {"even": self.even}


def _heard(prompts: Sequence[Prompt], most_bytes: int) -> tuple[list[_Heard], list[str]]:
    """The prompts whose sounds can be read, until they take most_bytes, and a note on each that cannot."""
    heard: list[_Heard] = []
    notes: list[str] = []
    for prompt in prompts:
        try:
            sounds, even = equally_loud(_sounds(prompt.files))
        except (OSError, soundfile.LibsndfileError, DataError) as error:
            notes.append(f"a prompt is left out, because a sound cannot be read ({error})")
            continue
        one = _Heard(prompt=prompt, mp3s=tuple(map(_mp3, sounds)), even=even)
        most_bytes -= sum(map(len, one.mp3s)) + 2 * len(json.dumps(one.told()))  # signs that are escaped grow
        if most_bytes < 0:
            break
        heard.append(one)
    return heard, notes


def orders_of(sides: int, prompts: int, seed: int) -> list[tuple[int, ...]]:
    """For each prompt, the side that is A, the one that is B, and so on: a function of the arguments alone.

    Each side is at each place equally often, or once more or less where the prompts do not divide by the sides.
    """
    draw = random.Random(f"blind {seed}")
    orders: list[tuple[int, ...]] = []
    while len(orders) < prompts:
        first = draw.sample(range(sides), sides)
        places = [tuple(first[(at + turn) % sides] for at in range(sides)) for turn in range(sides)]
        orders += draw.sample(places, sides)
    # Cut before it is shuffled: a whole number of such squares, and rows of one more, which differ at each place.
    orders = orders[:prompts]
    draw.shuffle(orders)
    return orders


def equally_loud(sounds: Sequence[np.ndarray]) -> tuple[list[np.ndarray], bool]:
    """The sounds, (n,) or (n, 2) float32 at RATE_HZ, with one gain each, after which all have the same integrated
    loudness.

    That is LOUDEST_LUFS, or the loudest that all of them reach without a peak above HIGHEST_PEAK, but not below
    QUIETEST_LUFS: a sound whose peaks do not let it become as loud as that stays below, and the second value is False.
    So it is with a sound that has no loudness, because it is silent or shorter than 0.4 s.
    """
    loudness = [_loudness(sound) for sound in sounds]
    peaks = [float(np.abs(sound).max(initial=0.0)) for sound in sounds]
    most = [20 * float(np.log10(HIGHEST_PEAK / peak)) if peak > 0 else 0.0 for peak in peaks]  # gain in dB
    reached = [lufs + gain for lufs, gain in zip(loudness, most, strict=True) if lufs is not None]
    target = max(QUIETEST_LUFS, min([LOUDEST_LUFS, *reached]))
    gains = [min(gain, 0.0 if lufs is None else target - lufs) for lufs, gain in zip(loudness, most, strict=True)]
    even = all(one is not None for one in loudness) and all(lufs >= target - 0.05 for lufs in reached)
    return [sound * np.float32(10 ** (gain / 20)) for sound, gain in zip(sounds, gains, strict=True)], even


def hidden(key: object, page_id: str) -> str:
    """The key in a form that is not read at a glance; blind.js undoes it."""
    mask = itertools.cycle(page_id.encode())
    return base64.b64encode(bytes(sign ^ next(mask) for sign in json.dumps(key).encode())).decode()


def _sounds(files: Sequence[Path]) -> list[np.ndarray]:
    """The sounds at RATE_HZ, all as long as the shortest: a length would tell them apart.

    All are mono, (n,), unless one of them is stereo: then all are (n, 2), and mono ones play on both sides, as they do
    by themselves.
    """
    sounds: list[np.ndarray] = []
    for file in files:
        samples, rate_hz = soundfile.read(file, dtype="float32", always_2d=True)
        sound = samples if samples.shape[1] == 2 else samples.mean(axis=1)
        sounds.append(sound if rate_hz == RATE_HZ else soxr.resample(sound, rate_hz, RATE_HZ))
        if not len(sound) or not np.isfinite(sound).all():
            raise DataError(f"{file} is empty or not finite")
    if any(sound.ndim == 2 for sound in sounds):
        sounds = [sound if sound.ndim == 2 else np.stack([sound, sound], axis=1) for sound in sounds]
    shortest = min(map(len, sounds))
    return [sound[:shortest] for sound in sounds]


def _loudness(sound: np.ndarray) -> float | None:
    samples = sound if sound.ndim == 2 else sound[:, None]
    meter = LoudnessMeter(RATE_HZ, (1.0,) * samples.shape[1])
    meter.add(samples)
    return meter.result()


def _mp3(sound: np.ndarray) -> str:
    file = io.BytesIO()
    soundfile.write(file, sound, RATE_HZ, format="MP3", **(BITRATE if sound.ndim == 1 else BITRATE_STEREO))
    return base64.b64encode(file.getvalue()).decode("ascii")


def _rendered(shown: Sequence[dict[str, Any]], key: dict[str, Any], seed: int, marks_only: bool) -> str:
    content = json.dumps([shown, key, seed, marks_only], sort_keys=True).encode()
    page_id = hashlib.blake2b(content, digest_size=16).hexdigest()
    letters = string.ascii_uppercase[: len(key["sides"])]
    return rendered(
        "blind.html",
        styles=("base.css", "blind.css"),
        programs=("blind.js",),
        data={
            "format": FORMAT, "version": VERSION, "page": page_id, "seed": seed, "marks_only": marks_only,
            "letters": letters, "prompts": shown, "key": hidden(key, page_id),
        },
        letters=letters,
        prompts=len(shown),
        marks_only=marks_only,
    )  # fmt: skip
