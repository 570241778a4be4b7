"""The clips of a folder as one table, whose order nothing but their content and captions can change."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.data.audio import AudioFacts
from trainer.data.audio_facts import Stamp, inspect_all, stamp_of
from trainer.data.audio_fault import AudioFault
from trainer.data.caption_settings import CaptionSettings
from trainer.data.caption_sources import Caption, CaptionReader
from trainer.data.excerpt import Excerpt
from trainer.data.fates import Fate, display, reasons
from trainer.data.folder_walk import Found, MetadataFile, Sound, walk
from trainer.data.garbage_collection import put_off
from trainer.data.inventory import InspectedFile, ScannedFolder, UnusableDataError
from trainer.data.melody_files import (
    MelodyFile,
    fate_of_clip,
    inspected_melodies,
    melody_file,
    remark_on_length,
    remark_on_name,
    with_faults,
)
from trainer.data.stand_ins import open_at
from trainer.data.table_scan import TableRow, Tables, TableSettings, is_table, scan_tables
from trainer.data.treatment import AS_IT_IS, Treatment
from trainer.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

ALL_TABLES = TableSettings()
Columns = Mapping[str, Sequence[Any]]  # a table: columns of equal length by name
# Columns of the table of clips; types as datasets and Arrow name them.
TYPES = {
    "path": "string", "path_bytes": "binary", "size_bytes": "int64", "caption": "string", "seconds": "float64",
    "sample_rate_hz": "int32", "channels": "int32", "content": "string", "caption_source": "string",
    "caption_fields": "string", "first_frame": "int64", "frames": "int64", "gain": "float64", "sound": "string",
    "melody_path_bytes": "binary", "melody_content": "string", "melody_size_bytes": "int64",
}


PATHS = ("path_bytes", "melody_path_bytes")  # which lead to a file on this machine
PLAIN = CaptionSettings()


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The clips of a folder, and the fates of all its files in the order of their names.

    `columns` has a row for each clip to train on:

    path            string, as `display` shows it, relative to the folder
    path_bytes      binary, where the sound lies (trainer/data/places.py): os.fsencode of the absolute path, which may
                    be no UTF-8; or a row of a table
    size_bytes      int64, of the file, or of the table
    caption         string, or null for a clip that is trained without text
    seconds         float64, of what is trained on
    sample_rate_hz  int32
    channels        int32
    content         string, the hex blake2b-128 of the file's bytes
    caption_source  string, what the caption is from: "ballad.txt", "metadata.csv line 3"; "" where none was read
    caption_fields  string, what is merged into the caption, as music_fields.as_text writes it; "" for nothing
    first_frame, frames, gain  int64, int64, float64: the Excerpt of the file that is encoded, at the file's rate
    sound           string, the hex blake2b-128 of the decoded samples, by which equals are found (AudioFacts.sound)
    melody_path_bytes, melody_content, melody_size_bytes  binary, string, int64: the same of the file that is the clip's
                    melody; b"", "" and 0 where there is none, and the clip itself is its melody

    Rows are sorted by (content, caption, caption_fields, melody_content), null first. No file's name, no folder and no
    order in which a disk lists its files changes that order, on which the numbers of a run depend.
    """

    columns: Columns
    fates: tuple[Fate, ...]
    inspected: tuple[InspectedFile, ...] = ()  # of the process that scanned; a table of clips has none

    @cached_property
    def clips(self) -> Dataset:
        """The same table as a `datasets.Dataset`."""
        from datasets import Dataset, Features, Value  # up to a second, with pandas; a run needs the columns alone

        return Dataset.from_dict(dict(self.columns), Features({name: Value(kind) for name, kind in TYPES.items()}))


def scan(
    folder: Path, *, min_seconds: float, facts_folder: Path, rehash: bool = False, show_progress: bool = True,
    captions: CaptionSettings = PLAIN, treatment: Treatment = AS_IT_IS, tables: TableSettings = ALL_TABLES,
    channels: int = 1,
) -> Manifest:
    """What `look` finds. Raises UnusableDataError if there is no clip to train on."""
    found = look(
        folder, min_seconds=min_seconds, facts_folder=facts_folder, rehash=rehash, show_progress=show_progress,
        captions=captions, treatment=treatment, tables=tables, channels=channels,
    )
    if not found.columns["path"]:
        root = os.path.abspath(folder)
        raise UnusableDataError(
            f"the dataset folder {display(root)} holds no clip that can be used:\n{reasons(found.fates)}",
            [ScannedFolder(root=root, fates=found.fates, inspected=found.inspected)],
        )
    return found


def look(
    folder: Path, *, min_seconds: float, facts_folder: Path, rehash: bool = False, show_progress: bool = True,
    captions: CaptionSettings = PLAIN, treatment: Treatment = AS_IT_IS, tables: TableSettings = ALL_TABLES,
    channels: int = 1,
) -> Manifest:
    """Every sound file below `folder` and every row of the Parquet and Arrow files there, each with its caption, and
    the fate of each file and row. `folder` may also be one such file.

    captions       where captions come from; those of several lines stand joined by LINE
    tables         which rows and columns of tables are used
    facts_folder   where the facts of inspected files are kept: a file of unchanged size and modification time is not
                   read again, unless `rehash`. Those of a data set that was read in parts lie in `folder`
    treatment      what is done to each sound before it is encoded; `min_seconds` holds for what it leaves
    channels       of the model: some sounds are silent in mono and not in stereo

    Raises DataError for what is no folder, StorageError if the facts cannot be written, ConfigError where the tables do
    not have what `tables` names. No single file makes it fail.
    """
    root = os.path.abspath(folder)
    check_folder(root)
    of_tables = scan_tables(root, tables, with_fields=captions.merge.on)
    found, beside_rows = _files(root, of_tables, tables)
    reader = CaptionReader(root, found, captions)
    candidates, fates = _with_captions(root, (*of_tables.items, *found), reader, beside_rows)
    fates += reader.fates()
    candidates.sort(key=lambda candidate: os.fsencode(candidate.name))
    of_melodies = [candidate.melody for candidate in candidates if candidate.melody]
    sounds: list[_Candidate | MelodyFile] = [*candidates, *of_melodies]
    paths = [one.path for one in sounds]
    if stand_ins := open_at(root):  # of a data set whose sounds are not here
        known = stand_ins.facts_of(paths, rehash=rehash)
    else:
        seen = {one.path: one.stamp for one in sounds if one.stamp}
        known = inspect_all(
            paths, facts_folder, rehash=rehash, show_progress=show_progress, seen=seen, channels=channels
        )
    heard_in_mono = {one.path for one in of_melodies}
    learnt = {
        path: one if isinstance(one, AudioFault) else one.heard(1 if path in heard_in_mono else channels)
        for path, one in known.items()
    }
    clips, verdicts = _judge(candidates, learnt, min_seconds, treatment)
    fates = [*with_faults(fates, of_melodies, learnt), *verdicts]
    fates.sort(key=lambda fate: fate.path)
    inspected = (*_inspected(candidates, learnt), *inspected_melodies(of_melodies, learnt))
    return Manifest(columns=_columns(clips), fates=tuple(fates), inspected=inspected)


@dataclass(frozen=True, kw_only=True)
class _Candidate:
    """A regular sound file, or a row of a table, whose caption, or its absence, is in order.

    path   the reference to its sound (trainer/data/places.py), by os.fsdecode: of a file its absolute path
    stamp  size and modification time of a file; of a row None
    melody  the file that is its melody; None where there is none
    """

    name: str
    path: str
    size_bytes: int
    caption: Caption
    stamp: Stamp | None = None
    melody: MelodyFile | None = None


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
                        "give a folder of music that you may read") from error


def _files(root: str, of_tables: Tables, settings: TableSettings) -> tuple[list[Found], dict[str, Sound]]:
    """What is below `root` besides its tables. A sound that a row names, without a .txt of its own, is that row: it is
    among the second, by its path."""
    if is_table(root):
        return [], {}
    tables, used = {display(name) for name in of_tables.names}, settings.files
    rows = {item.reference for item in of_tables.items if isinstance(item, TableRow)}
    found: list[Found] = []
    of_rows: dict[str, Sound] = {}
    for item in walk(root):
        name = item.path if isinstance(item, Fate) else item.name
        is_table_here = isinstance(item, Fate) and name in tables
        if isinstance(item, Sound) and used is not None and item.melody_name not in used:
            item = replace(item, melody_name="")  # another part of a data set that is read in parts, or another split
        if isinstance(item, Sound) and not item.caption_name and (path := os.path.join(root, name)) in rows:
            of_rows[path] = item
        elif not is_table_here and (used is None or name in used):
            found.append(item)
    return found, of_rows


@put_off()
def _with_captions(
    root: str, found: Iterable[Found | TableRow], reader: CaptionReader, beside_rows: Mapping[str, Sound]
) -> tuple[list[_Candidate], list[Fate]]:
    """The sounds that have a caption, or may do without, and the fate of every other file."""
    fates: list[Fate] = []
    candidates: list[_Candidate] = []
    for item in found:
        if isinstance(item, MetadataFile):
            continue  # its fate depends on which sounds ask for it
        judged: _Candidate | Fate
        match item:
            case Sound():
                judged = _candidate(root, item, reader)
            case TableRow():
                judged = _row_candidate(root, item, reader, beside_rows.get(item.reference))
            case _:
                judged = item
        if isinstance(judged, Fate):
            fates.append(judged)
        else:
            candidates.append(judged)
    return candidates, fates


def _row_candidate(root: str, row: TableRow, reader: CaptionReader, sound: Sound | None) -> _Candidate | Fate:
    """The row as a candidate, if its caption is in order; else its fate. `sound` is the file that it names, if any."""
    caption = reader.caption_of_row(row)
    if isinstance(caption, Fate):
        return caption
    if sound is not None and sound.melody_elsewhere:
        return Fate(path=display(row.name), fate="melody unusable", detail=sound.melody_elsewhere)
    melody = None if sound is None else melody_file(root, sound.melody_name)
    return _Candidate(name=row.name, path=row.reference, size_bytes=row.size_bytes, caption=caption, melody=melody)


def _candidate(root: str, sound: Sound, reader: CaptionReader) -> _Candidate | Fate:
    """The sound as a candidate, if it is a regular file whose caption is in order; else its fate. No sound is read."""
    shown, path = display(sound.name), os.path.join(root, sound.name)
    try:
        status = os.stat(path)
    except OSError as error:
        advice = "run git annex get" if _is_annexed(path) else "check the link or its rights"
        return Fate(path=shown, fate="unreadable", detail=f"{error.strerror}: {advice}")
    if not stat.S_ISREG(status.st_mode):
        return Fate(path=shown, fate="not a file", detail="a pipe or device: put a sound file in its place")
    caption = reader.caption_of(sound)
    if isinstance(caption, Fate):
        return caption.with_remark(remark_on_name(sound.name))
    if sound.melody_elsewhere:
        return Fate(path=shown, fate="melody unusable", detail=sound.melody_elsewhere)
    return _Candidate(
        name=sound.name, path=path, size_bytes=status.st_size, caption=caption, stamp=stamp_of(status),
        melody=melody_file(root, sound.melody_name),
    )


def _is_annexed(path: str) -> bool:
    """Whether the file is a link into the store of git-annex, which has not fetched what it leads to."""
    return os.path.islink(path) and "/annex/objects/" in os.readlink(path)


@dataclass(frozen=True, kw_only=True)
class _Clip:
    candidate: _Candidate
    facts: AudioFacts
    excerpt: Excerpt
    treated: str  # what was done to the sound, for the report; "" for nothing
    melody: AudioFacts | None

    @property
    def equal(self) -> tuple[str, str | None, str, str]:
        """Clips for which this is equal are one: the samples, the caption and its fields, the melody's content."""
        return self.facts.sound, self.candidate.caption.text, self.candidate.caption.fields, self.melody_content

    @property
    def melody_content(self) -> str:
        return "" if self.melody is None else self.melody.content

    @property
    def seconds(self) -> float:
        return self.excerpt.frames / self.facts.sample_rate_hz


@put_off()
def _judge(
    candidates: Iterable[_Candidate], learnt: Mapping[str, AudioFacts | AudioFault], min_seconds: float,
    treatment: Treatment,
) -> tuple[list[_Clip], list[Fate]]:
    """The clips to train on, in the order given, and every candidate's fate."""
    judged: list[tuple[_Candidate, Fate | _Clip]] = []
    clips: dict[tuple[str, str | None, str, str], _Clip] = {}
    for candidate in candidates:
        shown, facts = display(candidate.name), learnt[candidate.path]
        if isinstance(facts, AudioFault):
            judged.append((candidate, Fate(path=shown, fate=facts.fate, detail=facts.detail)))
            continue
        melody = None if candidate.melody is None else learnt[candidate.melody.path]
        if candidate.melody is not None and isinstance(melody, AudioFault):
            judged.append((candidate, fate_of_clip(shown, candidate.melody, melody)))
            continue
        assert not isinstance(melody, AudioFault)
        excerpt, treated = treatment.excerpt_of(facts)
        clip = _Clip(candidate=candidate, facts=facts, excerpt=excerpt, treated=treated, melody=melody)
        if clip.seconds < min_seconds:
            detail = f"{_length(clip)}, under the {min_seconds:g} s of --min_seconds: use a longer take"
            judged.append((candidate, Fate(path=shown, fate="too short", detail=detail)))
            continue
        judged.append((candidate, clip))
        first = clips.setdefault(clip.equal, clip)
        # By content, so that names and folders do not decide whose codes are used. Of files with equal content the
        # first by name is.
        if facts.content < first.facts.content:
            clips[clip.equal] = clip
    fates = [said if isinstance(said, Fate) else _fate_of(said, clips[said.equal]) for _, said in judged]
    return list(clips.values()), fates


def _fate_of(clip: _Clip, used: _Clip) -> Fate:
    """The fate of a clip of whose sound and caption `used` is the clip that is trained on."""
    shown, other = display(clip.candidate.name), display(used.candidate.name)
    if clip is used:
        of_melody = remark_on_length(clip.candidate.melody, clip.melody, clip.facts)
        if clip.candidate.stamp:
            of_melody = of_melody or remark_on_name(clip.candidate.name)
        remarks = filter(None, (clip.facts.remark, clip.treated, clip.candidate.caption.remark, of_melody))
        return Fate(path=shown, fate="used", detail="; ".join(remarks))
    differ = clip.facts.content != used.facts.content
    formats = f" ({clip.facts.format}, and that is {used.facts.format}, of equal samples)" if differ else ""
    detail = f"same sound and caption as {other}, which is used: remove one{formats}"
    return Fate(path=shown, fate="duplicate", detail=detail)


def _length(clip: _Clip) -> str:
    left = f"{clip.seconds:.2f} s"
    whole = clip.facts.seconds
    return left if clip.seconds == whole else f"{left} of {whole:.2f} s are left without silence (--trim_silence)"


@put_off()
def _inspected(
    candidates: Iterable[_Candidate], learnt: Mapping[str, AudioFacts | AudioFault]
) -> tuple[InspectedFile, ...]:
    return tuple(
        InspectedFile(
            path=display(one.name), reference=os.fsencode(one.path), caption=one.caption.text,
            caption_source=one.caption.source, caption_fields=one.caption.fields, facts=facts,
            melody="" if one.melody is None else display(one.melody.name),
        )
        for one in candidates
        if isinstance(facts := learnt[one.path], AudioFacts)
    )


@put_off()
def _columns(clips: Iterable[_Clip]) -> Columns:
    ordered = sorted(clips, key=lambda clip: (clip.facts.content, *clip.candidate.caption.key, clip.melody_content))
    melodies = [clip.candidate.melody for clip in ordered]
    return {
        "path": [display(clip.candidate.name) for clip in ordered],
        "path_bytes": [os.fsencode(clip.candidate.path) for clip in ordered],
        "size_bytes": [clip.candidate.size_bytes for clip in ordered],
        "caption": [clip.candidate.caption.text for clip in ordered],
        "seconds": [clip.seconds for clip in ordered],
        "sample_rate_hz": [clip.facts.sample_rate_hz for clip in ordered],
        "channels": [clip.facts.channels for clip in ordered],
        "content": [clip.facts.content for clip in ordered],
        "caption_source": [clip.candidate.caption.source for clip in ordered],
        "caption_fields": [clip.candidate.caption.fields for clip in ordered],
        "first_frame": [clip.excerpt.first_frame for clip in ordered],
        "frames": [clip.excerpt.frames for clip in ordered],
        "gain": [clip.excerpt.gain for clip in ordered],
        "sound": [clip.facts.sound for clip in ordered],
        "melody_path_bytes": [b"" if one is None else os.fsencode(one.path) for one in melodies],
        "melody_content": [clip.melody_content for clip in ordered],
        "melody_size_bytes": [0 if one is None else one.size_bytes for one in melodies],
    }
