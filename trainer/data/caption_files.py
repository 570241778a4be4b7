"""Captions as they stand in text files: which bytes are read as text, and which files hold no caption."""

from __future__ import annotations

import codecs
import os
import stat
from typing import Literal

from trainer.data.captions import LINE
from trainer.data.text_content import why_no_caption

CAPTION_CHARACTERS = 2_000
CAPTION_BYTES = 1 << 20  # a longer file is no caption, and is not read to its end
# No text holds these control characters; 9 to 13 and 133 are white space.
CONTROLS = frozenset(map(chr, (*range(9), *range(14, 32), *range(127, 160)))) - {"\x85"}


class CaptionFault(Exception):
    """A caption file that cannot be used: `fate` is that of its clip, `detail` goes on from the file's name."""

    def __init__(self, fate: Literal["caption unreadable", "caption too long"], detail: str):
        super().__init__(detail)
        self.fate: Literal["caption unreadable", "caption too long"] = fate
        self.detail = detail


def read_caption(path: str, *, lines: bool = False) -> tuple[str | None, str]:
    """The caption in a text file, None if the file is blank; and a remark for the report, or "".

    lines  whether each line is a caption of its own; those that are not blank are returned joined by LINE

    All white space becomes single spaces. UTF-8 is read, UTF-16 where a byte order mark says so, and what is neither as
    Windows-1252, of which Latin-1's letters are a part. Raises CaptionFault for what is no text, too long, or text of
    another kind than a caption (trainer/data/text_content.py).
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise CaptionFault("caption unreadable", "is no regular file: write a text file in its place")
        with open(path, "rb") as file:
            raw = file.read(CAPTION_BYTES + 1)
    except OSError as error:
        detail = f"cannot be read ({error.strerror}): check its rights"
        raise CaptionFault("caption unreadable", detail) from error
    try:
        text, remark = _decode(raw)
    except UnicodeDecodeError as error:
        why = why_no_caption(raw, None) or "is no text: save it as plain UTF-8 text"
        raise CaptionFault("caption unreadable", why) from error
    if reason := why_no_caption(raw, text):  # before all else, because such a file is often long too
        raise CaptionFault("caption unreadable", reason)
    if len(raw) > CAPTION_BYTES:
        raise CaptionFault("caption too long", f"is over {CAPTION_BYTES:,} bytes: is it the right file?")
    caption, empty = caption_of_text(text, lines=lines)
    return caption, empty or remark


def caption_of_text(text: str, *, lines: bool = False) -> tuple[str | None, str]:
    """What `read_caption` says of a file with this text. Raises CaptionFault for control characters and what is too
    long."""
    if CONTROLS.intersection(text):
        raise CaptionFault("caption unreadable", "holds NUL or control characters: save it as UTF-8 text")
    captions = [" ".join(part.split()) for part in (text.splitlines() if lines else [text])]
    caption = LINE.join(filter(None, captions))
    longest = max(map(len, captions), default=0)
    if longest > CAPTION_CHARACTERS:
        detail = f"has {longest:,} characters: shorten it to {CAPTION_CHARACTERS:,} at most"
        raise CaptionFault("caption too long", detail)
    return (caption, "") if caption else (None, "empty caption: trained without text")


def _decode(raw: bytes) -> tuple[str, str]:
    """The text and a remark. Raises UnicodeDecodeError for what is no text."""
    if len(raw) > CAPTION_BYTES:  # it may end within a character
        return raw.decode("utf-8", "replace"), ""
    if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return raw.decode("utf-16"), "caption read as UTF-16"
    try:
        return raw.decode("utf-8-sig"), ""
    except UnicodeDecodeError:
        return raw.decode("cp1252"), "caption is not UTF-8, read as Latin-1 (Windows-1252)"
