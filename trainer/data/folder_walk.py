"""Walks a data folder: finds every sound file with the caption file beside it, and gives all other files their fate.

Nothing is opened here. A caption file that is in use has no fate of its own, since it shares that of its clip.
"""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass

from trainer.data.fates import Fate, display

OTHER_AUDIO = frozenset((
    ".mp3", ".flac", ".ogg", ".oga", ".opus", ".m4a", ".aac", ".mp4", ".wma", ".aif", ".aiff", ".aifc", ".au",
    ".caf", ".w64", ".rf64", ".wave", ".ape", ".wv",
))
JUNK_NAMES = frozenset({"__macosx", "thumbs.db", "desktop.ini"})  # what macOS and Windows leave behind


@dataclass(frozen=True, kw_only=True)
class Sound:
    """A .wav file, or what has the name of one, and the caption file beside it; both relative to the data folder.

    caption_name  "" where there is none
    """

    name: str
    caption_name: str


def walk(root: str) -> Iterator[Sound | Fate]:
    """Every .wav file below the folder `root`, and the fates of all that is none.

    Links to folders are not followed: they could lead round in circles, or to a folder that is searched already.
    """
    unreadable: list[OSError] = []
    for parent, folders, names in os.walk(root, onerror=unreadable.append):
        inside = os.path.relpath(parent, root)
        prefix = "" if inside == "." else inside + os.sep
        keep = []
        for name in sorted(folders):
            shown = display(prefix + name)
            if _is_junk(name):
                yield Fate(path=shown, fate="ignored", detail="hidden folder, skipped whole")
            elif os.path.islink(os.path.join(parent, name)):
                yield Fate(path=shown, fate="ignored", detail="linked folder, not followed: move it here")
            else:
                keep.append(name)
                if _suffix(name) == ".wav":
                    yield Fate(path=shown, fate="not a file", detail="a folder, searched like any other")
        folders[:] = keep
        yield from _pair(prefix, sorted(names))
    for error in unreadable:
        detail = f"folder not searched ({error.strerror}): check its rights"
        yield Fate(path=display(os.path.relpath(error.filename, root)), fate="unreadable", detail=detail)


def _pair(prefix: str, names: list[str]) -> Iterator[Sound | Fate]:
    """The .wav files of one folder with their captions, and the fates of its other files."""
    visible = [name for name in names if not _is_junk(name)]
    sounds = [name for name in visible if _suffix(name) == ".wav"]
    texts = [name for name in visible if _suffix(name) == ".txt"]
    exact = {stem(name): name for name in texts}  # sorted, so x.txt wins over x.TXT
    owners = {stem(name) for name in sounds}
    loose = {_loose(stem(name)): name for name in texts if stem(name) not in owners}
    taken = set()
    for name in sounds:
        caption_name = exact.get(stem(name)) or loose.get(_loose(stem(name)), "")
        taken.add(caption_name)
        yield Sound(name=prefix + name, caption_name=caption_name and prefix + caption_name)
    loose_owners = {_loose(owner) for owner in owners}
    for name in names:
        shown, suffix = display(prefix + name), _suffix(name)
        if _is_junk(name):
            yield Fate(path=shown, fate="ignored", detail="hidden or system file")
        elif suffix == ".txt" and name not in taken:
            if _loose(stem(name)) in loose_owners:
                yield Fate(path=shown, fate="ignored", detail="another caption file fits its .wav better")
            else:
                yield Fate(path=shown, fate="no audio", detail="no .wav of this name beside it: add it")
        elif suffix in OTHER_AUDIO:
            yield Fate(path=shown, fate="unsupported format", detail=f"{suffix}: convert it to .wav")
        elif suffix not in (".wav", ".txt"):
            yield Fate(path=shown, fate="ignored", detail="neither .wav nor .txt")


def stem(name: str) -> str:
    """A name without its last suffix: v1.2 of v1.2.wav."""
    return os.path.splitext(name)[0]


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _loose(stem: str) -> str:
    """A stem as macOS and Windows compare names: accents are composed with their letter, and case is ignored."""
    return unicodedata.normalize("NFC", stem).casefold()


def _is_junk(name: str) -> bool:
    return name.startswith(".") or name.lower() in JUNK_NAMES
