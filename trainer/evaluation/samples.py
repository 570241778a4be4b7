"""The folder of the sounds that a run makes while it trains: what its files are called, and which steps are unfinished.

samples/step-00000120/01_slow_rock.flac   one sound for each prompt, 16 bit, at the model's rate
samples/step-00000120/samples.json        what the sounds are; written last, so that a step without it is unfinished
samples/replaced-1/step-00000140/...      made by a run that was killed before a checkpoint held step 140
samples/clips/song_mp3_500_1a2b3c4d.flac  what EnCodec's codes keep of a clip's beginning, to be heard beside the sounds
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import soundfile

from trainer.atomic import is_there, names_in, rename_folder, write_whole

LIST, CLIPS = "samples.json", "clips"
FORMAT, VERSION = "musicgen-trainer samples", 1
_STEP = re.compile(r"step-(\d{8,})")
_REPLACED = re.compile(r"replaced-(\d+)")
_SOUND = re.compile(r"\d{2,}_.*\.flac(\.partial)?")


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One sound of a step, as samples.json tells it.

    file               its name in the step's folder; None where it could not be made
    prompt             "" for none
    seconds            of the sound; 0 where there is none
    origin             where the prompt comes from, see trainer/data/sample_prompts.py
    clip               the clip whose caption or beginning it has; None where that is no clip of the dataset
    continued_seconds  of the clip, with which the sound begins
    error              why there is no sound
    clip_file          the name in clips/ of that clip's beginning; None where there is none to hear
    melody             whether it follows that clip's melody; None of a model that reads none, and then not in the file
    """

    file: str | None
    prompt: str
    seed: int
    seconds: float
    origin: str
    clip: str | None
    continued_seconds: float
    error: str | None
    clip_file: str | None = None
    melody: bool | None = None


@dataclass(frozen=True, kw_only=True)
class StepSamples:
    """All sounds of a step, in the order of the prompts.

    time     seconds since 1970, when they were complete
    weights  whether they are by the weights that are trained, or by their average (--ema_decay)
    """

    step: int
    time: float
    sample_rate_hz: int
    guidance: float
    temperature: float
    top_k: int
    weights: Literal["live", "ema"]
    samples: tuple[Sample, ...]


def step_folder(samples: Path, step: int) -> Path:
    """Where the sounds of a step lie. Steps up to 99,999,999 sort as their names do."""
    return samples / f"step-{step:08d}"


def file_name(number: int, prompt: str, suffix: str) -> str:
    """A name safe on every file system: "Café jazz, 90 bpm" as the second prompt is 02_cafe_jazz_90_bpm.wav."""
    ascii_text = unicodedata.normalize("NFKD", prompt).encode("ascii", "ignore").decode().lower()
    plain = re.sub(r"[^a-z0-9]+", "_", ascii_text)[:60].strip("_")
    return f"{number:02d}_{plain or 'prompt'}.{suffix}" if prompt.strip() else f"{number:02d}_no_prompt.{suffix}"


def clip_path(samples: Path, clip: str, frames: int) -> Path:
    """Where the beginning of a clip lies, of so many frames; clips of different names have different files."""
    digest = hashlib.blake2b(clip.encode("utf-8", "surrogateescape"), digest_size=4).hexdigest()
    plain = re.sub(r"[^a-z0-9]+", "_", clip.lower())[-60:].strip("_")
    return samples / CLIPS / f"{plain or 'clip'}_{frames}_{digest}.flac"


def is_finished(samples: Path, step: int) -> bool:
    """Whether all sounds of a step were made, or the reason why not was written down."""
    return is_there(step_folder(samples, step) / LIST)


def was_replaced(samples: Path, step: int) -> bool:
    """Whether a step's sounds were complete before and are moved aside."""
    return any(is_finished(samples / name, step) for name in names_in(samples) if _REPLACED.fullmatch(name))


def begin(samples: Path, step: int) -> None:
    """Make the folder of an unfinished step, without the sounds that a killed run left in it. Raises OSError."""
    folder = step_folder(samples, step)
    folder.mkdir(parents=True, exist_ok=True)
    for name in names_in(folder):
        if _SOUND.fullmatch(name):
            (folder / name).unlink()


def write_sound(path: Path, audio: np.ndarray, sample_rate_hz: int, *, shared: bool = False) -> None:
    """Write sound as FLAC with the 16-bit values that scripts/generate.py writes, complete or not at all.

    audio   (samples,) or (samples, 2) float32; where a sample exceeds 1, all of it is turned down until none does
    shared  whether several processes may write it at the same time

    Raises OSError and soundfile.LibsndfileError.
    """
    # By way of WAV, since libsndfile (1.2) rounds the same numbers to others for FLAC. In memory, because from inside
    # libsndfile an error of the disk reaches nobody.
    wav, flac = io.BytesIO(), io.BytesIO()
    soundfile.write(wav, audio / max(float(abs(audio).max(initial=0.0)), 1.0), sample_rate_hz, "PCM_16", format="WAV")
    wav.seek(0)
    soundfile.write(flac, soundfile.read(wav, dtype="int16")[0], sample_rate_hz, "PCM_16", format="FLAC")
    write_whole(path, flac.getvalue(), shared=shared)


def finish(samples: Path, made: StepSamples) -> None:
    """Write samples.json: from here on the step is finished. Raises OSError."""
    values = {"format": FORMAT, "version": VERSION, **asdict(made)}
    for sample in values["samples"]:
        if sample["melody"] is None:
            del sample["melody"]
    write_whole(step_folder(samples, made.step) / LIST, json.dumps(values, indent=1, ensure_ascii=False).encode())


def read(samples: Path, step: int) -> StepSamples | None:
    """What samples.json says of a step; None where the step is unfinished, or the file is none that we wrote."""
    try:
        values = json.loads((step_folder(samples, step) / LIST).read_bytes())
        if values.pop("format") != FORMAT or values.pop("version") != VERSION:
            return None
        sounds = tuple(Sample(**sample) for sample in values.pop("samples"))
        return StepSamples(samples=sounds, **values)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def finished_steps(samples: Path) -> list[int]:
    """The steps whose sounds are complete, in order."""
    return [step for step in _steps(names_in(samples)) if is_finished(samples, step)]


def move_later(samples: Path, step: int) -> list[int]:
    """Move the sounds of all steps after `step` to replaced-N; returns these steps.

    A run that goes on from `step` makes them anew. One that starts anew gives -1: it knows nothing of the weights that
    an earlier one began with. A kill in between leaves the rest for the next call. Raises OSError.
    """
    names = names_in(samples) if samples.is_dir() else []
    later = [found for found in _steps(names) if found > step]
    if not later:
        return []
    before = [int(match[1]) for name in names if (match := _REPLACED.fullmatch(name))]
    aside = samples / f"replaced-{1 + max(before, default=0)}"
    aside.mkdir()
    for found in later:
        rename_folder(step_folder(samples, found), step_folder(aside, found))
    return later


def _steps(names: Sequence[str]) -> list[int]:
    return sorted(int(match[1]) for name in names if (match := _STEP.fullmatch(name)))
