"""Finds the clips of a folder, and gives every file in it a fate.

A caption file that is in use has no row of its own: its fate is that of its clip.
"""

from __future__ import annotations

import codecs
import csv
import hashlib
import io
import os
import stat
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from trainer.atomic import write_whole
from trainer.data.audio import AudioFacts, AudioFault
from trainer.data.audio_facts import inspect_all
from trainer.data.captions import LINE
from trainer.errors import ConfigError, DataError, StorageError

if TYPE_CHECKING:
    from datasets import Dataset

Word = Literal[
    "used", "no caption", "caption unreadable", "caption too long", "too short", "silent", "not finite", "empty",
    "truncated", "unreadable", "not a file", "duplicate", "unsupported format", "no audio", "ignored",
]
WORDS: tuple[Word, ...] = get_args(Word)
Columns = Mapping[str, Sequence[Any]]  # a table: columns of equal length by name

OTHER_AUDIO = frozenset((
    ".mp3", ".flac", ".ogg", ".oga", ".opus", ".m4a", ".aac", ".mp4", ".wma", ".aif", ".aiff", ".aifc", ".au",
    ".caf", ".w64", ".rf64", ".wave", ".ape", ".wv",
))
JUNK_NAMES = frozenset({"__macosx", "thumbs.db", "desktop.ini"})  # what macOS and Windows leave behind
CAPTION_CHARACTERS = 2_000
CAPTION_BYTES = 1 << 20  # a longer file is no caption, and is not read to its end
# No text holds these; 9-13 and 133 are white space.
CONTROLS = frozenset(map(chr, (*range(9), *range(14, 32), *range(127, 160)))) - {"\x85"}
EXAMPLES = 10
# Columns of the table of clips; types as datasets names them.
TYPES = {
    "path": "string", "path_bytes": "binary", "size_bytes": "int64", "caption": "string", "seconds": "float64",
    "sample_rate_hz": "int32", "channels": "int32", "content": "string",
}


@dataclass(frozen=True, kw_only=True)
class Fate:
    """What became of one file: `path` as displayed, `fate` one of WORDS, `detail` why and what to do."""

    path: str
    fate: Word
    detail: str = ""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The clips of a folder and the fates of its files, in the order of their names.

    `columns` are path (display text, relative to the folder), path_bytes (os.fsencode of the
    absolute path), size_bytes (int64), caption (string or null), seconds (float64), sample_rate_hz (int32),
    channels (int32) and content (hex blake2b-128 of the file). Its rows are sorted by (content, caption), null
    first: an order that no name, place or listing of the folder can change.
    """

    columns: Columns
    fates: tuple[Fate, ...]

    @cached_property
    def clips(self) -> Dataset:
        """The same table as a `datasets.Dataset`."""
        from datasets import Dataset, Features, Value  # up to a second, with pandas; a run needs the columns alone

        return Dataset.from_dict(dict(self.columns), Features({name: Value(kind) for name, kind in TYPES.items()}))


def scan(
    folder: Path, *, no_label: bool, min_seconds: float, memory: Path, rehash: bool = False,
    show_progress: bool = True, caption_lines: bool = False,
) -> Manifest:
    """Every .wav below `folder` with the .txt of the same name beside it, and each file's fate.

    With `no_label` no caption is read or used, present or not, and all clips have caption null. With
    `caption_lines` each line of a .txt is a caption of its own, and they stand joined by LINE.
    Facts of inspected files are kept in the folder `memory`: a file of unchanged size and modification
    time is not read again unless `rehash`. Raises DataError if there is no clip to train on, StorageError
    if `memory` cannot be written. No single file makes it fail.
    """
    root = os.path.abspath(folder)
    _check_folder(root)
    fates: list[Fate] = []
    candidates: list[_Candidate] = []
    for item in _walk(root):
        judged = _candidate(root, item, no_label, caption_lines) if isinstance(item, _Sound) else item
        if isinstance(judged, Fate):
            fates.append(judged)
        else:
            candidates.append(judged)
    candidates.sort(key=lambda candidate: os.fsencode(candidate.name))
    learnt = inspect_all(
        [candidate.path for candidate in candidates], memory, rehash=rehash, show_progress=show_progress
    )
    clips, verdicts = _judge(candidates, learnt, min_seconds)
    fates += verdicts
    fates.sort(key=lambda fate: fate.path)
    if not clips:
        raise DataError(f"the dataset folder {display(root)} holds no clip to train on:\n{summary(fates)}")
    return Manifest(columns=_columns(clips), fates=tuple(fates))


def split(contents: Sequence[str], seed: int, share: float) -> np.ndarray:
    """Which clips validate: bool (n,), True for about `share` of the distinct contents.

    Each answer depends on (seed, content, share) alone: added files move nothing, equal files stay
    together, and a larger share keeps what a smaller one chose. Raises ConfigError unless 0 <= share <= 1.
    """
    if not 0 <= share <= 1:
        raise ConfigError(f"a validation share of {share} is no share of the clips: use 0 to 1, such as 0.05")
    limit = share * 2**64
    return np.array([_hash64(f"{seed}:{content}") < limit for content in contents], dtype=bool)


def summary(fates: Iterable[Fate]) -> str:
    """A count per fate, and up to ten files left out with what to do, of every kind at least one."""
    by_word: dict[Word, list[Fate]] = {word: [] for word in WORDS}
    for fate in fates:
        by_word[fate.fate].append(fate)
    lines = [f"{len(group):>9,}  {word}" for word, group in by_word.items() if group]
    if not lines:
        return "       no files: put .wav files there, each with a .txt caption of the same name beside it"
    examples = [
        (place, order, fate) for order, (word, group) in enumerate(by_word.items()) if word != "used"
        for place, fate in enumerate(group[:EXAMPLES])
    ]
    examples.sort(key=lambda example: example[:2])
    if examples:
        lines.append("Left out, for example:")
        lines += [f"  {fate.path}: {fate.fate}: {fate.detail}" for _, _, fate in examples[:EXAMPLES]]
    return "\n".join(lines)


def write_report(fates: Iterable[Fate], path: Path) -> None:
    """All fates as CSV (UTF-8; path, fate, detail), complete or not there; StorageError if it cannot be."""
    text = io.StringIO(newline="")
    rows = csv.writer(text)
    rows.writerow(("path", "fate", "detail"))
    rows.writerows((fate.path, fate.fate, fate.detail) for fate in fates)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, text.getvalue().encode())
    except OSError as error:
        raise StorageError(f"the dataset report {display(path)} cannot be written ({error.strerror}): "
                           "free space there, or give another --output_dir") from error


def display(path: str | os.PathLike[str]) -> str:
    """A name as one printable line: bytes that are no UTF-8 as \\xff, line breaks as \\n, and so on."""
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


@dataclass(frozen=True, kw_only=True)
class _Sound:
    """A .wav name found below the folder, with the caption file beside it ("" without one)."""

    name: str  # relative to the folder
    caption_name: str


@dataclass(frozen=True, kw_only=True)
class _Candidate:
    """A regular .wav file whose caption, or its absence, is in order."""

    name: str
    path: str  # absolute
    size_bytes: int
    caption: str | None
    remark: str


def _check_folder(root: str) -> None:
    try:
        if not stat.S_ISDIR(os.stat(root).st_mode):
            raise DataError(f"the dataset folder {display(root)} is a file: give the folder it is in")
        os.scandir(root).close()
    except OSError as error:
        raise DataError(f"the dataset folder {display(root)} cannot be opened ({error.strerror}): "
                        "give a folder of .wav files that you may read") from error


def _walk(root: str) -> Iterator[_Sound | Fate]:
    """Every .wav below the folder, and the fates of all that is none. Folder links are not followed."""
    unreadable: list[OSError] = []
    for place, folders, names in os.walk(root, onerror=unreadable.append):
        inside = os.path.relpath(place, root)
        prefix = "" if inside == "." else inside + os.sep
        keep = []
        for name in sorted(folders):
            shown = display(prefix + name)
            if _is_junk(name):
                yield Fate(path=shown, fate="ignored", detail="hidden folder, skipped whole")
            elif os.path.islink(os.path.join(place, name)):
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


def _pair(prefix: str, names: list[str]) -> Iterator[_Sound | Fate]:
    """The .wav files of one folder with their captions, and the fates of its other files."""
    visible = [name for name in names if not _is_junk(name)]
    sounds = [name for name in visible if _suffix(name) == ".wav"]
    texts = [name for name in visible if _suffix(name) == ".txt"]
    exact = {_stem(name): name for name in texts}  # sorted, so x.txt wins over x.TXT
    owners = {_stem(name) for name in sounds}
    loose = {_loose(_stem(name)): name for name in texts if _stem(name) not in owners}
    taken = set()
    for name in sounds:
        caption_name = exact.get(_stem(name)) or loose.get(_loose(_stem(name)), "")
        taken.add(caption_name)
        yield _Sound(name=prefix + name, caption_name=caption_name and prefix + caption_name)
    loose_owners = {_loose(owner) for owner in owners}
    for name in names:
        shown, suffix = display(prefix + name), _suffix(name)
        if _is_junk(name):
            yield Fate(path=shown, fate="ignored", detail="hidden or system file")
        elif suffix == ".txt" and name not in taken:
            if _loose(_stem(name)) in loose_owners:
                yield Fate(path=shown, fate="ignored", detail="another caption file fits its .wav better")
            else:
                yield Fate(path=shown, fate="no audio", detail="no .wav of this name beside it: add it")
        elif suffix in OTHER_AUDIO:
            yield Fate(path=shown, fate="unsupported format", detail=f"{suffix}: convert it to .wav")
        elif suffix not in (".wav", ".txt"):
            yield Fate(path=shown, fate="ignored", detail="neither .wav nor .txt")


def _stem(name: str) -> str:
    return os.path.splitext(name)[0]


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _loose(stem: str) -> str:
    """A stem as a Mac or a PC compares names: accents composed, case ignored."""
    return unicodedata.normalize("NFC", stem).casefold()


def _is_junk(name: str) -> bool:
    return name.startswith(".") or name.lower() in JUNK_NAMES


def _candidate(root: str, sound: _Sound, no_label: bool, caption_lines: bool) -> _Candidate | Fate:
    """What is worth decoding: a regular file whose caption is in order. Nothing of the sound is read."""
    shown, path = display(sound.name), os.path.join(root, sound.name)
    try:
        status = os.stat(path)
    except OSError as error:
        return Fate(path=shown, fate="unreadable", detail=f"{error.strerror}: check the link or its rights")
    if not stat.S_ISREG(status.st_mode):
        return Fate(path=shown, fate="not a file", detail="a pipe or device: put a sound file in its place")
    caption, remark = None, ""
    if no_label:
        remark = "caption not used under --no_label 1" if sound.caption_name else ""
    elif not sound.caption_name:
        expected = display(_stem(os.path.basename(sound.name)) + ".txt")
        detail = f"write {expected} beside it, or train without text: --no_label 1"
        return Fate(path=shown, fate="no caption", detail=detail)
    else:
        try:
            caption, remark = read_caption(os.path.join(root, sound.caption_name), lines=caption_lines)
        except _CaptionFault as fault:
            return Fate(path=shown, fate=fault.fate, detail=f"{display(sound.caption_name)} {fault.detail}")
    return _Candidate(name=sound.name, path=path, size_bytes=status.st_size, caption=caption, remark=remark)


@dataclass(frozen=True, kw_only=True)
class _Clip:
    candidate: _Candidate
    facts: AudioFacts


def _judge(
    candidates: Iterable[_Candidate], learnt: Mapping[str, AudioFacts | AudioFault], min_seconds: float
) -> tuple[list[_Clip], list[Fate]]:
    """The clips to train on, in the order given, and every candidate's fate."""
    clips: dict[tuple[str, str | None], _Clip] = {}
    fates = []
    for one in candidates:
        shown, facts = display(one.name), learnt[one.path]
        if isinstance(facts, AudioFault):
            fates.append(Fate(path=shown, fate=facts.fate, detail=facts.detail))
            continue
        if facts.seconds < min_seconds:
            detail = f"{facts.seconds:.2f} s, under the {min_seconds:g} s of --min_seconds: use a longer take"
            fates.append(Fate(path=shown, fate="too short", detail=detail))
            continue
        clip = _Clip(candidate=one, facts=facts)
        first = clips.setdefault((facts.content, one.caption), clip)
        if first is clip:
            fates.append(Fate(path=shown, fate="used", detail=one.remark))
        else:
            detail = f"same sound and caption as {display(first.candidate.name)}, which is used: remove one"
            fates.append(Fate(path=shown, fate="duplicate", detail=detail))
    return list(clips.values()), fates


def _columns(clips: Iterable[_Clip]) -> Columns:
    ordered = sorted(clips, key=lambda clip: (clip.facts.content, clip.candidate.caption or ""))
    return {
        "path": [display(clip.candidate.name) for clip in ordered],
        "path_bytes": [os.fsencode(clip.candidate.path) for clip in ordered],
        "size_bytes": [clip.candidate.size_bytes for clip in ordered],
        "caption": [clip.candidate.caption for clip in ordered],
        "seconds": [clip.facts.seconds for clip in ordered],
        "sample_rate_hz": [clip.facts.sample_rate_hz for clip in ordered],
        "channels": [clip.facts.channels for clip in ordered],
        "content": [clip.facts.content for clip in ordered],
    }


class _CaptionFault(Exception):
    def __init__(self, fate: Literal["caption unreadable", "caption too long"], detail: str):
        super().__init__(detail)
        self.fate: Literal["caption unreadable", "caption too long"] = fate
        self.detail = detail


def read_caption(path: str, *, lines: bool = False) -> tuple[str | None, str]:
    """The caption in a text file with all white space made single spaces, None if blank; and a remark.

    With `lines`, that of each line that is not blank, joined by LINE.

    UTF-8 and UTF-16 with BOM are read, then Windows-1252, of which Latin-1's letters are a part.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise _CaptionFault("caption unreadable", "is no regular file: write a text file in its place")
        with open(path, "rb") as file:
            raw = file.read(CAPTION_BYTES + 1)
    except OSError as error:
        detail = f"cannot be read ({error.strerror}): check its rights"
        raise _CaptionFault("caption unreadable", detail) from error
    if len(raw) > CAPTION_BYTES:
        raise _CaptionFault("caption too long", f"is over {CAPTION_BYTES:,} bytes: is it the right file?")
    text, remark = _decode(raw)
    if CONTROLS.intersection(text):
        raise _CaptionFault("caption unreadable", "holds NUL or control characters: save it as UTF-8 text")
    captions = [" ".join(part.split()) for part in (text.splitlines() if lines else [text])]
    caption = LINE.join(filter(None, captions))
    longest = max(map(len, captions), default=0)
    if longest > CAPTION_CHARACTERS:
        detail = f"has {longest:,} characters: shorten it to {CAPTION_CHARACTERS:,} at most"
        raise _CaptionFault("caption too long", detail)
    return (caption, remark) if caption else (None, "empty caption: trained without text")


def _decode(raw: bytes) -> tuple[str, str]:
    try:
        if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            return raw.decode("utf-16"), "caption read as UTF-16"
        try:
            return raw.decode("utf-8-sig"), ""
        except UnicodeDecodeError:
            return raw.decode("cp1252"), "caption is not UTF-8, read as Latin-1 (Windows-1252)"
    except UnicodeDecodeError as error:
        raise _CaptionFault("caption unreadable", "is no text: save it as plain UTF-8 text") from error


def _hash64(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
