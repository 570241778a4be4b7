"""The clips of a folder as one table, whose order nothing but their content and captions can change."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trainer.data.audio import AudioFacts
from trainer.data.audio_facts import inspect_all
from trainer.data.audio_fault import AudioFault
from trainer.data.caption_files import CaptionFault, caption_of_text, read_caption
from trainer.data.fates import Fate, display, summary
from trainer.data.folder_walk import Sound, stem, walk
from trainer.data.table_scan import TableRow, TableSettings, is_table, scan_tables
from trainer.errors import ConfigError, DataError

if TYPE_CHECKING:
    from datasets import Dataset

ALL_TABLES = TableSettings()
Columns = Mapping[str, Sequence[Any]]  # a table: columns of equal length by name
# Columns of the table of clips; types as datasets and Arrow name them.
TYPES = {
    "path": "string", "path_bytes": "binary", "size_bytes": "int64", "caption": "string", "seconds": "float64",
    "sample_rate_hz": "int32", "channels": "int32", "content": "string",
}


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The clips of a folder, and the fates of all its files in the order of their names.

    `columns` has a row for each clip to train on:

    path            string, as `display` shows it, relative to the folder
    path_bytes      binary, where the sound lies (trainer/data/places.py): os.fsencode of the absolute path, which may
                    be no UTF-8; or a row of a table
    size_bytes      int64, of the file, or of the table
    caption         string, or null for a clip that is trained without text
    seconds         float64
    sample_rate_hz  int32
    channels        int32
    content         string, the hex blake2b-128 of the file's bytes

    Rows are sorted by (content, caption), null first. No file's name, no folder and no order in which a disk lists its
    files changes that order, on which the numbers of a run depend.
    """

    columns: Columns
    fates: tuple[Fate, ...]

    @cached_property
    def clips(self) -> Dataset:
        """The same table as a `datasets.Dataset`."""
        from datasets import Dataset, Features, Value  # up to a second, with pandas; a run needs the columns alone

        return Dataset.from_dict(dict(self.columns), Features({name: Value(kind) for name, kind in TYPES.items()}))


def scan(
    folder: Path, *, no_label: bool, min_seconds: float, facts_folder: Path, rehash: bool = False,
    show_progress: bool = True, caption_lines: bool = False, tables: TableSettings = ALL_TABLES,
) -> Manifest:
    """Every .wav file below `folder` with the .txt file of the same name beside it, every row of the Parquet and Arrow
    files there, and the fate of each. `folder` may also be one such file.

    no_label       no caption is read or used, whether there is one or not: all clips have caption null
    caption_lines  each line of a .txt file is a caption of its own; they stand joined by LINE
    tables         which rows and columns of tables are used
    facts_folder   where the facts of inspected files are kept: a file of unchanged size and modification time is not
                   read again, unless `rehash`

    Raises DataError if there is no clip to train on, StorageError if the facts cannot be written, ConfigError where
    the tables do not have what `tables` names. No single file makes it fail.
    """
    root = os.path.abspath(folder)
    check_folder(root)
    fates: list[Fate] = []
    candidates: list[_Candidate] = []
    for item in _items(root, tables):
        judged: _Candidate | Fate
        match item:
            case Sound():
                judged = _candidate(root, item, no_label, caption_lines)
            case TableRow():
                judged = _row_candidate(item, no_label, caption_lines)
            case _:
                judged = item
        if isinstance(judged, Fate):
            fates.append(judged)
        else:
            candidates.append(judged)
    candidates.sort(key=lambda candidate: os.fsencode(candidate.name))
    learnt = inspect_all(
        [candidate.path for candidate in candidates], facts_folder, rehash=rehash, show_progress=show_progress
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


@dataclass(frozen=True, kw_only=True)
class _Candidate:
    """A regular .wav file, or a row of a table, whose caption, or its absence, is in order.

    path  the reference to its sound (trainer/data/places.py), by os.fsdecode: of a file its absolute path
    """

    name: str
    path: str
    size_bytes: int
    caption: str | None
    remark: str


def check_folder(root: str) -> None:
    """Raise DataError where `root` is neither a table nor a folder that can be listed."""
    try:
        if is_table(root):
            return
        if not stat.S_ISDIR(os.stat(root).st_mode):
            raise DataError(f"the dataset folder {display(root)} is a file: give the folder it is in")
        os.scandir(root).close()
    except OSError as error:
        raise DataError(f"the dataset folder {display(root)} cannot be opened ({error.strerror}): "
                        "give a folder of .wav files that you may read") from error


def _items(root: str, tables: TableSettings) -> Iterator[Sound | TableRow | Fate]:
    """All that is below `root`: the rows of tables, in their order, and all other files."""
    found = scan_tables(root, tables)
    yield from found.items
    if is_table(root):
        return
    shown, used = {display(name) for name in found.names}, tables.files
    for item in walk(root):
        is_table_here = isinstance(item, Fate) and item.path in shown
        if not is_table_here and (used is None or (item.name if isinstance(item, Sound) else item.path) in used):
            yield item


def _row_candidate(row: TableRow, no_label: bool, caption_lines: bool) -> _Candidate | Fate:
    """The row as a candidate, if its caption is in order; else its fate."""
    caption, remark = None, ""
    if no_label:
        remark = "" if row.caption is None else "caption not used under --no_label 1"
    elif row.caption is None:
        return Fate(path=display(row.name), fate="no caption", detail=row.why_none)
    else:
        try:
            caption, remark = caption_of_text(row.caption, lines=caption_lines)
        except CaptionFault as fault:
            return Fate(path=display(row.name), fate=fault.fate, detail=f"its caption {fault.detail}")
    return _Candidate(name=row.name, path=row.reference, size_bytes=row.size_bytes, caption=caption, remark=remark)


def _candidate(root: str, sound: Sound, no_label: bool, caption_lines: bool) -> _Candidate | Fate:
    """The sound as a candidate, if it is a regular file whose caption is in order; else its fate. No sound is read."""
    shown, path = display(sound.name), os.path.join(root, sound.name)
    try:
        status = os.stat(path)
    except OSError as error:
        advice = "run git annex get" if _is_annexed(path) else "check the link or its rights"
        return Fate(path=shown, fate="unreadable", detail=f"{error.strerror}: {advice}")
    if not stat.S_ISREG(status.st_mode):
        return Fate(path=shown, fate="not a file", detail="a pipe or device: put a sound file in its place")
    caption, remark = None, ""
    if no_label:
        remark = "caption not used under --no_label 1" if sound.caption_name else ""
    elif sound.elsewhere:
        return Fate(path=shown, fate="caption unreadable", detail=sound.elsewhere)
    elif not sound.caption_name:
        expected = display(stem(os.path.basename(sound.name)) + ".txt")
        detail = f"write {expected} beside it, or train without text: --no_label 1"
        return Fate(path=shown, fate="no caption", detail=detail)
    else:
        try:
            caption, remark = read_caption(os.path.join(root, sound.caption_name), lines=caption_lines)
        except CaptionFault as fault:
            return Fate(path=shown, fate=fault.fate, detail=f"{display(sound.caption_name)} {fault.detail}")
    return _Candidate(name=sound.name, path=path, size_bytes=status.st_size, caption=caption, remark=remark)


def _is_annexed(path: str) -> bool:
    """Whether the file is a link into the store of git-annex, which has not fetched what it leads to."""
    return os.path.islink(path) and "/annex/objects/" in os.readlink(path)


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
    for candidate in candidates:
        shown, facts = display(candidate.name), learnt[candidate.path]
        if isinstance(facts, AudioFault):
            fates.append(Fate(path=shown, fate=facts.fate, detail=facts.detail))
            continue
        if facts.seconds < min_seconds:
            detail = f"{facts.seconds:.2f} s, under the {min_seconds:g} s of --min_seconds: use a longer take"
            fates.append(Fate(path=shown, fate="too short", detail=detail))
            continue
        clip = _Clip(candidate=candidate, facts=facts)
        first = clips.setdefault((facts.content, candidate.caption), clip)
        if first is clip:
            remarks = filter(None, (facts.remark, candidate.remark))
            fates.append(Fate(path=shown, fate="used", detail="; ".join(remarks)))
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


def _hash64(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
