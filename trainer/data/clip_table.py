"""A manifest as two files: the table of clips and the fates, written by one process of a run and read by the others.

Both are Arrow streams, which `datasets.Dataset.from_file` opens. They are read here by pyarrow alone, because
datasets imports pandas, which takes up to a second.

A file's name holds a digest of its content. Runs that share a cache and a data set therefore share the files, and a run
whose folder has changed writes others beside those that another run may be about to read.

Files that no run has asked for in a week are removed by the next run that writes. That is safe because a file is
needed for seconds only: the other processes wait for the first one to write it (or to find it there, which makes its
date new), read the whole of it into memory, and never look at it again.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from trainer.atomic import PARTIAL, appears, names_in, write_whole
from trainer.data.arrow_store import storage_errors
from trainer.data.fates import Fate
from trainer.data.manifest import TYPES, Columns, Manifest
from trainer.errors import StorageError

FATE_TYPES = {"path": "string", "fate": "string", "detail": "string"}
# A column of a batch addresses its bytes with 32 bits. A caption has 1 MiB at most, so that these rows always fit.
BATCH_ROWS = 1_000
UNUSED_SECONDS = 7 * 24 * 3600.0
ARROW = ".arrow"
# Our tables, and what a killed process may leave of a file that is written here (trainer/atomic.py). Nothing else is
# removed.
OUR_NAME = re.compile(rf"(clips|fates)-[0-9a-f]{{32}}{re.escape(ARROW)}|\..+\.[0-9a-f]{{32}}{re.escape(PARTIAL)}")
SHOWN_SECONDS = 5.0  # how long a network file system may take to show what another machine has written


def write(found: Manifest, folder: Path) -> tuple[str, str]:
    """Make `folder` hold the manifest; returns the names of its two files, for `read`.

    What is there already is not written again, so that a complete cache need not be writable. Raises StorageError
    where something must be written and cannot be.
    """
    fates = {name: [getattr(fate, name) for fate in found.fates] for name in FATE_TYPES}
    with storage_errors(folder, "the table of clips cannot be written"):
        names = (_publish(folder, "clips", found.columns, TYPES), _publish(folder, "fates", fates, FATE_TYPES))
        _remove_unused(folder)
    return names


def read(names: tuple[str, str], folder: Path) -> Manifest:
    """The manifest that `write` gave these names. Raises StorageError where a file is missing or damaged."""
    clips, fates = names
    rows = _columns(folder / fates, FATE_TYPES)
    fate_rows = zip(rows["path"], rows["fate"], rows["detail"], strict=True)
    return Manifest(
        columns=_columns(folder / clips, TYPES),
        fates=tuple(Fate(path=path, fate=fate, detail=detail) for path, fate, detail in fate_rows),
    )


def _publish(folder: Path, what: str, columns: Columns, types: Mapping[str, str]) -> str:
    content = _stream(columns, types)
    name = f"{what}-{hashlib.blake2b(content, digest_size=16).hexdigest()}{ARROW}"
    path = folder / name
    try:
        is_written = path.read_bytes() == content
    except OSError:
        is_written = False
    if is_written:
        with suppress(OSError):  # of another user, or on a read-only disk, where nobody removes it either
            os.utime(path)
    else:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(path, content, shared=True)
    return name


def _stream(columns: Columns, types: Mapping[str, str]) -> bytes:
    """The table as an Arrow stream; equal tables give equal bytes."""
    schema = _schema(types)
    rows = len(next(iter(columns.values())))
    memory = pa.BufferOutputStream()
    with pa.ipc.new_stream(memory, schema) as stream:
        for start in range(0, rows, BATCH_ROWS):
            arrays = [_array(columns[name][start : start + BATCH_ROWS], kind) for name, kind in types.items()]
            stream.write_batch(pa.RecordBatch.from_arrays(arrays, schema=schema))
    return bytes(memory.getvalue())


def _array(values: Sequence[Any], kind: str) -> pa.Array:
    """An Arrow array in which None is null. Not pa.array(values), which imports pandas (pyarrow 26)."""
    missing = np.array([value is None for value in values])
    present = pa.py_buffer(np.packbits(~missing, bitorder="little")) if missing.any() else None
    if kind not in ("string", "binary"):
        buffers = [present, pa.py_buffer(np.array(values, np.dtype(kind)))]
    else:
        pieces = [b"" if value is None else value.encode() if kind == "string" else value for value in values]
        ends = np.cumsum([0, *map(len, pieces)], dtype=np.int64).astype(np.int32)
        buffers = [present, pa.py_buffer(ends), pa.py_buffer(b"".join(pieces))]
    return pa.Array.from_buffers(pa.type_for_alias(kind), len(values), buffers)


def _columns(path: Path, types: Mapping[str, str]) -> Columns:
    try:
        what_failed = f"the table of clips {path.name} cannot be read"
        appears(path, SHOWN_SECONDS)  # if it does not, opening it says so
        with storage_errors(path.parent, what_failed), pa.memory_map(str(path)) as file:
            table = pa.ipc.open_stream(file).read_all()
            table.validate(full=True)
            if not table.schema.equals(_schema(types)):
                raise pa.ArrowInvalid(f"its columns are {table.schema.names}")
            # Copied, and not left in the map: see the head of this module.
            return {name: table.column(name).to_pylist() for name in types}
    except pa.ArrowException as error:
        raise StorageError(
            f"the table of clips {path} is damaged ({error}): run again, and the first process writes it anew"
        ) from error


def _schema(types: Mapping[str, str]) -> pa.Schema:
    return pa.schema([(name, pa.type_for_alias(kind)) for name, kind in types.items()])


def _remove_unused(folder: Path) -> None:
    """Remove tables, and what killed processes left of some, that have been there unused for a week."""
    for name in names_in(folder):
        if not OUR_NAME.fullmatch(name):
            continue
        with suppress(OSError):  # another run removes it too, or may and this one may not
            if time.time() - (folder / name).stat().st_mtime > UNUSED_SECONDS:
                (folder / name).unlink()
