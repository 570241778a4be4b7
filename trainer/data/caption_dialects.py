"""Texts that other programs write beside a sound, with a caption among other things: which part is the caption.

Told by content. Pure functions of a text: nothing is opened here. What is neither of these dialects nor lyrics stays
whole, whatever colons and brackets it holds.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Part:
    """The part of a text that is its caption.

    text    the caption; None where the text holds lyrics and no caption, which must not be trained on
    remark  what was left out of the text, for the report; "" where nothing was
    """

    text: str | None
    remark: str = ""


_SECTIONS = (
    r"(?:verse|chorus|pre-?\s?chorus|post-?\s?chorus|bridge|intro|outro|hook|refrain|interlude|instrumental|coda)"
)
# A line that holds nothing but the name of a song's section: [Verse 1], [Chorus: all], Verse 2:
_MARKER = re.compile(
    rf"^[^\S\n]*(?:\[\s*{_SECTIONS}\b[^\]\n]*\]|\(?{_SECTIONS}(?:\s*\d+)?\)?\s*:)[^\S\n]*$",
    re.IGNORECASE | re.MULTILINE,
)
_NO_LYRICS = re.compile(r"\s*\[instrumental\]\s*", re.IGNORECASE)  # what ACE-Step has in a file of lyrics then
_TIMED_LINE = re.compile(r"^\s*\[\d{1,3}:\d\d(?:[.:]\d{1,3})?\]", re.MULTILINE)  # of .lrc files
_FEWEST_MARKERS = 2
_FEWEST_VERSES, _LONGEST_VERSE = 4, 60  # lines, and characters of each

# Side-Step (ACE-Step 1.5): a field's name at the start of a line. A line without one goes on with the field before.
_FIELD = re.compile(
    r"^\s*(caption|genre|tags|bpm|key|keyscale|signature|time\s?signature|lyrics|language|duration|is_instrumental"
    r"|instrumental|custom_tag|trigger|prompt_override|repeat|title|artist)\s*:(.*)$",
    re.IGNORECASE,
)
_BARE_LYRICS = re.compile(r"^\s*lyrics\s*:\s*$", re.IGNORECASE | re.MULTILINE)

# ai-toolkit: <CAPTION>...</CAPTION><LYRICS>...</LYRICS>, and more such elements.
_FIRST_TAG = re.compile(r"\s*<(?:caption|lyrics|bpm|keyscale|timesignature|duration|language|genre)>", re.IGNORECASE)
_CAPTION_ELEMENT = re.compile(r"<caption>(.*?)(?:</caption>|<lyrics>|\Z)", re.IGNORECASE | re.DOTALL)


def caption_part(text: str) -> Part:
    """What of a text is its caption: all of an ordinary text, and None of lyrics alone.

    Dialects: the lines of Side-Step ("caption: ...", "lyrics: ..."), the elements of ai-toolkit (<CAPTION>...</CAPTION>
    <LYRICS>...), a caption with a line "lyrics:" and lyrics behind it. A text of which two lines or more are the names
    of sections ([Verse], [Chorus]), or begin with a time as in .lrc files, is lyrics.
    """
    part = _of_elements(text) or _of_lines(text) or _before_lyrics(text) or Part(text=text)
    return part if part.text is None or not is_lyrics(part.text) else Part(text=None)


def is_lyrics(text: str) -> bool:
    """Whether a text has the marks of lyrics on several of its lines, or says that there are none ([Instrumental])."""
    if "\n" not in text.strip():  # nearly every caption is one line
        return _NO_LYRICS.fullmatch(text) is not None
    return any(len(pattern.findall(text)) >= _FEWEST_MARKERS for pattern in (_MARKER, _TIMED_LINE))


def is_like_lyrics(text: str) -> bool:
    """Whether a text looks like a song's without having its marks: several lines, all short and of words alone."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if len(lines) < _FEWEST_VERSES or max(map(len, lines)) > _LONGEST_VERSE:
        return False
    return not any(":" in line or line.startswith(("-", "*", "#")) for line in lines)  # a list of what is known


def _of_elements(text: str) -> Part | None:
    if not _FIRST_TAG.match(text):
        return None
    lower = text.lower()
    # A tag alone may be a placeholder (--tune_text 1): "<caption> slow rock".
    if "</caption>" not in lower and "</lyrics>" not in lower and not ("<caption>" in lower and "<lyrics>" in lower):
        return None
    found = _CAPTION_ELEMENT.search(text)
    if found and found[1].strip():
        return Part(text=found[1].strip(), remark="its <CAPTION> alone was read")
    return Part(text=None) if "<lyrics>" in lower else Part(text="", remark="its <CAPTION> is empty")


def _of_lines(text: str) -> Part | None:
    lines = text.strip().splitlines()
    if not lines or not _FIELD.match(lines[0]):
        return None
    fields: dict[str, list[str]] = {}
    current: list[str] = []
    for line in lines:
        if match := _FIELD.match(line):
            current = [match[2].strip()]
            fields.setdefault(match[1].lower(), current)  # of a field that is there twice the first counts
        else:
            current.append(line)
    values = {name: "\n".join(value).strip() for name, value in fields.items()}
    if "caption" not in values and "lyrics" not in values:
        return None  # "Genre: rock" may be how somebody writes captions: nothing in it must be left out
    if values.get("caption"):
        others = ", ".join(name for name in values if name != "caption")
        return Part(text=values["caption"], remark=f"its line caption: alone was read, not {others}" if others else "")
    genre = values.get("genre") or values.get("tags")
    if genre:
        return Part(text=genre, remark="its line genre: alone was read, since caption: is missing or empty")
    return Part(text=None) if values.get("lyrics") else Part(text="", remark="its line caption: is empty")


def _before_lyrics(text: str) -> Part | None:
    found = _BARE_LYRICS.search(text)
    if not found:
        return None
    before = text[: found.start()].strip()
    return Part(text=before or None, remark="read up to its line lyrics:" if before else "")
