"""The page on which the same prompts, by several models, stand beside each other: scripts/generate.py --compare."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.atomic import write_whole
from trainer.report.players import Column, grid_of
from trainer.report.run_samples import Prompt, Sound
from trainer.report.run_sounds import Sounds
from trainer.report.template import rendered

STYLES, PROGRAMS = ("base.css", "run_page.css"), ("page_data.js", "players.js")
NOT_MADE = "it was not made"


@dataclass(frozen=True, kw_only=True)
class ComparedModel:
    """A column of the page.

    title   what the listener calls the model, as "base model" or "tuned"; no two are the same
    remark  a few words below it, as its folder or its strength; "" says nothing
    sounds  its sound file for each prompt, wav, flac or mp3; None where there is none
    """

    title: str
    remark: str
    sounds: Sequence[Path | None]


def write_comparison(
    page: Path, columns: Sequence[ComparedModel], prompts: Sequence[str], settings: Mapping[str, str]
) -> None:
    """Write the page: a row for each prompt, a column for each model, the first one always in view.

    It is one file with its sounds inside, as mp3. Where they are too long for a page of 10 MB, their first seconds are,
    and where there are too many, the first prompts' are and the page says so; the others are links to their files.

    prompts   as they were given to each model; "" is no prompt
    settings  name and value of all that the sounds have in common, as {"seed": "0", "guidance": "3"}, in the order to
              show them in

    Raises ValueError where a column has more or fewer sounds than there are prompts, or where titles are the same, and
    OSError where the page cannot be written.
    """
    titles = [one.title for one in columns]
    if len(set(titles)) < len(titles):
        raise ValueError(f"two columns have the same title: {', '.join(titles)}")
    for one in columns:
        if len(one.sounds) != len(prompts):
            raise ValueError(f"{one.title} has {len(one.sounds)} sounds for {len(prompts)} prompts")
    rows = [Prompt(text=_shown(text), seed=None, origin="", clip="", row=at) for at, text in enumerate(prompts)]
    grid = grid_of([_column(one, rows, fixed=one is columns[0]) for one in columns], Sounds(), page.parent)
    text = rendered(
        "comparison.html",
        styles=STYLES,
        programs=PROGRAMS,
        data={"sounds": grid["played"], "written": time.time(), "newest_last": False},
        titles=list(map(_shown, titles)),
        prompts=len(prompts),
        grid=grid,
        settings=[(_shown(name), _shown(value)) for name, value in settings.items()],
        written_text=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    )
    write_whole(page, text.encode("utf-8"))


def _column(one: ComparedModel, rows: Sequence[Prompt], *, fixed: bool) -> Column:
    sounds: dict[Prompt, Sound] = {}
    for row, file in zip(rows, one.sounds, strict=True):
        error = NOT_MADE if file is None else ""
        sounds[row] = Sound(prompt=row, file=file, seconds=0.0, continued_seconds=0.0, error=error)
    remarks: list[Any] = [_shown(one.remark)] if one.remark else []
    return Column(title=_shown(one.title), remarks=remarks, sounds=sounds, fixed=fixed, embedded=True)


def _shown(text: str) -> str:
    """A text that UTF-8 cannot hold, as a file's odd name, is shown with a sign in place of what it cannot."""
    return text.encode("utf-8", "replace").decode()
