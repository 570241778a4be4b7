"""The sounds that a run has made of its prompts: samples/step-*/samples.json, read for a page."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.atomic import names_in

FOLDER, CLIPS, LIST = "samples", "clips", "samples.json"  # the list is written last: a folder without it is unfinished
STEP_FOLDER = re.compile(r"step-(\d{8}|[1-9]\d{8,})")


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """What tells one row of sounds from another.

    text  "" is no prompt
    seed  None where the page says it once for all rows
    row   tells apart rows that have the same prompt
    """

    text: str
    seed: int | None
    origin: str
    clip: str
    row: int = 0


@dataclass(frozen=True, kw_only=True)
class Sound:
    """One sound of a step.

    file       None where there is none, and then `error` says why
    seconds    as the list says them
    clip_file  the beginning of the clip whose caption it has, or which it goes on from; None where there is none
    melody     whether it follows that clip's melody; None where the list says nothing of it, as of a text model
    """

    prompt: Prompt
    file: Path | None
    seconds: float
    continued_seconds: float
    error: str
    clip_file: Path | None = None
    melody: bool | None = None


@dataclass(frozen=True, kw_only=True)
class Step:
    """The sounds of a step; step 0 is the model before the first."""

    step: int
    settings: Mapping[str, Any]  # guidance, temperature, top_k, weights
    sounds: Sequence[Sound]


class Samples:
    """The steps of a run that have sounds. A list that was read is read again only where it has changed."""

    def __init__(self, run: Path):
        self._folder = run / FOLDER
        self._read: dict[str, tuple[tuple[int, int], Step | None]] = {}

    def steps(self) -> list[Step]:
        """In order. A folder whose list is not there, or is none, is left out. Raises OSError."""
        read: dict[str, tuple[tuple[int, int], Step | None]] = {}
        try:
            names = sorted(filter(STEP_FOLDER.fullmatch, names_in(self._folder)), key=lambda name: (len(name), name))
        except NotADirectoryError:
            names = []
        for name in names:
            path = self._folder / name / LIST
            try:
                found = path.stat()
            except (FileNotFoundError, NotADirectoryError):
                continue
            state = (found.st_mtime_ns, found.st_size)
            known = self._read.get(name)
            read[name] = known if known and known[0] == state else (state, _step(path))
        self._read = read
        return [step for _, step in read.values() if step is not None]


def _step(path: Path) -> Step | None:
    try:
        values = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    if not isinstance(values, dict) or not isinstance(values.get("samples"), list):
        return None
    sounds = [_sound(path.parent, one) for one in values["samples"] if isinstance(one, dict)]
    names = ("guidance", "temperature", "top_k", "weights")
    settings = {name: values[name] for name in names if isinstance(values.get(name), (int, float, str))}
    return Step(step=int(path.parent.name.removeprefix("step-")), settings=settings, sounds=sounds)


def _sound(folder: Path, values: Mapping[str, Any]) -> Sound:
    name, clip_name, error = _name(values.get("file")), _name(values.get("clip_file")), values.get("error")
    seed = values.get("seed")
    if name is None and not isinstance(error, str):
        error = "it has no file"
    return Sound(
        prompt=Prompt(
            text=_text(values.get("prompt")), seed=seed if isinstance(seed, int) else 0,
            origin=_text(values.get("origin")), clip=_text(values.get("clip")),
        ),
        file=None if name is None else folder / name,
        seconds=_number(values.get("seconds")),
        continued_seconds=_number(values.get("continued_seconds")),
        error=error if isinstance(error, str) else "",
        clip_file=None if clip_name is None else folder.parent / CLIPS / clip_name,
        melody=melody if isinstance(melody := values.get("melody"), bool) else None,
    )  # fmt: skip


def _name(value: object) -> str | None:
    """The name of a file in a known folder, which leads nowhere else; None where it is none."""
    is_name = isinstance(value, str) and value not in ("", ".", "..") and not {"/", "\0"} & set(value)
    return value if is_name and isinstance(value, str) else None


def _text(value: object) -> str:
    """Texts that no file can hold in UTF-8, as half a surrogate pair, are shown with a sign in place of it."""
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else ""


def _number(value: object) -> float:
    return float(value) if isinstance(value, (int, float)) and 0 <= value < 1e9 else 0.0
