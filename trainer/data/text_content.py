"""What a text is, told by its content: a caption, or something else that lies where a caption or a sound should.

Pure functions of a text: nothing is opened here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Literal, get_args

TextKind = Literal[
    "caption", "git-lfs pointer", "git-annex pointer", "rich text", "JSON", "web page", "XML", "PDF", "office document"
]
TEXT_KINDS: tuple[TextKind, ...] = get_args(TextKind)

# What is said of a caption file with such content, after its name. The content itself would be trained on word by word.
WHY_NO_CAPTION: Mapping[TextKind, str] = {
    "git-lfs pointer": "is a git-lfs pointer and not the text that it stands for: run git lfs pull",
    "git-annex pointer": "is a git-annex pointer and not the text that it stands for: run git annex get",
    "rich text": "is rich text (RTF): save it as plain text (in TextEdit: Format, Make Plain Text)",
    "JSON": "is JSON: write the caption alone into the file, as plain text",
    "web page": "is a web page (HTML), as a failed download leaves one: write the caption alone into it, as plain text",
    "XML": "is XML: write the caption alone into the file, as plain text",
    "PDF": "is a PDF file: save its text as plain text",
    "office document": "is a document of an office program: save it as plain text",
}
# What is said of a sound file that holds such text and no sound.
WHY_NO_SOUND: Mapping[TextKind, str] = {
    "git-lfs pointer": "a git-lfs pointer and not the sound that it stands for: run git lfs pull",
    "git-annex pointer": "a git-annex pointer and not the sound that it stands for: run git annex get",
    "web page": "a web page (HTML), as a failed download leaves one, and not a sound file: download it again",
    "XML": "XML, as a failed download leaves it, and not a sound file: download it again",
    "JSON": "JSON, as a failed download leaves it, and not a sound file: download it again",
}

# Spec: github.com/git-lfs/git-lfs, docs/spec.md: the version line is the first; older ones name hawser or git-media.
_LFS = re.compile(r"version https?://(?:git-lfs\.github\.com|hawser\.github\.com|git-media\.io)/")
_ANNEX = re.compile(r"(?:\.\./)*/?(?:\.git/)?annex/objects/\S+\s*$")
_DOCTYPE = re.compile(r"\s*(?:<\?xml[^>]*>\s*)?(?:<!--.*?-->\s*)*<!doctype\s+html\b", re.IGNORECASE | re.DOTALL)
_PAGE_TAGS = re.compile(r"<(/?(?:html|head|body))(?=[\s>])[^>]*>", re.IGNORECASE)
_XML = re.compile(r"\s*<\?xml\s|\s*<!doctype\s+(?:plist|svg)\b", re.IGNORECASE)
# An object whose first key is there, whole or cut off, alone or in a list; of Python's quotes too.
_OBJECT = re.compile(r"""\s*\[?\s*\{\s*(?:"[^"\n]*"|'[^'\n]*')\s*:""")


def kind_of(text: str) -> TextKind:
    """What kind of text this is. Angle brackets, braces and quotes as such leave it a caption."""
    if _LFS.match(text):
        return "git-lfs pointer"
    if _ANNEX.match(text):
        return "git-annex pointer"
    if text.startswith("%PDF-"):
        return "PDF"
    if text.lstrip().startswith("{\\rtf"):
        return "rich text"
    if _is_page(text):
        return "web page"
    if _XML.match(text):
        return "XML"
    if _OBJECT.match(text) or _is_json_of_many(text):
        return "JSON"
    return "caption"


def why_no_caption(raw: bytes, text: str | None) -> str | None:
    """What stands in a caption file instead of a caption, and what to do; None where nothing else is known of it.

    raw   the file's bytes, or its first ones
    text  the same read as text; None where it is none
    """
    if raw.startswith((b"PK\x03\x04", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1")):  # .docx, .odt, .pages; .doc
        return WHY_NO_CAPTION["office document"]
    return WHY_NO_CAPTION.get(kind_of(raw[:8].decode("latin-1") if text is None else text))


def why_no_sound(head: bytes) -> str | None:
    """What text stands in a sound file instead of sound, and what to do; None where it is no text that is known."""
    return WHY_NO_SOUND.get(kind_of(head.decode("utf-8", "replace")))


def _is_page(text: str) -> bool:
    """Whether a text is HTML. One tag makes no page: a placeholder may be <body>, and programs write <CAPTION>."""
    if "<" not in text:
        return False
    return bool(_DOCTYPE.match(text)) or len({tag.lower() for tag in _PAGE_TAGS.findall(text)}) > 1


def _is_json_of_many(text: str) -> bool:
    """Whether a text is a JSON list or object. A word in quotes, a number and [intro] are captions."""
    if not text.lstrip().startswith(("[", "{")):
        return False
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True
