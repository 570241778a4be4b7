"""Captions in .json files that lie beside a sound: audiocraft's, and those of other programs, told by their keys."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trainer.data.caption_files import CAPTION_BYTES, CaptionFault, caption_of, decode, read_bytes
from trainer.data.captions import LINE
from trainer.data.music_fields import Fields, fields_of

# In this order: audiocraft writes description; underfit and others prompt or caption.
CAPTION_KEYS = ("description", "caption", "prompt", "text")
TAG_KEYS = ("tags", "tag")
INSTEAD = "mend it, or leave json out of --captions"


@dataclass(frozen=True, kw_only=True)
class Described:
    """What a .json file or a row of metadata says of a sound.

    caption  the caption, captions joined by LINE, or None where it has none
    fields   what else it says (trainer/data/music_fields.py)
    remark   for the report, or ""
    """

    caption: str | None
    fields: Fields
    remark: str = ""


def read_json(path: str, *, lines: bool) -> Described:
    """What the file says. Raises CaptionFault for what cannot be read, or a caption that cannot be used."""
    raw = read_bytes(path, CAPTION_BYTES + 1)
    if len(raw) > CAPTION_BYTES:
        raise CaptionFault("caption unreadable", f"is over {CAPTION_BYTES:,} bytes: {INSTEAD}")
    try:
        found = json.loads(decode(raw)[0])
    except (ValueError, RecursionError) as error:
        raise CaptionFault("caption unreadable", f"is no JSON: {INSTEAD}") from error
    if isinstance(found, list) and len(found) == 1:
        found = found[0]
    if not isinstance(found, dict):
        return Described(caption=None, fields=())
    return described(found, CAPTION_KEYS, lines=lines)


def described(values: Mapping[str, Any], keys: tuple[str, ...], *, lines: bool, tags: bool = True) -> Described:
    """The caption under the first of `keys` that has text, else its tags if `tags`.

    Names are compared without regard to case. Of a list of captions all are used where `lines` says so, else the first.
    Raises CaptionFault.
    """
    lower = {str(name).strip().lower(): value for name, value in values.items()}
    fields = fields_of(values)
    for key in keys:
        texts = _texts(lower.get(key))
        if texts:
            return _described(texts if lines else texts[:1], fields, lines, _rest(len(texts), lines))
    for key in TAG_KEYS if tags else ():
        words = _texts(lower.get(key))
        if words:
            return _described([", ".join(words)], fields, lines, "from its tags")
    return Described(caption=None, fields=fields)


def _described(texts: list[str], fields: Fields, lines: bool, remark: str) -> Described:
    found = [caption_of(text, lines=lines) for text in texts]
    remarks = filter(None, (remark, *(more for _, more in found)))
    caption = LINE.join(caption for caption, _ in found if caption) or None
    return Described(caption=caption, fields=fields, remark="; ".join(dict.fromkeys(remarks)))


def _rest(count: int, lines: bool) -> str:
    return "" if lines or count == 1 else f"the first of {count} captions: --caption_lines 1 draws among them"


def _texts(value: Any) -> list[str]:
    """The texts that are no blanks in a text or a list of such."""
    values = value if isinstance(value, list) else [value]
    return [text for text in values if isinstance(text, str) and text.strip() and text.strip() not in ("None", "nan")]
