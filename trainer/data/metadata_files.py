"""Reads the files that hold captions of many sounds: metadata.csv, .jsonl and .parquet, and ACE-Step's tables.

Spec: Hugging Face's audiofolder: the column file_name (or file_names, for several of a row) names a file relative to
the metadata file's folder. ACE-Step 1.5 reads any .csv that has a column "file". Which folder's file counts for which
sound is decided in trainer/data/caption_metadata.py.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from trainer.data.caption_files import CaptionFault, decode, read_bytes
from trainer.data.fates import display
from trainer.data.text_content import kind_of

CAPTION_COLUMNS = ("text", "caption", "description", "prompt")
ACE_STEP_FILE = "file"
METADATA_BYTES = 256 << 20  # a larger file is not read
FIELD_CHARACTERS = 1 << 20  # of one cell of a .csv file
DELIMITERS = ",;\t|"
# Columns that trainer/data/music_fields.py and the tags of trainer/data/json_captions.py may be made of.
OTHER_COLUMNS = ("key", "bpm", "genre", "moods", "mood", "keywords", "instrument", "instruments", "tags", "tag")


class NoMetadataError(Exception):
    """A file that holds no captions at all, as a table of other things; its clips may have captions elsewhere.

    reason        what it lacks; the error's text has advice behind it
    has_captions  whether it has a column of captions, and none that says of which files
    """

    def __init__(self, reason: str, advice: str = "", *, has_captions: bool = False):
        super().__init__(f"{reason}: {advice}" if advice else reason)
        self.reason, self.has_captions = reason, has_captions


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row that names sounds.

    place       "line 3" of a text, "row 3" of a .parquet, counted from 0
    file_names  as they stand there
    values      its columns by name in small letters, the column of the file names left out
    """

    place: str
    file_names: tuple[str, ...]
    values: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Table:
    """A metadata file that could be read: `faults` are the rows that could not, as (place, why)."""

    rows: tuple[Row, ...]
    faults: tuple[tuple[str, str], ...]


def read_table(path: str, column: str | None) -> Table:
    """The rows of a metadata file.

    column  the one that holds captions; None for those of CAPTION_COLUMNS

    Raises CaptionFault where the file cannot be read, NoMetadataError where it has no column of file names or none of
    captions.
    """
    suffix = os.path.splitext(path)[1].lower()
    found = _parquet(path, column) if suffix == ".parquet" else _text_rows(path, suffix, column)
    rows, faults = [], []
    for place, values in found:
        if isinstance(values, str):
            faults.append((place, values))
            continue
        named = [value for name, value in values.items() if is_file_column(name)]
        file_names = [name for value in named for name in (value if isinstance(value, list) else [value])]
        if not file_names or not all(isinstance(name, str) and name.strip() for name in file_names):
            faults.append((place, "has no file_name: name the file that it describes"))
            continue
        others = {name: value for name, value in values.items() if not is_file_column(name)}
        names = tuple(name if suffix == ".parquet" else name.strip() for name in file_names)
        rows.append(Row(place=place, file_names=names, values=others))
    return Table(rows=tuple(rows), faults=tuple(faults))


def is_file_column(name: str) -> bool:
    """Whether a column, in small letters, holds names of files."""
    plain = name in ("file_name", "file_names", ACE_STEP_FILE)
    return plain or name.endswith(("_file_name", "_file_names"))


def _text_rows(path: str, suffix: str, column: str | None) -> Iterator[tuple[str, dict[str, Any] | str]]:
    raw = read_bytes(path, METADATA_BYTES + 1)
    if len(raw) > METADATA_BYTES:
        raise CaptionFault("caption unreadable", f"is over {METADATA_BYTES:,} bytes: split it, one for each folder")
    try:
        text = decode(raw)[0]
    except UnicodeDecodeError as error:
        raise CaptionFault("caption unreadable", "is no text: save it as UTF-8") from error
    kind = kind_of(text[:10_000])
    if kind != "caption" and not (kind == "JSON" and suffix == ".jsonl"):
        raise CaptionFault("caption unreadable", f"is no {suffix[1:]} file but a {kind}")
    return _csv(text, column) if suffix == ".csv" else _jsonl(text, column)


def _csv(text: str, column: str | None) -> Iterator[tuple[str, dict[str, Any] | str]]:
    skipped = 0
    if match := re.match(r"sep=(.)\r?\n", text):  # Excel's own way to name the delimiter
        text, skipped = text[match.end() :], 1
    first = text.lstrip("\r\n").split("\n", 1)[0].lower()
    delimiter = max(DELIMITERS, key=first.count)
    with _longer_cells():
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True)
        try:
            lines = [(reader.line_num, cells) for cells in reader]  # the line on which each row ends
        except csv.Error as error:
            raise CaptionFault(
                "caption unreadable", f"is no table near line {reader.line_num + skipped} ({error}): mend its quotes"
            ) from error
    filled = [place for place, (_, cells) in enumerate(lines) if any(cell.strip() for cell in cells)]
    if not filled:
        raise NoMetadataError("is empty")
    names = [cell.strip().lower() for cell in lines[filled[0]][1]]
    _check_columns(names, column)
    ends = {place: lines[place - 1][0] for place in filled if place}
    return iter([
        (f"line {ends[place] + 1 + skipped}", _row(names, lines[place][1])) for place in filled[1:]
    ])


def _row(names: list[str], cells: list[str]) -> dict[str, Any]:
    """The cells by the name of their column; of two columns of a name the first counts. An empty cell is none."""
    row: dict[str, Any] = {}
    for name, cell in zip(names, cells, strict=False):
        if cell.strip():
            row.setdefault(name, cell)
    return row


def _jsonl(text: str, column: str | None) -> Iterator[tuple[str, dict[str, Any] | str]]:
    rows: list[tuple[str, dict[str, Any] | str]] = []
    names: set[str] = set()
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            found = json.loads(line)
        except (ValueError, RecursionError):
            found = None
        if isinstance(found, dict):
            found = {str(name).strip().lower(): value for name, value in found.items()}
            names.update(found)
        rows.append((f"line {number}", found if isinstance(found, dict) else "is no JSON object: mend or remove it"))
    if rows and not names:
        raise CaptionFault("caption unreadable", "holds no JSON object in any line: write one object for each line")
    _check_columns(names, column)
    return iter(rows)


def _parquet(path: str, column: str | None) -> Iterator[tuple[str, dict[str, Any] | str]]:
    import pyarrow as pa  # not every folder has such a file
    import pyarrow.parquet as pq

    read_bytes(path, 0)  # no pipe, and permitted
    try:
        with pq.ParquetFile(path) as file:
            columns = {name: name.strip().lower() for name in file.schema_arrow.names}
            _check_columns(columns.values(), column)
            captions = CAPTION_COLUMNS if column is None else (column.lower(),)
            wanted = [
                name for name, lower in columns.items()
                if is_file_column(lower) or lower in captions or lower in OTHER_COLUMNS
            ]
            rows = [row for batch in file.iter_batches(columns=wanted) for row in batch.to_pylist()]
    except (pa.ArrowException, OSError, ValueError) as error:
        why = display(str(error).partition("\n")[0])  # it may quote what is in the file
        detail = f"cannot be read ({why}): write it anew, or convert it to metadata.csv"
        raise CaptionFault("caption unreadable", detail) from error
    return iter([
        (f"row {number}", {columns[name]: value for name, value in row.items() if value is not None})
        for number, row in enumerate(rows)
    ])


def _check_columns(names: Iterable[str], column: str | None) -> None:
    """Raise NoMetadataError unless there are columns of file names and of captions."""
    known = list(names)
    captions = [*CAPTION_COLUMNS, "tags", "tag"] if column is None else [column.lower()]
    if not any(map(is_file_column, known)):
        shown = display(", ".join(known)[:200])
        raise NoMetadataError(
            f"has no column file_name (its columns: {shown})",
            "call the one that names the files so, with their folders, as in sub/song.wav",
            has_captions=bool(set(captions) & set(known)),
        )
    if not set(captions) & set(known):
        asked = "none of the columns " + ", ".join(CAPTION_COLUMNS) if column is None else f"no column {column}"
        raise NoMetadataError(f"has {asked}", "--caption_column names the one that holds captions")


@contextmanager
def _longer_cells() -> Iterator[None]:
    before = csv.field_size_limit(FIELD_CHARACTERS)
    try:
        yield
    finally:
        csv.field_size_limit(before)
