"""Captions from a template such as "{genre}, {bpm} bpm, in {key}", filled with a file's tags and names."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from pathlib import PurePosixPath

from trainer.data.tags import FIELDS, one_line
from trainer.errors import ConfigError

NAME_FIELDS: Mapping[str, str] = {
    "name": "the file's name as words, without its suffix and track number",
    "folder": "the folder in which the file lies, as words",
    "path": "all folders from the data set's down to the file's, as words",
}
NAMES = (*FIELDS, *NAME_FIELDS)
EXAMPLE = "{genre}, {title}, {folder}"

_FIELD = re.compile(r"\{([^{}]*)\}")
# What separates the pieces of a template. A piece that lacks all of its fields goes, with its own words.
_BREAK = re.compile(r"([,;|\n()\[\]]|\.(?=\s|$)|\s[-\u2013\u2014/]\s)")
# Words that join two fields, and stand for nothing where one of them is missing.
_JOINING = r"(?:a|an|and|at|by|feat|featuring|for|from|ft|in|of|on|the|to|with)"
_JOINING_AFTER = rf"(?:{_JOINING}|bpm)"  # and the unit of the one that has a unit
_BRACKETS = (("(", ")"), ("[", "]"))
_VALUE = "\x00"  # in a template that is being filled, around the number of a value: no template holds it


def check(template: str) -> None:
    """Raise ConfigError unless `template` holds nothing but text and {name}, of the names in NAMES, at least one."""
    shown = repr(template)
    there = f"the names are {', '.join(NAMES)}, as in {EXAMPLE!r}"
    if any(unicodedata.category(c) in ("Cc", "Cs") and not c.isspace() for c in template):
        raise ConfigError(f"the caption template {shown} holds control characters or bytes that are no text: {there}")
    if set("{}") & set(_FIELD.sub("", template)):
        raise ConfigError(f"the caption template {shown} has a brace without its partner: write {{name}}; {there}")
    names = _FIELD.findall(template)
    if not names:
        raise ConfigError(f"the caption template {shown} has no {{name}} in it, so that all files would have one "
                          f"caption: {there}; --default_caption gives one text to all that have none")
    for name in names:
        if name not in NAMES:
            plain = "" if re.fullmatch(r"\w*", name) else ": a plain name stands in braces, without format or index"
            raise ConfigError(f"the caption template {shown} has {{{name}}}{plain}; {there}")


def fill(template: str, fields: Mapping[str, str]) -> str:
    """The template with each {name} replaced by its field, as one line; "" where none of its fields is there.

    A field that is missing or blank takes its piece of the template with it, from one comma, semicolon, full stop,
    bracket or dash between spaces to the next, unless another field of the piece is there: then words like "by" and
    "in" beside it go. No comma, bracket or double space is left over. What a field holds is not taken for a template.
    """
    values = [one_line(fields.get(name, "")) for name in _FIELD.findall(template)]
    if not any(values):
        return ""
    numbers = iter(range(len(values)))
    marked = _FIELD.sub(lambda _: f"{_VALUE}{next(numbers)}{_VALUE}", template.replace(_VALUE, ""))
    pieces = _BREAK.split(marked)
    pieces[::2] = [_piece(piece, values) for piece in pieces[::2]]
    return re.sub(rf"{_VALUE}(\d+){_VALUE}", lambda match: values[int(match[1])], _tidy("".join(pieces)))


def _piece(piece: str, values: list[str]) -> str:
    """A piece of a marked template without its missing fields; "" where all of them are missing."""
    parts = piece.split(_VALUE)  # text, number, text, number, ..., text
    there = [bool(values[int(number)]) for number in parts[1::2]]
    if there and not any(there):
        return ""
    text = list(parts)
    text[1::2] = [f"{_VALUE}{number}{_VALUE}" if is_there else "" for number, is_there in
                  zip(parts[1::2], there, strict=True)]
    for place, is_there in enumerate(there):
        if not is_there:
            text[2 * place] = re.sub(rf"(?:\b{_JOINING}\W*)+$", " ", text[2 * place], flags=re.IGNORECASE)
            text[2 * place + 2] = re.sub(rf"^(?:\W*{_JOINING_AFTER}\b)+", " ", text[2 * place + 2], flags=re.IGNORECASE)
    return "".join(text)


def _tidy(text: str) -> str:
    """A marked caption without empty brackets, separators that separate nothing, and double spaces."""
    text, before = " ".join(text.split()), ""
    while text != before:
        before = text
        for opening, closing in _BRACKETS:
            text = re.sub(rf"\{opening}[\s,;|./\u2013\u2014-]*\{closing}", "", text)
        text = re.sub(r"\s+([,;.)\]])", r"\1", text)
        text = re.sub(r"([(\[])[\s,;|]+", r"\1", text)
        text = re.sub(r"[\s,;|]+([)\]])", r"\1", text)
        text = re.sub(r"([,;|])(?:\s*[,;|]|\s+[-\u2013\u2014/](?=\s|$))+", r"\1", text)
        text = re.sub(r"\.(?:\s*[.,;|])+", ".", text)
        text = re.sub(r"[,;|]\s*\.", ".", text)
        text = re.sub(r"(?:\s[-\u2013\u2014/|])+(?=\s[-\u2013\u2014/|]\s)", "", text)
        text = re.sub(r"^[\s,;|./\u2013\u2014-]+|[\s,;|/\u2013\u2014-]+$", "", text)
        text = " ".join(text.split())
    return text


def name_fields(name: str) -> dict[str, str]:
    """The fields of NAME_FIELDS of a file's name relative to the data set's folder; {} has no entry that is blank.

    "Dub/03_slow-river.wav" gives name "slow river", folder "Dub" and path "Dub". Where the file lies in the data set's
    folder itself, there are no folder and path.
    """
    path = PurePosixPath(name)
    folders = list(filter(None, map(words, path.parent.parts)))
    fields = {"name": words(path.stem, numbered=True), "folder": words(path.parent.name), "path": ", ".join(folders)}
    return {field: value for field, value in fields.items() if value}


def words(name: str, *, numbered: bool = False) -> str:
    """A name of a file or folder as words: "Slow_River" gives "Slow River"; "" for a mere number or hash.

    numbered  whether a track number may stand in front, which is left out: "01 - Slow River"
    """
    text = one_line(name.encode("utf-8", "surrogateescape").decode("utf-8", "replace"))
    text = " ".join(text.replace("_", " ").split())
    if numbered:
        number = r"(?:track\s*)?(?:0?\d{1,2}(?:\s*[-.)]+\s*|\s+)|\d{3}\s*(?:-|[.)]\s)\s*)"
        text = re.sub(rf"^{number}(?=\S*[^\W\d])", "", text, flags=re.IGNORECASE)
    if " " not in text:
        text = re.sub(r"(?<=\w)-(?=\w)", " ", text)  # beside spaces it is a hyphen: "lo-fi beat"
    text = " ".join(re.sub(r"(?<!\d)\.|\.(?!\d)|\s-+(?=\s|$)|^-+\s", " ", text).split())
    is_code = re.fullmatch(r"(?:[\W\d_]|track|audio|untitled)*", text, re.IGNORECASE)
    is_hash = re.fullmatch(r"[0-9a-f]{8}[0-9a-f ]{8,}", text, re.IGNORECASE) and re.search(r"\d", text)
    return "" if is_code or is_hash else text
