"""The rows of the Parquet and Arrow files of a folder, each with its name, its caption and where its sound lies.

No sound is read here: of a table, its schema, the paths in the column of sounds, and the captions.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import repeat
from typing import Any

import pyarrow as pa

from trainer.data.fates import Fate, display
from trainer.data.folder_walk import is_metadata
from trainer.data.metadata_files import CAPTION_COLUMNS
from trainer.data.music_fields import NAMES, OTHER_NAMES, Fields, fields_of
from trainer.data.places import file_beside, no_sound, row_reference
from trainer.data.split_files import TRAIN, configurations_of, files_of_split
from trainer.data.table_file import SUFFIXES, TableFile, is_field, is_sound, is_text, open_table, sound_columns
from trainer.errors import ConfigError

README = "README.md"
README_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class TableSettings:
    """Which rows and columns of tables are used.

    config          a configuration of the data set; None is the only one, or its default
    split           a split of it
    audio_column    of the sounds; None: the column that holds some
    caption_column  of the captions; None: the first there is of CAPTION_COLUMNS
    files           names, relative to the folder and with slashes, of the only files there that are used, whatever the
                    split: those that were fetched from the hub for it; None: all
    """

    config: str | None = None
    split: str = TRAIN
    audio_column: str | None = None
    caption_column: str | None = None
    files: frozenset[str] | None = None


@dataclass(frozen=True, kw_only=True)
class TableRow:
    """A row that names a sound or holds one.

    name        its path, where no other row has it, else the table's and the row's number
    reference   of its sound, as trainer/data/places.py has them, by os.fsdecode
    size_bytes  of the file that holds the sound
    place       of the row, for a person: "data/x.parquet row 17"
    own_path    the path that it gives its sound; "" for none
    caption     as it stands there; None for none
    why_none    where there is no caption: what can be done about it
    fields      genre, bpm and so on, of the columns of these names, where they were asked for
    """

    name: str
    reference: str
    size_bytes: int
    place: str
    own_path: str
    caption: str | None
    why_none: str = ""
    fields: Fields = ()


@dataclass(frozen=True, kw_only=True)
class Tables:
    """What the tables of a folder hold; `names` are the files that were looked at, relative to the folder."""

    items: tuple[TableRow | Fate, ...]
    names: frozenset[str]


def is_table(path: str) -> bool:
    """Whether this is a file whose name is that of a table."""
    return path.lower().endswith(SUFFIXES) and os.path.isfile(path)


def scan_tables(root: str, settings: TableSettings, *, with_fields: bool = False) -> Tables:
    """The rows of all tables below `root`, or of the table that it is, which belong to the split; and the fates of
    tables that are not used.

    with_fields  whether columns of genre, bpm and so on are read (trainer/data/music_fields.py)

    Raises ConfigError where the data set has no such configuration, split or column.
    """
    folder, names = (os.path.dirname(root), [os.path.basename(root)]) if is_table(root) else (root, table_names(root))
    if settings.files is not None:
        names = [name for name in names if name in settings.files]
    if not names:
        _refuse_settings_of_tables(root, settings)
        return Tables(items=(), names=frozenset())
    chosen = names if folder != root or settings.files is not None else _of_split(root, names, settings)
    items: list[TableRow | Fate] = [
        Fate(path=display(name), fate="ignored", detail=f"not of the split {settings.split}")
        for name in names if name not in set(chosen)
    ]
    for name in chosen:
        items += _rows_or_fate(folder, name, settings, with_fields)
    return Tables(items=tuple(_with_unique_names(items)), names=frozenset(names))


def table_names(root: str) -> list[str]:
    """The tables below a folder, relative to it, sorted; of a folder that save_to_disk wrote, those that it lists.

    metadata.parquet is none: it holds captions of sound files (trainer/data/metadata_files.py).
    """
    found = []
    for parent, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".")]
        listed = _listed(os.path.join(parent, "state.json")) if "state.json" in names else None
        tables = [
            name for name in names
            if name.lower().endswith(SUFFIXES) and not name.startswith(".") and not is_metadata(name)
        ]
        found += [os.path.relpath(os.path.join(parent, name), root) for name in tables if listed is None
                  or name in listed]
    return sorted(found)


def _of_split(root: str, names: Sequence[str], settings: TableSettings) -> tuple[str, ...]:
    if os.path.isfile(os.path.join(root, "dataset_dict.json")):  # of DatasetDict.save_to_disk: a folder for each split
        chosen = tuple(name for name in names if name.split("/")[0] == settings.split)
        if not chosen:
            splits = ", ".join(sorted({name.split("/")[0] for name in names}))
            raise ConfigError(f"--dataset_split {settings.split}: the data set has no such split; it has {splits}")
        return chosen
    configurations = configurations_of(_readme(root))
    # A table of captions beside a folder of music is no data set with splits.
    return files_of_split(names, settings.split, config=settings.config, configurations=configurations)


def _rows_or_fate(folder: str, name: str, settings: TableSettings, with_fields: bool) -> list[TableRow | Fate]:
    """The rows of one table, or its own fate where it has none that can be used."""
    path, shown = os.path.join(folder, name), display(name)
    try:
        table = open_table(path)
        sound = _sound_column(table.schema, shown, settings)
        if sound is None:
            columns = ", ".join(table.schema.names) or "none"
            detail = f"no column of it holds sounds (its columns: {columns}): name one with --audio_column"
            return [Fate(path=shown, fate="ignored", detail=detail)]
        fields = [column for column in _field_columns(table.schema) if column != sound] if with_fields else []
        return list(_rows(table, path, name, sound, _text_column(table.schema, shown, settings), fields))
    except OSError as error:
        if error.errno is None and not isinstance(error, pa.ArrowException):  # pyarrow's own, of a damaged file
            return [_damaged(shown, error)]
        return [Fate(path=shown, fate="unreadable", detail=f"{error.strerror or error}: check its rights and the disk")]
    except (pa.ArrowException, UnicodeDecodeError) as error:
        return [_damaged(shown, error)]


def _damaged(shown: str, error: Exception) -> Fate:
    reason = display(" ".join(str(error).split())[:200])
    return Fate(path=shown, fate="unreadable", detail=f"no table, or damaged or cut off ({reason}): fetch it again")


def _rows(
    table: TableFile, path: str, name: str, sound: str, text: str | None, fields: Sequence[str]
) -> Iterator[TableRow | Fate]:
    size_bytes = os.stat(path).st_size
    why_none = f"its column {text} is empty here: fill it" if text else (
        f"{display(name)} has no column {', '.join(CAPTION_COLUMNS)}: name the one with captions with --caption_column"
    )
    why_none += ", or train without text: --no_label 1"
    row = 0
    for group in range(len(table.group_rows)):
        by_path = table.has_no_bytes(group, sound)
        values: Iterator[Mapping[str, Any]] = table.values(group, fields) if fields else repeat({})
        for (named, caption), of_row in zip(table.names_and_texts(group, sound, text), values, strict=False):
            item = TableRow(
                name=named or f"{name} row {row}", reference=os.fsdecode(row_reference(path, row, sound)),
                size_bytes=size_bytes, place=f"{display(name)} row {row}", own_path=named or "", caption=caption,
                why_none=why_none, fields=fields_of(of_row),
            )
            yield _beside(item, path, name, named, row) if by_path else replace(item, name=_both(name, named, row))
            row += 1


def _both(name: str, named: str | None, row: int) -> str:
    """A row's own path, a tab, and its table and number: `_with_unique_names` keeps one of both."""
    return f"{named or ''}\t{name} row {row}"


def _beside(item: TableRow, path: str, name: str, named: str | None, row: int) -> TableRow | Fate:
    """A row that holds no bytes, as the file that it names; its fate where that is not there."""
    found = file_beside(path, named)
    if found is None:
        return Fate(path=display(f"{name} row {row}"), fate="unreadable", detail=no_sound(named))
    return replace(item, name=_both(name, named, row), reference=found, size_bytes=os.stat(found).st_size)


def _with_unique_names(items: Sequence[TableRow | Fate]) -> Iterator[TableRow | Fate]:
    """Rows under their paths where these tell them apart; a fate is found by its clip's name."""
    counts = Counter(item.name.rpartition("\t")[0] for item in items if isinstance(item, TableRow))
    for item in items:
        if isinstance(item, TableRow):
            own, _, numbered = item.name.rpartition("\t")
            item = replace(item, name=own if own and counts[own] == 1 else numbered)
        yield item


def _sound_column(schema: pa.Schema, shown: str, settings: TableSettings) -> str | None:
    """The column of sounds; None where there is none."""
    wanted = settings.audio_column
    if wanted is not None:
        _require(schema, shown, "audio_column", wanted)
        if not is_sound(schema.field(wanted).type):
            raise ConfigError(
                f"--audio_column {wanted}: in {shown} it is of type {_short(schema.field(wanted).type)}, and sounds are"
                " bytes, structs of bytes and path, or paths"
            )
        return wanted
    found = [name for name in sound_columns(schema) if schema.names.count(name) == 1]
    if len(found) > 1:
        raise ConfigError(f"{shown} has several columns of sounds: name one with --audio_column: {', '.join(found)}")
    return found[0] if found else None


def _text_column(schema: pa.Schema, shown: str, settings: TableSettings) -> str | None:
    wanted = settings.caption_column
    if wanted is not None:
        _require(schema, shown, "caption_column", wanted)
        if not is_text(schema.field(wanted).type):
            kind = _short(schema.field(wanted).type)
            raise ConfigError(f"--caption_column {wanted}: in {shown} it is of type {kind}, and captions are texts")
        return wanted
    texts = {field.name for field in schema if is_text(field.type) and schema.names.count(field.name) == 1}
    return next((name for name in CAPTION_COLUMNS if name in texts), None)


def _field_columns(schema: pa.Schema) -> list[str]:
    """The columns that are named as music fields are."""
    known = {*NAMES, *OTHER_NAMES}
    return [
        field.name for field in schema
        if field.name.strip().lower() in known and is_field(field.type) and schema.names.count(field.name) == 1
    ]  # fmt: skip


def _require(schema: pa.Schema, shown: str, flag: str, column: str) -> None:
    if schema.names.count(column) != 1:
        there = "several such columns" if column in schema.names else "no such column"
        raise ConfigError(f"--{flag} {column}: {shown} has {there}; it has {', '.join(schema.names) or 'none'}")


def _short(kind: pa.DataType) -> str:
    return str(kind) if len(str(kind)) < 80 else str(kind)[:80] + "..."


def _refuse_settings_of_tables(root: str, settings: TableSettings) -> None:
    if settings.files is None and (settings.config is not None or settings.split != TRAIN):
        raise ConfigError(
            f"--dataset_config and --dataset_split have no effect on {display(root)}, which holds no .parquet or .arrow"
            " file: remove them, and give the folder itself whose files are to be used"
        )
    if settings.audio_column is not None:
        raise ConfigError(
            f"--audio_column {settings.audio_column} has no effect: {display(root)} holds no .parquet or .arrow file."
            " Remove it, or give the folder of the tables"
        )


def _listed(state: str) -> frozenset[str] | None:
    """The files that a data set saved by save_to_disk consists of; None where `state` is no such list."""
    try:
        with open(state, encoding="utf-8") as file:
            return frozenset(str(entry["filename"]) for entry in json.load(file)["_data_files"])
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _readme(root: str) -> str:
    try:
        with open(os.path.join(root, README), "rb") as file:
            return file.read(README_BYTES).decode("utf-8", "replace")
    except OSError:
        return ""
