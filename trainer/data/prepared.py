"""A prepared folder: a data set as codes, text states and a table of clips, which trains without its sound files.

    prepared.json          what is in it, and the size of every file; written last
    clips.parquet          the table of clips, which `datasets.load_dataset` opens
    codes/part-00000.arrow the codes of every distinct sound, as the cache keeps them
    text/part-00000.arrow  T5's states of every caption, as the cache keeps them
    melody/part-00000.arrow  the melody of every clip, where it was made for a melody model
    README.md              a data card

It is read where it lies, through memory maps, and nothing is ever written into it: a read-only disk will do. It knows
nothing of where it lies, so that it may be moved. `trainer.data.prepared_writing` makes it.
"""

from __future__ import annotations

import hashlib
import json
import shlex
import socket
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from trainer.data.arrow_store import KEY, Store
from trainer.data.fates import Fate, display
from trainer.data.manifest import TYPES, Columns, check_folder
from trainer.data.peers import Peers
from trainer.data.prepared_about import (
    CODES,
    FORMAT,
    MARKER,
    MELODY,
    TABLE,
    TEXT,
    VERSION,
    About,
    about_of,
    damaged,
)
from trainer.errors import ConfigError, DataError
from trainer.spec.caption_sources import SOURCES_IN_WORDS

# Columns of the table without which nothing can be trained. Others of the manifest are taken if they are there.
NEEDED = ("content", "caption", "seconds", "path")
# Flags that decided what was encoded, and those that decided the captions, by name: a run must have the same values.
# Those here hold for a folder that says nothing of a flag.
SOUND_FLAGS: Mapping[str, Any] = {"code_views": None, "trim_silence": False, "loudness": None}
CAPTION_FLAGS: Mapping[str, Any] = {
    **{"captions": SOURCES_IN_WORDS, "caption_column": None, "caption_template": None, "default_caption": None},
    **{"caption": None, "caption_lines": False, "merge_metadata": 0.0},
}
@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A prepared folder whose files are all there and have their sizes."""

    folder: Path
    about: About

    def check_flags(self, wanted: Mapping[str, Any]) -> None:
        """Raise ConfigError where a run with these values of flags, by name, needs what the folder lacks."""
        had = self.about.flags
        for name, off in (SOUND_FLAGS if wanted["no_label"] else {**SOUND_FLAGS, **CAPTION_FLAGS}).items():
            was = had.get(name, off)
            if wanted[name] != was:
                raise ConfigError(
                    f"--{name} {_typed(wanted[name])}: the prepared folder {display(self.folder)} lacks it, since it"
                    f" was made with --{name} {_typed(was)}: give that, or prepare the music again"
                )
        if had.get("no_label") and not wanted["no_label"]:
            raise ConfigError(
                f"the prepared folder {display(self.folder)} lacks captions, since it was made with --no_label 1: give"
                " that, or prepare the music again"
            )
        if wanted["min_seconds"] < had.get("min_seconds", 0.0):
            raise ConfigError(
                f"--min_seconds {wanted['min_seconds']:g}: the prepared folder {display(self.folder)} lacks clips that"
                f" short, since it was made with --min_seconds {had['min_seconds']:g}: give that, or prepare the music"
                " again"
            )

    def check_codec(self, codebooks: int, channels: int, codec: str, model_id: str) -> None:
        """Raise ConfigError where the model reads other codes than the folder holds."""
        if channels != self.about.channels:
            raise ConfigError(
                f"the prepared folder {display(self.folder)} holds codes of {_kind(self.about.channels)} sound,"
                f" {self.about.codebooks} codebooks, and this run of --model_id {model_id} trains a"
                f" {_kind(channels)} model of {codebooks}: prepare the music again with the --model_id and --stereo of"
                " this run, or train a model of that kind"
            )
        if codebooks != self.about.codebooks:
            raise ConfigError(
                f"the prepared folder {display(self.folder)} holds codes of {self.about.codebooks} codebooks, and"
                f" --model_id {model_id} reads {codebooks}: prepare the music again with this --model_id"
            )
        if codec != self.about.codec:
            raise ConfigError(
                f"the prepared folder {display(self.folder)} lacks codes of the EnCodec of --model_id {model_id}"
                f" ({codec}): it was made with --model_id {self.about.model_id} ({self.about.codec}). Use a model with"
                " that EnCodec, or prepare the music again with this --model_id"
            )

    def check_stems(self, wanted: str, model_id: str) -> None:
        """Raise ConfigError where the folder has no melodies, or other ones than --stems `wanted` asks for."""
        found = self.about.stems
        if not found:
            raise ConfigError(
                f"the prepared folder {display(self.folder)} lacks the melodies that --model_id {model_id} reads, since"
                f" it was made with --model_id {self.about.model_id}: prepare the music again with this --model_id"
            )
        kind = found.partition("-")[0]
        if wanted not in ("auto", kind):
            raise ConfigError(
                f"--stems {wanted}: the melodies of the prepared folder {display(self.folder)} were heard with --stems"
                f" {kind}: give that, or prepare the music again"
            )

    def clips(self, *, no_label: bool, min_seconds: float) -> tuple[Columns, tuple[Fate, ...]]:
        """The table of clips with the columns and in the order of Manifest, and the fate of every clip.

        Paths in bytes are empty: there is no sound file. With `no_label` clips of equal samples are one clip, and the
        same one as in a folder of sounds: that of the first content, by the first of its names. Raises DataError where
        the table is damaged, or no clip is left.
        """
        without = {"caption": None, "caption_fields": "", "caption_source": ""} if no_label else {}
        fates: list[Fate] = []
        kept: list[dict[str, Any]] = []
        named: dict[tuple[str, str | None, str, str], str] = {}
        for found in sorted(self._rows(), key=lambda row: (row["content"], row["path"].encode())):
            row = {**found, **without}
            # Folders that earlier versions made say nothing of samples.
            equal = row["sound"] or row["content"], row["caption"], row["caption_fields"], row["melody_content"]
            if row["seconds"] < min_seconds:
                detail = f"{row['seconds']:.2f} s, under the {min_seconds:g} s of --min_seconds"
                fates.append(Fate(path=row["path"], fate="too short", detail=detail))
            elif named.setdefault(equal, row["path"]) != row["path"]:
                detail = f"same sound and caption as {named[equal]}, which is used"
                fates.append(Fate(path=row["path"], fate="duplicate", detail=detail))
            else:
                kept.append(row)
                fates.append(Fate(path=row["path"], fate="used"))
        if not kept:
            raise DataError(f"the prepared folder {display(self.folder)} holds no clip of {min_seconds:g} s or more")
        kept.sort(key=_place)
        return {name: [row[name] for row in kept] for name in TYPES}, tuple(sorted(fates, key=lambda fate: fate.path))

    def codes(self, beside: Store) -> Store:
        """The codes; what is not in them is read from `beside`, and appended there."""
        return _Parts(self._paths(CODES), beside)

    def text(self, beside: Store) -> Store:
        """The same with the states of captions."""
        return _Parts(self._paths(TEXT), beside)

    def melodies(self, beside: Store) -> Store:
        """The same with the melodies of clips."""
        return _Parts(self._paths(MELODY), beside)

    def check_melodies(self, keys: Iterable[str], melodies: Store) -> None:
        """Raise DataError where `melodies` lacks some of these keys."""
        missing = set(keys) - melodies.keys()
        if missing:
            raise damaged(self.folder, f"{len(missing)} melodies of clips are not in {MELODY}/")

    def check_contents(self, contents: Iterable[str], codes: Store) -> None:
        """Raise DataError where `codes` lacks some of these contents."""
        missing = set(contents) - codes.keys()
        if missing:
            raise damaged(self.folder, f"codes of {len(missing)} clips are not in {CODES}/")

    def check_digests(self) -> None:
        """Read every file whole. Raises DataError where one is not what was written."""
        for name, digest in self.about.digests.items():
            if digest_of(self.folder / name) != digest:
                raise damaged(self.folder, f"{name} holds other bytes than were written")

    def _paths(self, kind: str) -> list[Path]:
        return [self.folder / name for name in sorted(self.about.files) if name.startswith(f"{kind}/")]

    def _rows(self) -> list[dict[str, Any]]:
        from pyarrow import parquet

        try:
            table = parquet.ParquetFile(self.folder / TABLE).read()  # not read_table, which imports pandas (pyarrow 26)
            table.validate(full=True)
            for name in (*NEEDED, *{"caption_fields", "sound", "melody_content"}.intersection(table.column_names)):
                if table.schema.field(name).type != pa.type_for_alias(TYPES[name]):
                    raise pa.ArrowInvalid(f"its column {name} is of type {table.schema.field(name).type}")
                if name != "caption" and table.column(name).null_count:
                    raise pa.ArrowInvalid(f"its column {name} has gaps")
            found = {name: table.column(name).to_pylist() for name in TYPES if name in table.column_names}
        except (OSError, KeyError, ValueError, pa.ArrowException) as error:
            raise damaged(self.folder, f"{TABLE} cannot be read ({error})") from error
        if len(found["content"]) != self.about.clips:
            raise damaged(self.folder, f"{TABLE} has {len(found['content'])} clips and not {self.about.clips}")
        absent: Columns = {name: [_nothing(name)] * self.about.clips for name in TYPES if name not in found}
        columns = {**absent, **found}
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


class _Parts(Store):
    """The parts at `paths`, which are only read, before those of `beside`, to whose folder rows are appended."""

    def __init__(self, paths: Sequence[Path], beside: Store):
        super().__init__(beside.folder, {field.name: field.type for field in beside.schema if field.name != KEY})
        self._paths, self._beside = paths, beside

    def _parts(self) -> list[pa.Table]:
        return [*map(self._prepared, self._paths), *self._beside._parts()]

    def _prepared(self, path: Path) -> pa.Table:
        folder = path.parent.parent
        try:
            part = pa.ipc.open_stream(pa.memory_map(str(path))).read_all()
            part.validate(full=True)  # offsets and keys; none of the binary values is read from the disk
        except (pa.ArrowException, OSError) as error:
            raise damaged(folder, f"{path.parent.name}/{path.name} cannot be read ({error})") from error
        if not part.schema.equals(self.schema):
            raise damaged(folder, f"{path.parent.name}/{path.name} has the columns {part.schema.names}")
        return part


def is_prepared(folder: Path) -> bool:
    """Whether a folder is, or was meant to be, a prepared one: one of marker, table and codes may be missing."""
    return [(folder / MARKER).is_file(), (folder / TABLE).is_file(), (folder / CODES).is_dir()].count(True) >= 2


def are_prepared(names: Iterable[str]) -> bool:
    """The same of files of these names, as a hub lists those of a repository."""
    there = set(names)
    return [MARKER in there, TABLE in there, any(name.startswith(f"{CODES}/") for name in there)].count(True) >= 2


def open_prepared(folder: Path) -> Prepared:
    """The prepared folder `folder`, all files of which are there. Raises DataError where it is damaged."""
    check_folder(str(folder))
    about = read_about(folder)
    for name, size in about.files.items():
        try:
            found = (folder / name).stat().st_size
        except OSError as error:
            raise damaged(folder, f"{name} cannot be opened ({error.strerror})") from error
        if found != size:
            raise damaged(folder, f"{name} has {found:,} bytes and not {size:,}")
    return Prepared(folder=folder, about=about)


def read_about(folder: Path) -> About:
    """What prepared.json says. Raises DataError where it cannot be read, or is of another version."""
    try:
        said = json.loads((folder / MARKER).read_bytes())
    except FileNotFoundError as error:
        raise damaged(folder, f"{MARKER} is missing, so that it was not written or copied to its end") from error
    except (OSError, ValueError, RecursionError) as error:
        raise damaged(folder, f"{MARKER} cannot be read ({error})") from error
    if not isinstance(said, dict) or said.get("format") != FORMAT:
        raise damaged(folder, f'{MARKER} does not say "format": "{FORMAT}"')
    if said.get("version") != VERSION:
        raise DataError(
            f"the prepared folder {display(folder)} is of version {said.get('version')!r}, and this program reads"
            f" {VERSION}: use the program that made it, or make it again with scripts/prepare_dataset.py"
        )
    return about_of(folder, said)


def find(folders: Iterable[Path], peers: Peers) -> dict[Path, Prepared]:
    """Those of the folders that are prepared, as the first process sees it, opened by every process for itself.

    Raises DataError where one is damaged, and where another machine does not have it.
    """
    folders = list(folders)
    peers.wait("prepared")
    # Where none is prepared, only the first process looks: a disk that many machines share is not asked by all of them.
    of_first = peers.gather([is_prepared(folder) for folder in folders] if peers.rank == 0 else None)[0]
    found = [folder for folder, first in zip(folders, of_first or (), strict=True) if first]
    if not found:
        return {}
    peers.wait("prepared elsewhere")
    for host, there in peers.gather((socket.gethostname(), [is_prepared(folder) for folder in found])):
        for folder, other in zip(found, there, strict=True):
            if not other:
                raise DataError(
                    f"the prepared folder {display(folder)} is not on {host}: every machine needs it there, since it"
                    " is read while training"
                )
    return {folder: open_prepared(folder) for folder in found}


def digest_of(path: Path) -> str:
    """The hex blake2b-128 of a file."""
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _kind(channels: int) -> str:
    return "mono" if channels == 1 else "stereo"


def _place(row: Mapping[str, Any]) -> tuple[str, str, str, str]:
    """By what the rows of Manifest are sorted."""
    return row["content"], row["caption"] or "", row["caption_fields"], row["melody_content"]


def _nothing(column: str) -> Any:
    """What stands in a column of the manifest that a table does not have."""
    return {"string": "", "binary": b""}.get(TYPES[column], 0)


def _typed(value: Any) -> str:
    """A flag's value as it is typed."""
    if isinstance(value, bool):
        return str(int(value))
    return "none" if value is None else shlex.quote(str(value))
