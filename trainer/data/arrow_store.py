"""A folder of Arrow files that grows by whole, immutable parts and is read through memory maps.

A part exists completely or not at all: it is written beside its place as `*.partial`, flushed and renamed. Any number
of processes may append at the same time. Where two of them wrote the same key, the first part by name counts.

`datasets.Dataset.from_file` opens a part. Here parts are read by pyarrow alone, because datasets imports pandas.
"""

from __future__ import annotations

import fcntl
import logging
import os
import re
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from trainer.atomic import check_operations, flush_folder, names_in, rename_file
from trainer.errors import StorageError

KEY = "key"
# Rows are written as a part once they have waited for so long or are so large: a kill costs a minute of work at most.
FLUSH_SECONDS = 60.0
FLUSH_BYTES = 64 * 2**20
# Some file systems keep locks to one machine, so that another machine's writer looks like none. Therefore a partial
# file is taken for abandoned only at an age at which no part is still being written.
ABANDONED_SECONDS = 3600.0
PART, PARTIAL, DAMAGED = ".arrow", ".partial", ".damaged"
# What _new_stem gives. Other names in the folder are not ours: never read, set aside or removed.
OUR_NAME = re.compile(rf"\d{{20}}-[0-9a-f]{{12}}({re.escape(PART)}|{re.escape(PARTIAL)})")

log = logging.getLogger(__name__)
Row = Mapping[str, Any]


class Store:
    """Rows of a text key and further columns, in one folder, which the first `append` creates.

    columns  types by name, without the key
    """

    def __init__(self, folder: Path, columns: Mapping[str, pa.DataType]):
        self.folder = folder
        self.schema = pa.schema([(KEY, pa.string()), *columns.items()])

    def keys(self) -> set[str]:
        """The keys of all complete parts that are there now."""
        return {key for part in self._parts() for key in part.column(KEY).to_pylist()}

    def open(self) -> Rows:
        """All complete parts as one memory-mapped table; of a key's rows the first one counts."""
        table = pa.concat_tables(self._parts() or [pa.Table.from_batches([], schema=self.schema)])
        index: dict[str, int] = {}
        for row, key in enumerate(table.column(KEY).to_pylist()):
            index.setdefault(key, row)
        return Rows(table=table, index=index)

    def append(self, rows: Sequence[Row]) -> None:
        """Write `rows` as one part. Raises StorageError where the folder cannot be written or is full."""
        if not rows:
            return
        batch = pa.RecordBatch.from_pylist([dict(row) for row in rows], schema=self.schema)
        memory = pa.BufferOutputStream()
        with pa.ipc.new_stream(memory, self.schema) as stream:
            stream.write_batch(batch)
        with storage_errors(self.folder, f"{len(rows)} finished rows could not be kept"):
            self.folder.mkdir(parents=True, exist_ok=True)
            _write(self.folder, _new_stem(), memory.getvalue())

    def append_all(self, rows: Iterable[Row]) -> None:
        """Append `rows` as they are made, part by part. Where `rows` raises, those made before are kept.

        Raises StorageError where the folder cannot be written, and does so before the first row is made.
        """
        with storage_errors(self.folder, "it cannot be written"):
            self.folder.mkdir(parents=True, exist_ok=True)
            check_operations(self.folder, whole_files_only=True)
        waiting: list[Row] = []
        waiting_bytes, since = 0, time.monotonic()
        try:
            for row in rows:
                waiting.append(row)
                waiting_bytes += sum(len(value) for value in row.values() if isinstance(value, bytes))
                if waiting_bytes >= FLUSH_BYTES or time.monotonic() - since >= FLUSH_SECONDS:
                    full, waiting = waiting, []
                    self.append(full)
                    waiting_bytes, since = 0, time.monotonic()
        finally:
            self.append(waiting)

    def _parts(self) -> list[pa.Table]:
        with storage_errors(self.folder, "it cannot be read"):
            names = sorted(name for name in names_in(self.folder) if OUR_NAME.fullmatch(name))
            for name in names:
                if name.endswith(PARTIAL):
                    _remove_if_abandoned(self.folder / name)
            paths = [self.folder / name for name in names if name.endswith(PART)]
            return [part for path in paths if (part := self._part(path)) is not None]

    def _part(self, path: Path) -> pa.Table | None:
        """The part at `path`. One that is damaged is set aside with a warning, and None returned: its rows are then
        missing, and are made again."""
        try:
            part = pa.ipc.open_stream(pa.memory_map(str(path))).read_all()
            # This checks the offsets and the keys, and reads none of the binary values from the disk.
            part.validate(full=True)
            if part.schema.equals(self.schema):
                return part
            reason = f"its columns are {part.schema.names}"
        except FileNotFoundError:
            return None
        except (pa.ArrowException, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            reason = str(error)
        log.warning("cache part %s is damaged (%s): what it held is made again", path, reason)
        with suppress(OSError):
            path.rename(path.with_suffix(DAMAGED))
        return None


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The rows of a store as they were when it was opened; `index` gives the number of a key's row."""

    table: pa.Table
    index: Mapping[str, int]

    def integers(self, column: str) -> np.ndarray:
        """A whole integer column, shape (rows,); or (rows, n) for a column of lists that all have n integers."""
        values = self.table.column(column)
        lists = pa.types.is_list(values.type)
        # Not pyarrow's to_numpy, which imports pandas (pyarrow 26).
        chunks = [np.from_dlpack(chunk.flatten() if lists else chunk) for chunk in values.chunks]
        flat = np.concatenate(chunks) if chunks else np.empty(0, np.int64)
        return flat.reshape(len(values), len(flat) // max(1, len(values))) if lists else flat

    def binaries(self, column: str) -> Binaries:
        """Access to a large_binary column without copying it."""
        chunks = self.table.column(column).chunks
        return Binaries(
            ends=np.cumsum([len(chunk) for chunk in chunks], dtype=np.int64),
            offsets=[_offsets(chunk) for chunk in chunks],
            values=[chunk.buffers()[2] for chunk in chunks],
        )


@dataclass(frozen=True, kw_only=True)
class Binaries:
    """A binary column in its memory maps, as lists with one entry for each part of the store.

    ends     (parts,) int64: the number of the first row behind the part
    offsets  (rows of the part + 1,) int64: where each row's bytes start and the last one's end
    values   the bytes of all rows of the part
    """

    ends: np.ndarray
    offsets: list[np.ndarray]
    values: list[pa.Buffer]

    def __getitem__(self, row: int) -> pa.Buffer:
        """The bytes of `row`, still in the memory map."""
        part = int(np.searchsorted(self.ends, row, side="right"))
        offsets = self.offsets[part]
        at = row - int(self.ends[part]) + len(offsets) - 1
        start = int(offsets[at])
        return self.values[part].slice(start, int(offsets[at + 1]) - start)


def _offsets(chunk: pa.LargeBinaryArray) -> np.ndarray:
    """Byte offsets, shape (rows + 1,)."""
    return np.frombuffer(chunk.buffers()[1], np.int64, len(chunk) + 1, chunk.offset * 8)


@contextmanager
def storage_errors(folder: Path, what_failed: str) -> Iterator[None]:
    """Turns an OSError into a StorageError that names the cache folder and says what would help."""
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"cache folder {folder}: {what_failed}: {error.strerror or error}. All that was written there"
            " before is kept and used by the next run. Free some space or permit access, or choose another"
            " folder with --cache_dir"
        ) from error


def _new_stem() -> str:
    """A file name without suffix that no other writer uses, and by which parts sort by age."""
    return f"{time.time_ns():020d}-{uuid.uuid4().hex[:12]}"


def _write(folder: Path, stem: str, content: pa.Buffer) -> None:
    partial, part = folder / (stem + PARTIAL), folder / (stem + PART)
    try:
        with _locked(partial) as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            rename_file(partial, part)
    except OSError:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise
    flush_folder(folder)


@contextmanager
def _locked(partial: Path) -> Iterator[Any]:
    """A new file, locked while it is written, by which others tell it from one that a killed process left."""
    while True:
        with open(partial, "wb") as file:
            # On a file system without locks, no other process can lock the file either, and so none removes it.
            with suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX)
            # Another process may have removed the file between its creation and the lock.
            if partial.exists():
                yield file
                return


def _remove_if_abandoned(partial: Path) -> None:
    """Remove a part that a killed process left behind: an old one that nobody holds the lock of."""
    with suppress(OSError), open(partial, "r+b") as file:
        if time.time() - os.fstat(file.fileno()).st_mtime < ABANDONED_SECONDS:
            return
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        partial.unlink()
