"""Parquet and Arrow files whose rows hold sounds, read by pyarrow a row group at a time.

Not by datasets, which would decode by torchcodec and imports pandas.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import pyarrow as pa

SUFFIXES = (".parquet", ".arrow")
PARQUET_MAGIC = b"PAR1"
BATCH_ROWS = 1_000


class TableFile(Protocol):
    """An open table.

    schema      of its columns
    group_rows  how many rows each group has that can be read alone: a row group, or an Arrow record batch
    """

    schema: pa.Schema
    group_rows: list[int]

    def column(self, group: int, name: str) -> pa.ChunkedArray:
        """A whole column of one group."""
        ...

    def has_no_bytes(self, group: int, name: str) -> bool:
        """Whether it is known, without reading them, that no cell of the group's column of sounds holds bytes."""

    def names_and_texts(self, group: int, sound: str, text: str | None) -> Iterator[tuple[str | None, str | None]]:
        """For each row of a group, the path in its sound's cell and its caption; no bytes of sounds are kept."""

    def values(self, group: int, names: Sequence[str]) -> Iterator[dict[str, Any]]:
        """For each row of a group, what stands in these columns, which hold no sounds."""
        ...


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A sound as a row holds it: the bytes of a file, the path of one, both or neither."""

    content: bytes | None
    path: str | None


def open_table(path: str) -> TableFile:
    """The table at `path`, told by its content. Raises pa.ArrowException or OSError for what is none."""
    with open(path, "rb") as file:
        is_parquet = file.read(len(PARQUET_MAGIC)) == PARQUET_MAGIC
    return _Parquet(path) if is_parquet else _Arrow(path)


def cell_at(values: pa.ChunkedArray, row: int) -> Cell:
    """The sound in one row of a column that `is_sound`."""
    value = values[row].as_py()
    if isinstance(value, dict):
        return Cell(content=value.get("bytes"), path=_text(value.get("path")))
    return Cell(content=None, path=value) if isinstance(value, str) else Cell(content=value, path=None)


def sound_columns(schema: pa.Schema) -> list[str]:
    """The columns of sounds: those that datasets declared as Audio; else structs of bytes and path; else one of bytes
    that is named audio."""
    declared = [name for name in _declared_audio(schema) if name in schema.names and is_sound(schema.field(name).type)]
    structs = [field.name for field in schema if pa.types.is_struct(field.type) and is_sound(field.type)]
    named = [field.name for field in schema if field.name == "audio" and _is_binary(field.type)]
    return declared or structs or named


def is_sound(kind: pa.DataType) -> bool:
    """Whether cells of this type can hold a sound: a struct with bytes in it, bytes, or the path of a file."""
    if pa.types.is_struct(kind):
        fields = {kind.field(at).name: kind.field(at).type for at in range(kind.num_fields)}
        return "bytes" in fields and _is_binary(fields["bytes"]) and is_text(fields.get("path", pa.string()))
    return _is_binary(kind) or is_text(kind)


def is_text(kind: pa.DataType) -> bool:
    """Whether cells of this type are texts."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def is_field(kind: pa.DataType) -> bool:
    """Whether cells of this type can hold a tempo, a genre or several moods: numbers, texts and lists of texts."""
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        kind = kind.value_type
        return is_text(kind)
    return is_text(kind) or pa.types.is_integer(kind) or pa.types.is_floating(kind)


def _is_binary(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)


def _declared_audio(schema: pa.Schema) -> list[str]:
    """Names of the columns that datasets wrote as Audio, by what it keeps in the schema."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return [name for name, kind in features.items() if isinstance(kind, dict) and kind.get("_type") == "Audio"]
    except (KeyError, ValueError, TypeError, AttributeError):
        return []


def _text(value: object) -> str | None:
    return value if isinstance(value, str) and value else None


class _Parquet:
    def __init__(self, path: str):
        import pyarrow.parquet as parquet  # takes longer than the rest of this module

        # Without pre_buffer, which would hold the compressed bytes of a group beside the decoded ones.
        self._file = parquet.ParquetFile(path, pre_buffer=False)
        self.schema = self._file.schema_arrow
        metadata = self._file.metadata
        self.group_rows = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]

    def column(self, group: int, name: str) -> pa.ChunkedArray:
        """A whole column of one group."""
        return self._file.read_row_group(group, columns=[name], use_threads=False).column(name)

    def has_no_bytes(self, group: int, name: str) -> bool:
        """Whether the file's statistics count as many nulls as rows."""
        if is_text(self.schema.field(name).type):
            return True
        chunks = self._file.metadata.row_group(group)
        for at in range(chunks.num_columns):
            chunk = chunks.column(at)
            if chunk.path_in_schema in (f"{name}.bytes", name) and chunk.statistics is not None:
                nulls = chunk.statistics.null_count
                return bool(nulls is not None and nulls == chunks.num_rows > 0)
        return False

    def names_and_texts(self, group: int, sound: str, text: str | None) -> Iterator[tuple[str | None, str | None]]:
        """Reads the leaves path and text alone."""
        kind = self.schema.field(sound).type
        leaf = f"{sound}.path" if _has_path(kind) else sound if is_text(kind) else None
        columns = [name for name in (leaf, text) if name is not None]
        if not columns:
            yield from ((None, None) for _ in range(self.group_rows[group]))
            return
        for batch in self._file.iter_batches(BATCH_ROWS, row_groups=[group], columns=columns, use_threads=False):
            yield from _pairs(batch, sound if leaf else None, text)

    def values(self, group: int, names: Sequence[str]) -> Iterator[dict[str, Any]]:
        """Reads these columns alone."""
        for batch in self._file.iter_batches(BATCH_ROWS, row_groups=[group], columns=list(names), use_threads=False):
            yield from batch.select(names).to_pylist()


class _Arrow:
    """An Arrow file or stream in a memory map, so that what is not asked for is not read from the disk."""

    def __init__(self, path: str):
        memory = pa.memory_map(path)
        try:
            reader = pa.ipc.open_file(memory)
            self._batches = [reader.get_batch(at) for at in range(reader.num_record_batches)]
        except pa.ArrowInvalid:
            memory.seek(0)
            reader = pa.ipc.open_stream(memory)
            self._batches = list(reader)
        self.schema = reader.schema
        self.group_rows = [batch.num_rows for batch in self._batches]

    def column(self, group: int, name: str) -> pa.ChunkedArray:
        """A column of one batch, still in the map."""
        values = self._batches[group].column(name)
        values.validate(full=not is_sound(values.type))
        return pa.chunked_array([values])

    def has_no_bytes(self, group: int, name: str) -> bool:
        """By the bits that tell nulls."""
        values = self._batches[group].column(name)
        kind = values.type
        if is_text(kind):
            return True
        values = values.field("bytes") if pa.types.is_struct(kind) else values
        return 0 < len(values) == values.null_count

    def names_and_texts(self, group: int, sound: str, text: str | None) -> Iterator[tuple[str | None, str | None]]:
        """From the map; of a struct, the bytes are not touched."""
        batch = self._batches[group]
        batch.validate()
        kind = self.schema.field(sound).type
        for start in range(0, batch.num_rows, BATCH_ROWS):
            piece = batch.slice(start, BATCH_ROWS)
            yield from _pairs(piece, sound if _has_path(kind) or is_text(kind) else None, text)

    def values(self, group: int, names: Sequence[str]) -> Iterator[dict[str, Any]]:
        """From the map."""
        batch = self._batches[group].select(names)
        batch.validate(full=True)
        for start in range(0, batch.num_rows, BATCH_ROWS):
            yield from batch.slice(start, BATCH_ROWS).to_pylist()


def _has_path(kind: pa.DataType) -> bool:
    return pa.types.is_struct(kind) and kind.get_field_index("path") >= 0


def _pairs(batch: pa.RecordBatch, sound: str | None, text: str | None) -> Iterator[tuple[str | None, str | None]]:
    paths = texts = [None] * batch.num_rows
    if sound is not None:
        column = batch.column(sound)
        paths = (column.field("path") if pa.types.is_struct(column.type) else column).to_pylist()
    if text is not None:
        texts = batch.column(text).to_pylist()
    yield from zip(map(_text, paths), texts, strict=True)
