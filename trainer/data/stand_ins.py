"""A folder of files that stand in for those of a data set of the hub which was read in parts and is not on the disk.

Under the name of each file of the data set lies what a run needs of it without its sounds. Of a table, its texts and
the paths in its columns of sounds, with the same rows in the same groups. Of a sound file, an empty one. What may hold
captions is there as it is. What inspecting each sound found is kept beside them, by the name of its file, so that a
scan of the folder gives what a scan of the data set would, and opens no sound.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path

import pyarrow as pa

from trainer.atomic import replacing, write_whole
from trainer.data.arrow_store import storage_errors
from trainer.data.audio import AudioFacts
from trainer.data.audio_facts import VERSION, facts_of_json, is_known, json_of_facts
from trainer.data.audio_fault import AudioFault
from trainer.data.fates import display
from trainer.data.folder_walk import is_metadata
from trainer.data.places import SEPARATOR
from trainer.data.sound_kind import SOUND_SUFFIXES
from trainer.data.table_file import SUFFIXES, TableFile, is_sound, is_text, open_table
from trainer.errors import ConfigError, DataError

KEPT = ".stand-ins"  # the folder of what is known; hidden, so that no scan looks into it
FACTS = "facts-"
DAMAGED = b"this stands in for a table of the data set that is damaged"
NOT_HERE = "it was read in parts, and is not kept on this machine"


class StandIns:
    """The stand-ins in `folder`, which may be empty or missing at first."""

    def __init__(self, folder: Path):
        self.folder = Path(os.path.abspath(folder))
        self.kept = self.folder / KEPT
        self.start = os.path.join(os.fsencode(self.folder), b"")

    @cached_property
    def _records(self) -> dict[str, dict[str, AudioFacts | AudioFault]]:
        """What is known of the sounds of each file that was taken in, by its name: by the rest of their reference."""
        records: dict[str, dict[str, AudioFacts | AudioFault]] = {}
        for path in sorted(self.kept.glob(f"{FACTS}*.json")):
            try:
                said = json.loads(path.read_bytes())
                if said["version"] == VERSION:
                    records |= {
                        name: {rest: facts_of_json(facts) for rest, facts in sounds.items()}
                        for name, sounds in said["files"].items()
                    }
            except (OSError, ValueError, TypeError, KeyError, AttributeError):
                continue  # damaged: its files are read again
        return records

    def names(self) -> frozenset[str]:
        """The files that were taken in, and need not be read again for what is known of their sounds."""
        has_ffmpeg = importlib.util.find_spec("av") is not None
        return frozenset(
            name for name, sounds in self._records.items()
            if (self.folder / name).is_file()
            and not (has_ffmpeg and any(_needs_ffmpeg(facts) for facts in sounds.values()))
        )

    def lacks(self, reference: bytes, channels: int = 1) -> bool:
        """Whether a model of so many channels must know more of the sound at this reference, which leads to a file of
        the folder."""
        name, rest = self._key(reference)
        sounds = self._records.get(name, {})
        return rest not in sounds or not is_known(sounds[rest], channels)

    def facts_of(self, references: Iterable[str], *, rehash: bool) -> dict[str, AudioFacts | AudioFault]:
        """What `audio_facts.inspect_all` said of each sound when it was read.

        Raises DataError where it was not, ConfigError under `rehash`.
        """
        if rehash:
            raise ConfigError(REHASH)
        found = {}
        for reference in references:
            name, rest = self._key(os.fsencode(reference))
            facts = self._records.get(name, {}).get(rest)
            if facts is None:
                raise DataError(
                    f"{display(self.folder)} stands in for a data set of the hub whose sounds are not here, and {name}"
                    " was not read yet: give the name of the data set to --dataset"
                )
            found[reference] = facts
        return found

    def place(self, name: str, source: Path) -> None:
        """Make the file that stands in for `source`, of this name in the data set."""
        target = self.folder / name
        suffix = os.path.splitext(name)[1].lower()
        with storage_errors(self.folder, f"what stands in for {name} cannot be written"):
            target.parent.mkdir(parents=True, exist_ok=True)
            if suffix in SOUND_SUFFIXES:
                target.touch()
            elif is_table_name(name):
                _write_table(source, target)
            else:
                shutil.copyfile(source, target)

    def leading_to(self, places: Mapping[str, Path], reference: bytes) -> bytes:
        """The reference to the same sound where its file lies at the place that is given by its name."""
        name = self.name_of(reference)
        return os.fsencode(places[name]) + reference.removeprefix(self.start).removeprefix(os.fsencode(name))

    def keep(self, part: Sequence[str], facts: Mapping[bytes, AudioFacts | AudioFault]) -> None:
        """Remember these files as taken in, and what is known of their sounds, by reference into the folder."""
        files: dict[str, dict[str, AudioFacts | AudioFault]] = {name: {} for name in part}
        for reference, said in facts.items():
            name, rest = self._key(reference)
            files[name][rest] = said
        self._write(files)

    def keep_faults(self, faults: Mapping[bytes, AudioFault]) -> None:
        """Remember that these sounds, of which facts were kept, cannot be used."""
        files: dict[str, dict[str, AudioFacts | AudioFault]] = {}
        for reference, fault in faults.items():
            name, rest = self._key(reference)
            files.setdefault(name, dict(self._records[name]))[rest] = fault
        self._write(files)

    def _write(self, files: Mapping[str, Mapping[str, AudioFacts | AudioFault]]) -> None:
        as_json = {
            name: {rest: json_of_facts(said) for rest, said in sounds.items()} for name, sounds in files.items()
        }
        content = json.dumps({"version": VERSION, "files": as_json}).encode("ascii")
        with storage_errors(self.folder, "what is known of the sounds cannot be kept"):
            self.kept.mkdir(parents=True, exist_ok=True)
            number = sum(1 for _ in self.kept.glob(f"{FACTS}*.json"))
            write_whole(self.kept / f"{FACTS}{number:08d}.json", content)
        self._records.update({name: dict(sounds) for name, sounds in files.items()})

    def _key(self, reference: bytes) -> tuple[str, str]:
        """The file's name in the folder, and what follows it in the reference: row and column; "" for a sound file."""
        path, _, rest = reference.removeprefix(self.start).partition(SEPARATOR)
        return os.fsdecode(path), os.fsdecode(rest)

    def name_of(self, reference: bytes) -> str:
        """The name in the data set of the file to which a reference into the folder leads."""
        return self._key(reference)[0]


REHASH = (
    "--rehash 1 cannot be had of a data set of the hub that is read in parts, whose sounds are not kept: remove it. A"
    " commit of the hub does not change"
)


def open_at(root: str) -> StandIns | None:
    """The stand-ins in a folder, if that is what it holds."""
    return StandIns(Path(root)) if os.path.isdir(os.path.join(root, KEPT)) else None


def is_table_name(name: str) -> bool:
    """Whether a file of this name in a data set is a table of sounds."""
    return name.lower().endswith(SUFFIXES) and not is_metadata(name.rpartition("/")[2])


def _needs_ffmpeg(facts: AudioFacts | AudioFault) -> bool:
    return isinstance(facts, AudioFault) and facts.fate == "unsupported format"


def _write_table(source: Path, target: Path) -> None:
    """A Parquet file with the rows and columns of the table `source`, without what takes room."""
    import pyarrow.parquet as parquet

    try:
        table = open_table(os.fspath(source))
        unique = [field for field in table.schema if table.schema.names.count(field.name) == 1]
        kinds = {field.name: _kept_kind(field.type) for field in unique}
        fields = [pa.field(name, kinds.get(name, pa.null())) for name in table.schema.names]
        schema = pa.schema(fields, metadata=table.schema.metadata)
        with replacing(target) as partial, parquet.ParquetWriter(partial, schema) as writer:
            for group, rows in enumerate(table.group_rows):
                columns = [_kept_column(table, group, rows, field) for field in fields]
                # In groups as they were: of a group without bytes, the rows name files.
                writer.write_table(pa.Table.from_arrays(columns, schema=schema), row_group_size=max(1, rows))
    except (pa.ArrowException, UnicodeDecodeError) as error:
        _write_damaged(target, error)
    except OSError as error:
        if error.errno is not None:
            raise
        _write_damaged(target, error)  # pyarrow's own, of a damaged file


def _write_damaged(target: Path, error: Exception) -> None:
    """A file that is no table either, so that it has the fate of one that is damaged."""
    write_whole(target, DAMAGED + f": {error}".encode("utf-8", "backslashreplace"))


def _kept_kind(kind: pa.DataType) -> pa.DataType:
    """The type of the column that stands in for one of this type: another one has nothing but its name."""
    if is_text(kind):
        return pa.string()
    if pa.types.is_struct(kind) and is_sound(kind):
        kept = [(name, other) for name, other in (("bytes", pa.binary()), ("path", pa.string()))
                if kind.get_field_index(name) >= 0]
        return pa.struct(kept)
    return pa.binary() if is_sound(kind) else pa.null()


def _kept_column(table: TableFile, group: int, rows: int, field: pa.Field) -> pa.Array:
    """What is kept of one group's column: texts and paths as they are, and empty bytes, or none where it has none."""
    if pa.types.is_null(field.type):
        return pa.nulls(rows)
    if pa.types.is_string(field.type):
        return table.column(group, field.name).combine_chunks().cast(pa.string())
    content = pa.array([None if table.has_no_bytes(group, field.name) else b""] * rows, pa.binary())
    if pa.types.is_binary(field.type):
        return content
    arrays = {"bytes": content}
    if field.type.get_field_index("path") >= 0:
        paths = [path for path, _ in table.names_and_texts(group, field.name, None)]
        arrays["path"] = pa.array(paths, pa.string())
    return pa.StructArray.from_arrays(list(arrays.values()), fields=list(field.type))
