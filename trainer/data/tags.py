"""The tags inside a sound file (ID3, Vorbis comments, MP4 atoms, RIFF and AIFF chunks) as plain text by field.

tinytag reads them. What it reads is bounded here, because a damaged or hostile header may announce gigabytes.
"""

from __future__ import annotations

import io
import os
import re
import stat
import unicodedata
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, cast

if TYPE_CHECKING:
    from tinytag import TinyTag

# The fields that `read_tags` gives, each with the names under which tinytag 2.3 has it. Lyrics are none of them:
# a caption with lyrics in it would be trained on.
FIELDS: Mapping[str, tuple[str, ...]] = {
    "title": ("title",),
    "artist": ("artist",),
    "album": ("album",),
    "albumartist": ("albumartist",),
    "composer": ("composer",),
    "genre": ("genre",),
    "bpm": ("bpm", "tempo", "tbpm"),
    "key": ("initial_key", "initialkey", "key"),
    "mood": ("mood", "moods", "tmoo"),
    "instrument": ("instrument", "instruments"),
    "grouping": ("grouping",),
    "description": ("description",),
    "comment": ("comment",),
    "year": ("year",),
}
VALUE_CHARACTERS = 300  # of one field, which may hold several values
VALUES = 8  # of one field; the rest is left out
READ_BYTES = 16 << 20  # of one file: an Ogg file's picture lies among its comments, and is read past
# Of formats with ID3, RIFF or FLAC's blocks, where text is read by itself and pictures are skipped unread. tinytag takes
# time by the square of a synchronised lyric in UTF-16: 18 s for one of 64 KiB, 0.3 s for one of 8 (2026-11-27).
TEXT_BYTES, TEXT_READ_BYTES = 8 << 10, 128 << 10

# What programs write where nothing is known.
_PLACEHOLDERS = frozenset((
    "unknown", "unknown artist", "unknown album", "unknown genre", "untitled", "none", "n/a", "na", "null", "-",
    "other", "misc", "<unknown>", "no title", "no artist", "default", "undefined",
))
_KEY = re.compile(r"([a-gA-G])\s*([#♯b♭]|sharp|flat)?\s*(major|maj|dur|minor|min|moll|m|M)?", re.ASCII)
_MINOR_KEYS = ("Ab", "Eb", "Bb", "F", "C", "G", "D", "A", "E", "B", "F#", "Db")  # Camelot's 1A to 12A
_MAJOR_KEYS = ("B", "F#", "Db", "Ab", "Eb", "Bb", "F", "C", "G", "D", "A", "E")  # Camelot's 1B to 12B


def read_tags(path: Path) -> dict[str, str]:
    """The fields of FIELDS that the file's tags fill, each as one line; {} where it has none or none can be read.

    Several values are joined by ", ". `bpm` is a number above 0 ("128", "92.5"), `year` has four digits, and `key` is
    written out ("A minor", of "Am" and of Camelot's "8A" too) where it is understood. What only says that something is
    unknown is left out. Cover art and lyrics are not given.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # before open(), which would wait for ever on a pipe
            return {}
        with open(path, "rb") as file:
            return _fields(file)
    except OSError:
        return {}


def read_tags_of(content: bytes) -> dict[str, str]:
    """The same of a sound file's bytes, as a row of a parquet file holds them."""
    return _fields(io.BytesIO(content))


def _fields(file: BinaryIO) -> dict[str, str]:
    from tinytag import TinyTag, TinyTagException

    _keep_few_values()
    try:
        # By content: a name would have its suffix decide. Every Exception inside comes out as TinyTag's ParseError.
        tag = TinyTag.get(file_obj=cast(BinaryIO, _Bounded(file)), duration=False, image=False)
    except TinyTagException:
        return {}
    found = {field: _clean(field, _values(tag, names)) for field, names in FIELDS.items()}
    return {field: value for field, value in found.items() if value}


def _values(tag: TinyTag, names: Iterable[str]) -> list[str]:
    """All that tinytag has under these names, the main value of each first."""
    values = []
    for name in names:
        main = getattr(tag, name, None)
        values += [str(main)] if isinstance(main, (str, int, float)) else []
        values += [str(value) for value in tag.other.get(name, ())]
    return values


def _clean(field: str, values: Iterable[str]) -> str:
    kept: dict[str, str] = {}
    for value in values:
        line = one_line(value)
        if line.casefold() not in _PLACEHOLDERS:
            line = _WRITTEN.get(field, lambda text: text)(line)
            kept.setdefault(line.casefold(), line)
    kept.pop("", None)
    several = list(kept.values())[: 1 if field in _WRITTEN else VALUES]
    return _cut(", ".join(several))


def one_line(text: str) -> str:
    """`text` in composed Unicode as one line: white space single, control characters and what is no character out.

    At most VALUE_CHARACTERS long, cut between words.
    """
    text = unicodedata.normalize("NFC", text[: 8 * VALUE_CHARACTERS])
    # Cc control, Cs half of a surrogate pair, Co private use, Cn unassigned, Cf such as a byte order mark or a mark
    # of writing direction; but joiners, which Arabic and Indian scripts and emoji are written with, are kept.
    kept = "".join(c if unicodedata.category(c) not in ("Cc", "Cs", "Co", "Cn", "Cf") or c in "\u200c\u200d" else
                   " " if c.isspace() or c == "\0" else "" for c in text)
    return _cut(" ".join(kept.replace("\ufffd", "").split()))


def _cut(text: str) -> str:
    if len(text) <= VALUE_CHARACTERS:
        return text
    return text[:VALUE_CHARACTERS].rsplit(" ", 1)[0].rstrip(" ,;")


def _bpm(text: str) -> str:
    match = re.match(r"\d{1,4}(?:[.,]\d{1,6})?(?!\d)", text, re.ASCII)
    number = float(match[0].replace(",", ".")) if match else 0.0
    return f"{number:.1f}".removesuffix(".0") if 10 <= number < 1000 else ""


def _year(text: str) -> str:
    match = re.search(r"(?<!\d)(?:1[0-9]|20)\d\d(?!\d)", text, re.ASCII)
    return match[0] if match else ""


def written_key(text: str) -> str:
    """A key as words: "A minor" of "Am", "a min", "A-moll" or "8A"; a text that is no key is given back as it is."""
    camelot = re.fullmatch(r"0?(\d{1,2})\s*([abAB])", text, re.ASCII)
    if camelot and 1 <= int(camelot[1]) <= 12:
        minor = camelot[2] in "aA"
        return f"{(_MINOR_KEYS if minor else _MAJOR_KEYS)[int(camelot[1]) - 1]} {'minor' if minor else 'major'}"
    match = _KEY.fullmatch(re.sub(r"[-_]", " ", text))
    if not match:
        match = _KEY.fullmatch(re.sub(r"[-_]", " ", text).lower())
    if not match:
        return text
    sign = {"#": "#", "♯": "#", "sharp": "#", "b": "b", "♭": "b", "flat": "b"}.get(match[2] or "", "")
    minor = (match[3] or "M") in ("minor", "min", "moll", "m")
    return f"{match[1].upper()}{sign} {'minor' if minor else 'major'}"


_WRITTEN = {"bpm": _bpm, "year": _year, "key": written_key}  # fields of one value, and how it is written


class _Bounded:
    """A file of which tinytag reads no more than a bound: beyond it, reads answer as at the end of the file.

    A read of text that asks for more than TEXT_BYTES is answered with so many, and goes on behind what it asked for.
    """

    def __init__(self, file: BinaryIO):
        self._file = file
        head = file.read(12)
        file.seek(0)
        is_text = head.startswith((b"ID3", b"RIFF", b"FORM", b"fLaC", b"\xff"))
        self._most_at_once = TEXT_BYTES if is_text else READ_BYTES
        self._left = TEXT_READ_BYTES if is_text else READ_BYTES

    def read(self, size: int = -1) -> bytes:
        wanted = size if size >= 0 else READ_BYTES
        data = self._file.read(min(wanted, self._left, self._most_at_once))
        self._left -= max(len(data), 1)
        if len(data) == self._most_at_once < wanted:
            self._file.seek(wanted - len(data), os.SEEK_CUR)
        return data

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()


def _keep_few_values() -> None:
    """Have tinytag keep a few values of each field.

    It searches a list of all values for each new one, so that a file with 100,000 comments takes it minutes. It has no
    setting for this (2.3.2); what a field holds beyond VALUES is not used here.
    """
    import tinytag.tinytag

    class FewValues(list[str]):
        def append(self, value: str) -> None:
            if len(self) < VALUES:
                super().append(value)

    class FewFields(tinytag.OtherFields):
        def __setitem__(self, name: str, values: list[str]) -> None:
            super().__setitem__(name, FewValues(values))

    if not getattr(tinytag.tinytag.OtherFields, "is_short", False):
        FewFields.is_short = True  # type: ignore[attr-defined]
        tinytag.tinytag.OtherFields = FewFields  # type: ignore[misc]
