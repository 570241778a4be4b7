"""The grid of players: a row for each prompt, a column for each step or run; and which sounds are inside the page."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trainer.report.run_samples import Prompt, Sound, Step
from trainer.report.run_sounds import Embedded, Sounds, Waveform
from trainer.report.template import link_to

CLIPS = "the clip itself"  # the column that no step has made
MOST_CELLS = 600  # the page says how many columns are left out, and where their sounds lie
HALF_HEIGHT = 20  # of a waveform, whose width is the number of its bars
ORIGINS = {
    "caption": "a caption of the data set",
    "unknown": "a prompt that the data set does not have",
    "given": "a given prompt",
    "continuation": "goes on from a clip",
}


@dataclass(frozen=True, kw_only=True)
class Column:
    """A column of the grid: its title, what else is said of it, and its sounds by prompt.

    fixed     it stays in view when the others move sideways
    embedded  its sounds are inside the page before those of others
    """

    title: str
    remarks: Sequence[str]
    sounds: Mapping[Prompt, Sound]
    fixed: bool = False
    embedded: bool = False


def columns_of(steps: Sequence[Step], best: int | None) -> tuple[list[Column], int]:
    """A column for each step, the base model's first, then the clips themselves; and how many steps are left out.

    They are left out to keep the page small.

    best  the step of the best validation; None where there is none
    """
    base, later = [one for one in steps if one.step == 0], [one for one in steps if one.step > 0]
    nearest = min(later, key=lambda one: abs(one.step - best), default=None) if best is not None else None
    rows = max((len(one.sounds) for one in steps), default=1) or 1
    room = max(2, MOST_CELLS // rows - len(base))
    kept = [one for one in later if one in later[-room:] or one is nearest]
    made = [Column(
        title="base model", remarks=["before step 1"], sounds=_by_prompt(one), fixed=True, embedded=True
    ) for one in base]  # fmt: skip
    if clips := _clips_of(steps):
        made.append(Column(title=CLIPS, remarks=["as its codes keep it"], sounds=clips, embedded=True))
    for one in kept:
        remarks = []
        if one is nearest:
            remarks.append("best" if one.step == best else f"nearest to the best, step {best:,}")
        if one is later[-1]:
            remarks.append("newest")
        made.append(
            Column(title=f"step {one.step:,}", remarks=remarks, sounds=_by_prompt(one), embedded=bool(remarks))
        )
    return made, len(later) - len(kept)


def _clips_of(steps: Sequence[Step]) -> dict[Prompt, Sound]:
    """The clip itself, of each prompt that has one."""
    found: dict[Prompt, Sound] = {}
    for step in steps:
        for sound in step.sounds:
            if sound.clip_file is not None:
                found[sound.prompt] = replace(sound, file=sound.clip_file, error="")
    return found


def grid_of(columns: Sequence[Column], sounds: Sounds, page_folder: Path) -> dict[str, Any]:
    """What the template shows, and as `played` what the program plays: an mp3 in base64, or a link, by number."""
    prompts = list(dict.fromkeys(prompt for column in columns for prompt in column.sounds))
    waves = sounds.waveforms(_files(columns, prompts))
    embedded = sounds.embedded(
        # Prompt by prompt, so that what a page has room for can be compared.
        [file for prompt in prompts for file in _files([one for one in columns if one.embedded], [prompt])],
        list(_files([one for one in reversed(columns) if not one.embedded], prompts)),
        waves,
    )
    played: list[dict[str, str]] = []
    rows, whole = [], 0
    for prompt in prompts:
        heard = [column.sounds.get(prompt) for column in columns]
        cells = [None if one is None else _cell(one, waves, embedded, page_folder, played) for one in heard]
        continued = max((one.continued_seconds for one in heard if one is not None), default=0.0)
        melodies = {one.melody for one in heard if one is not None}
        whole += sum(cell is not None and cell["inside"] for cell in cells)
        rows.append({"prompt": prompt, "origin": _origin(prompt, continued, melodies), "cells": cells})
    return {"columns": columns, "rows": rows, "played": played, "inside": whole, "linked": len(played) - whole}


def _by_prompt(step: Step) -> dict[Prompt, Sound]:
    return {sound.prompt: sound for sound in step.sounds}


def _files(columns: Iterable[Column], prompts: Sequence[Prompt]) -> Iterable[Path]:
    """The sound files of columns, each column from the first prompt to the last."""
    for column in columns:
        for prompt in prompts:
            sound = column.sounds.get(prompt)
            if sound is not None and sound.file is not None:
                yield sound.file


def _cell(
    sound: Sound, waves: Mapping[Path, Waveform], embedded: Mapping[Path, Embedded], page_folder: Path,
    played: list[dict[str, str]],
) -> dict[str, Any]:  # fmt: skip
    """A sound as the template shows it. What is played is added to `played`."""
    if sound.file is None or sound.file not in waves:
        return {"error": sound.error or "its file is missing or no sound", "inside": False}
    wave, inside = waves[sound.file], embedded.get(sound.file)
    link = link_to(sound.file, page_folder)
    played.append({"mp3": inside.mp3} if inside else {"link": link})
    part = inside is not None and inside.seconds < wave.seconds - 0.1
    peaks = wave.peaks
    if inside is not None and part:
        peaks = peaks[: max(2, round(len(peaks) * inside.seconds / wave.seconds))]
    return {
        "error": "", "number": len(played) - 1, "inside": inside is not None, "link": link,
        "seconds": wave.seconds, "part": inside.seconds if inside and part else None,
        "width": len(peaks), "outline": "".join(_bar(at, peak) for at, peak in enumerate(peaks)),
    }  # fmt: skip


def _bar(at: int, peak: int) -> str:
    half = max(1, round(peak / 99 * (HALF_HEIGHT - 1)))
    return f"M{at}.5 {HALF_HEIGHT - half}v{2 * half}"


def _origin(prompt: Prompt, continued_seconds: float, melodies: Collection[bool | None]) -> str:
    """Where a prompt comes from; of a melody model also whether its sounds follow a melody."""
    text = ORIGINS.get(prompt.origin, "")
    if prompt.origin == "continuation" and continued_seconds:
        text = f"goes on from the first {continued_seconds:g} s of a clip"
    if melodies in ({True}, {False}):
        followed = "with the clip's melody" if True in melodies else "without a melody"
        text = f"{text}, {followed}" if text else followed
    return text
