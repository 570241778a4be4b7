"""Captions as they stand in text files: which bytes are read as text, and which files hold no caption."""

from __future__ import annotations

import codecs
import os
import re
import stat
from typing import Literal

from trainer.data.caption_dialects import caption_part, is_like_lyrics
from trainer.data.captions import LINE
from trainer.data.text_content import why_no_caption

CAPTION_CHARACTERS = 2_000
CAPTION_BYTES = 1 << 20  # a longer file is no caption, and is not read to its end
LYRICS_ALONE = "is lyrics and no caption, and lyrics are not trained on"
LIKE_LYRICS = (
    "its short lines look like lyrics and are read as one caption: name lyrics song.lyrics.txt; --caption_lines 1"
    " reads each line as a caption"
)
# No text holds these control characters; 9 to 13 and 133 are white space.
CONTROLS = frozenset(map(chr, (*range(9), *range(14, 32), *range(127, 160)))) - {"\x85"}
_HALVES = re.compile("[\ud800-\udfff]")
_FIRST_READ = 4096  # bytes of a file that is asked for first where it says that it has fewer


class CaptionFault(Exception):
    """A caption file that cannot be used: `fate` is that of its clip, `detail` goes on from the file's name."""

    def __init__(self, fate: Literal["caption unreadable", "caption too long"], detail: str):
        super().__init__(detail)
        self.fate: Literal["caption unreadable", "caption too long"] = fate
        self.detail = detail

    def of(self, place: str) -> CaptionFault:
        """The same fault, of the same class, with the name of what is wrong before its detail."""
        return type(self)(self.fate, f"{place} {self.detail}")


class LyricsFault(CaptionFault):
    """A text that is lyrics and no caption; its sound may have a caption elsewhere."""


def read_caption(path: str, *, lines: bool = False) -> tuple[str | None, str]:
    """The caption in a text file, None if the file is blank; and a remark for the report, or "".

    lines  whether each line is a caption of its own; those that are not blank are returned joined by LINE

    All white space becomes single spaces. UTF-8 is read, UTF-16 where a byte order mark says so, and what is neither as
    Windows-1252, of which Latin-1's letters are a part. Raises CaptionFault for what is no text, too long, lyrics, or
    text of another kind than a caption (trainer/data/text_content.py).
    """
    text, remark = read_text(path, CAPTION_BYTES)
    caption, more = caption_of(text, lines=lines)
    remark = "; ".join(filter(None, (remark, more)))
    return caption, remark if caption else "empty caption: trained without text"


def read_text(path: str, most_bytes: int) -> tuple[str, str]:
    """What a text file holds, and a remark on how it was read, or "". Raises CaptionFault as `read_caption` does."""
    raw = read_bytes(path, most_bytes + 1)
    try:
        text, remark = decode(raw, cut=len(raw) > most_bytes)
    except UnicodeDecodeError as error:
        why = why_no_caption(raw, None) or "is no text: save it as plain UTF-8 text"
        raise CaptionFault("caption unreadable", why) from error
    if reason := why_no_caption(raw, text):  # before all else, because such a file is often long too
        raise CaptionFault("caption unreadable", reason)
    if len(raw) > most_bytes:
        raise CaptionFault("caption too long", f"is over {most_bytes:,} bytes: is it the right file?")
    return text, remark


def read_bytes(path: str, most_bytes: int) -> bytes:
    """The first bytes of a file. Raises CaptionFault for what is no regular file or cannot be read."""
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):  # before opening it, which waits for ever on a pipe
            raise CaptionFault("caption unreadable", "is no regular file: write a text file in its place")
        descriptor = os.open(path, os.O_RDONLY)  # a file object for each of many small files takes longer than reading
        try:
            return _first_bytes(descriptor, most_bytes, max(_FIRST_READ, status.st_size + 1))
        finally:
            os.close(descriptor)
    except OSError as error:
        detail = f"cannot be read ({error.strerror}): check its rights"
        raise CaptionFault("caption unreadable", detail) from error


def _first_bytes(descriptor: int, most_bytes: int, expected_bytes: int) -> bytes:
    """Up to `most_bytes` of an open file, asked for in pieces of `expected_bytes`, whose room is taken at once."""
    pieces, left = [], most_bytes
    while left and (piece := os.read(descriptor, min(left, expected_bytes))):
        pieces.append(piece)
        left -= len(piece)
    return b"".join(pieces)


def caption_of(text: str, *, lines: bool = False) -> tuple[str | None, str]:
    """The caption that a text holds, wherever it was written, None for a blank one; and a remark, or "".

    Raises CaptionFault as `read_caption` does.
    """
    if CONTROLS.intersection(text):
        raise CaptionFault("caption unreadable", "holds NUL or control characters: save it as UTF-8 text")
    if not text.isascii() and _HALVES.search(text):  # JSON may hold such
        raise CaptionFault("caption unreadable", "holds halves of characters (surrogates): write it anew")
    part = caption_part(text)
    if part.text is None:
        raise LyricsFault(
            "caption unreadable", f"{LYRICS_ALONE}: write a caption into a file of the same name that ends in"
            " .caption.txt"
        )
    pieces = part.text.splitlines() if lines else [part.text]
    captions = [" ".join(piece.split()) for piece in pieces]
    longest = max(map(len, captions), default=0)
    if longest > CAPTION_CHARACTERS:
        detail = f"has {longest:,} characters: shorten it to {CAPTION_CHARACTERS:,} at most"
        raise CaptionFault("caption too long", detail)
    remarks = part.remark, "" if lines or not is_like_lyrics(part.text) else LIKE_LYRICS
    return LINE.join(filter(None, captions)) or None, "; ".join(filter(None, remarks))


def decode(raw: bytes, *, cut: bool = False) -> tuple[str, str]:
    """The text and a remark. Raises UnicodeDecodeError for what is no text.

    cut  whether these are the first bytes of a file only, which may end within a character
    """
    if cut:
        return raw.decode("utf-8", "replace"), ""
    if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return raw.decode("utf-16"), "caption read as UTF-16"
    try:
        return raw.removeprefix(codecs.BOM_UTF8).decode(), ""  # as "utf-8-sig", which is not done in C
    except UnicodeDecodeError:
        return raw.decode("cp1252"), "caption is not UTF-8, read as Latin-1 (Windows-1252)"
