"""Which row of which metadata file describes a sound: the nearest folder's, from the sound's own up to the data set's.

A metadata file is read once, when the first sound asks for it, and not at all where none does.
"""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from trainer.data.caption_files import CaptionFault
from trainer.data.fates import Fate, FateKind, display
from trainer.data.folder_walk import MetadataFile, loose
from trainer.data.metadata_files import NoMetadataError, Row, Table, read_table


@dataclass(frozen=True, kw_only=True)
class Found:
    """The row of a sound; `place` names it for a person: "sub/metadata.csv line 3"."""

    row: Row
    place: str


@dataclass(kw_only=True)
class _Index:
    """A metadata file that was read: its rows by the sound's name below the root.

    fault     why it could not be read, or ""
    lacks     what is said of a sound that has no row in it; "" for a file that nobody takes for captions
    """

    rows: dict[str, Found] = field(default_factory=dict)
    fault: str = ""
    lacks: str = ""


class MetadataIndex:
    """The metadata files of one data folder."""

    def __init__(self, root: str, files: Iterable[MetadataFile], sounds: Sequence[str], column: str | None):
        self._root, self._column = root, column
        self._files: dict[str, list[MetadataFile]] = {}
        for file in files:
            self._files.setdefault(posixpath.dirname(file.name), []).append(file)
        self._sounds = frozenset(sounds)
        # Names as macOS and Windows compare them; where two sounds have the same, only the exact name will do.
        self._loose: dict[str, str] = {}
        for name in sorted(sounds, reverse=True):
            self._loose[loose(name)] = name
        self._by_file_name: dict[str, list[str]] | None = None  # made where a row names what is not there
        self._read: dict[str, _Index] = {}
        self._fates: list[Fate] = []

    def row_of(self, name: str) -> Found | None:
        """The row of the sound `name`, of the nearest file that has one. Raises CaptionFault where a file that may have
        had it cannot be read: another source's caption would then be used in silence."""
        for folder in self._folders(name):
            indices = [(file, self._index(file)) for file in self._files[folder]]
            for _, index in indices:
                if name in index.rows:
                    return index.rows[name]
            for file, index in indices:
                if index.fault:
                    raise CaptionFault("caption unreadable", f"{display(file.name)} {index.fault}")
        return None

    def lacking(self, name: str) -> str:
        """What the nearest metadata file lacks, as in "metadata.csv has no caption for it"; "" for none."""
        files = [file for folder in self._folders(name) for file in self._files[folder]]
        return next((f"{display(file.name)} {lacks}" for file in files if (lacks := self._index(file).lacks)), "")

    def fates(self) -> list[Fate]:
        """What became of the metadata files, and of rows that are no caption of a sound."""
        files = [file for of_folder in self._files.values() for file in of_folder]
        unread = [file for file in files if file.name not in self._read]
        return [*self._fates, *(Fate(path=display(file.name), fate="ignored", detail=file.unread) for file in unread)]

    def _folders(self, name: str) -> list[str]:
        """The folders with metadata files, from the sound's own up."""
        folders = [posixpath.dirname(name)]
        while folders[-1]:
            folders.append(posixpath.dirname(folders[-1]))
        return [folder for folder in folders if folder in self._files]

    def _index(self, file: MetadataFile) -> _Index:
        if file.name not in self._read:
            self._read[file.name] = self._indexed(file)
        return self._read[file.name]

    def _indexed(self, file: MetadataFile) -> _Index:
        shown = display(file.name)
        try:
            if file.elsewhere:
                raise CaptionFault("caption unreadable", f"is {file.elsewhere}")
            table = read_table(os.path.join(self._root, file.name), self._column)
        except NoMetadataError as error:
            is_meant = file.is_metadata or error.has_captions
            self._fates.append(Fate(path=shown, fate="ignored", detail=str(error) if is_meant else file.unread))
            return _Index(lacks=error.reason if is_meant else "")
        except CaptionFault as fault:
            if not file.is_metadata:
                self._fates.append(Fate(path=shown, fate="ignored", detail=file.unread))
                return _Index()
            detail = f"{fault.detail}; no caption of its files is looked for elsewhere, unless --captions leaves it out"
            self._fates.append(Fate(path=shown, fate="caption unreadable", detail=detail))
            return _Index(fault=fault.detail)
        return self._rows(file, table)

    def _rows(self, file: MetadataFile, table: Table) -> _Index:
        shown, index = display(file.name), _Index(lacks="has no caption for it")
        for place, why in table.faults:
            self._fates.append(Fate(path=f"{shown} {place}", fate="caption unreadable", detail=why))
        for row in table.rows:
            place = f"{shown} {row.place}"
            found = Found(row=row, place=place)
            for file_name in row.file_names:
                if fate := self._put(index, file, found, file_name):
                    self._fates.append(Fate(path=place, fate=fate[0], detail=fate[1]))
        return index

    def _put(self, index: _Index, file: MetadataFile, found: Found, file_name: str) -> tuple[FateKind, str] | None:
        """Enter the row for one of the sounds that it names; else the fate and detail of the row."""
        try:
            shown = display(file_name)
        except UnicodeEncodeError:  # halves of characters, as JSON may hold them
            return "ignored", "its file_name is no text that a file can have as its name"
        folder = posixpath.dirname(file.name)
        candidates = [file_name, file_name.replace("\\", "/")] if "\\" in file_name else [file_name]
        if _leads_out(candidates[-1]):
            return "ignored", f"{shown} leads out of the folder: name files in it, as in sub/song.wav"
        names = [posixpath.normpath(posixpath.join(folder, one)) for one in candidates]
        name = next((one for one in names if one in self._sounds), None) or self._loose.get(loose(names[-1]))
        if name is None:
            if any(_is_there(os.path.join(self._root, one)) for one in names):
                return None  # it has a fate of its own
            there = self._below(folder, names[-1])
            advice = f"write {there}, which is there" if there else "add the file, or remove the row"
            return "no audio", f"names {shown}, which is not there: {advice}"
        first = index.rows.setdefault(name, found)
        if first is not found:
            return "ignored", f"names {shown} again: {first.place} counts"
        return None

    def _below(self, folder: str, name: str) -> str:
        """The one sound below `folder` that has the file name of `name`, relative to it; "" for none or several."""
        if self._by_file_name is None:
            self._by_file_name = {}
            for sound in sorted(self._sounds):
                self._by_file_name.setdefault(loose(posixpath.basename(sound)), []).append(sound)
        found = self._by_file_name.get(loose(posixpath.basename(name)), [])
        prefix = f"{folder}/" if folder else ""
        below = [sound.removeprefix(prefix) for sound in found if sound.startswith(prefix)]
        return display(below[0]) if len(below) == 1 else ""


def _leads_out(name: str) -> bool:
    return name.startswith("/") or bool(re.match(r"[A-Za-z]:", name)) or ".." in name.split("/") or "\0" in name


def _is_there(path: str) -> bool:
    return os.path.lexists(path)
