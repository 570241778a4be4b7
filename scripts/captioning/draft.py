"""A caption drafted for one sound file, and where each part of it comes from."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from captioning.tempo_and_key import LEAST_SECONDS, RATE_HZ, key_of, tempo_of
from trainer.data.audio import stream
from trainer.data.caption_template import fill, name_fields
from trainer.data.tags import read_tags, written_key

TEMPLATE = "{genre}, {mood}, {instrument}, {folder}, {name}, {bpm} bpm, {key}"
HEARD_SECONDS = 120.0  # from the start; an hour's mix is read no further
LEAST_CONFIDENCE = 0.5

_BPM_IN_NAME = re.compile(r"(?<![\w.])(\d{2,3})\s?bpm\b", re.IGNORECASE)
_KEY_IN_NAME = re.compile(r"(?<!\w)([A-G](?:#|b)?\s?(?:maj|min|major|minor|m))(?!\w)")


@dataclass(frozen=True, kw_only=True)
class Part:
    """A field of the template and what it is filled with.

    source      where it comes from: "tag", "file name", "folder", "signal" or "CLAP"
    confidence  of what was heard, from 0 to 1; None for what was read
    """

    field: str
    text: str
    source: str
    confidence: float | None = None

    def describe(self) -> str:
        sure = "" if self.confidence is None else f", confidence {self.confidence:.2f}"
        return f'{self.field} "{self.text}" ({self.source}{sure})'


@dataclass(frozen=True, kw_only=True)
class Draft:
    """A caption, "" where nothing is known of the file; its parts; and what was heard but is too unsure to use."""

    caption: str
    parts: tuple[Part, ...]
    left_out: tuple[Part, ...]
    is_short: bool


def draft_of(
    root: Path, name: str, template: str, heard: tuple[Part, ...] = (), least_confidence: float = LEAST_CONFIDENCE
) -> Draft:
    """The caption of the sound `name` below `root`, by the template; of each field the first source that has it.

    heard  what else is known of the sound, as by CLAP; it counts less than what is read
    Raises AudioFault where the sound cannot be decoded.
    """
    path = root / name
    samples = start_of(path, RATE_HZ, HEARD_SECONDS)
    estimates = (("bpm", tempo_of(samples)), ("key", key_of(samples)))
    signal = tuple(
        Part(field=field, text=found.text.removesuffix(" bpm"), source="signal", confidence=found.confidence)
        for field, found in estimates if found is not None
    )  # fmt: skip
    first: dict[str, Part] = {}
    left_out = []
    for part in (*_read(path, name), *heard, *signal):
        if part.confidence is not None and part.confidence < least_confidence:
            left_out.append(part)
        else:
            first.setdefault(part.field, part)
    used = {field: part for field, part in first.items() if f"{{{field}}}" in template}
    used = {field: part for field, part in used.items() if not _says_it_already(part, used)}
    caption = fill(template, {field: part.text for field, part in used.items()})
    return Draft(
        caption=caption,
        parts=tuple(used.values()),
        left_out=tuple(part for part in left_out if part.field not in used),
        is_short=len(samples) < LEAST_SECONDS * RATE_HZ,
    )


def start_of(path: Path, sample_rate_hz: int, seconds: float) -> np.ndarray:
    """The first seconds of a sound as mono float32 samples (n,). Raises AudioFault where it cannot be decoded."""
    blocks, left = [], round(seconds * sample_rate_hz)
    for block in stream(path, sample_rate_hz):
        blocks.append(block[:left])
        left -= len(blocks[-1])
        if left <= 0:
            break
    return np.concatenate(blocks) if blocks else np.zeros(0, np.float32)


def _read(path: Path, name: str) -> Iterator[Part]:
    """What tags and names say, tags first."""
    for field, text in read_tags(path).items():
        yield Part(field=field, text=text, source="tag")
        if field == "title":
            yield Part(field="name", text=text, source="title tag")
    names = name_fields(name)
    stem = names.pop("name", "")
    if match := _BPM_IN_NAME.search(stem):
        yield Part(field="bpm", text=match[1], source="file name")
        stem = _BPM_IN_NAME.sub(" ", stem)
    if match := _KEY_IN_NAME.search(stem):
        yield Part(field="key", text=written_key(match[1]), source="file name")
        stem = _KEY_IN_NAME.sub(" ", stem)
    stem = " ".join(stem.split()).strip(" -_,")
    if re.search(r"[^\W\d_]", stem):
        yield Part(field="name", text=stem, source="file name")
    for field, text in names.items():
        yield Part(field=field, text=text, source="folder")


def _says_it_already(part: Part, used: Mapping[str, Part]) -> bool:
    """Whether a part of another field holds this one's words: the folder "rock" beside the genre "Indie Rock"."""
    for other in used.values():
        if other.field == part.field:
            continue
        mine, others = part.text.casefold(), other.text.casefold()
        later = list(used).index(part.field) > list(used).index(other.field)
        if re.search(rf"(?<!\w){re.escape(mine)}(?!\w)", others) and (mine != others or later):
            return True
    return False


def has_caption(root: Path, name: str, caption_name: str) -> bool:
    """Whether a caption stands beside the sound: song.caption.txt, song.txt, song.wav.txt or song.json."""
    sound = root / name
    stem = os.path.splitext(sound)[0]
    beside = (f"{stem}.caption.txt", f"{stem}.txt", f"{sound}.txt", f"{stem}.json")
    return bool(caption_name) or any(os.path.lexists(place) for place in beside)
