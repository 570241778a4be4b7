"""Where a clip's sound lies: in a file of its own, or in a row of a table; and how either is opened.

A reference is the absolute path of a file; or that of a Parquet or Arrow file, NUL, "row N", NUL and the name of the
column. No path holds a NUL, so that the first one tells.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa

from trainer.data.audio_fault import AudioFault, unreadable
from trainer.data.table_file import Cell, TableFile, cell_at, open_table

SEPARATOR = b"\0"
ROW = b"row "
# Row groups that stay decoded. Rows are asked for in their order by a few threads at once, which may be on both sides
# of a group's end. Writers make a group of 100 rows or 100 MB.
GROUPS_KEPT = 2


def row_reference(table: str, row: int, column: str) -> bytes:
    """The reference to the sound in `column` of row `row`, counted from 0, of the table at this absolute path."""
    return SEPARATOR.join((os.fsencode(table), ROW + str(row).encode(), column.encode()))


def file_of(reference: bytes) -> bytes:
    """The path of the file that holds the sound: the reference itself, or that of its table."""
    return reference.partition(SEPARATOR)[0]


def reading_order(reference: bytes) -> tuple[bytes, int]:
    """Sorts references so that the rows of a table stand in its order, and leaves files where they are (all equal)."""
    table, separator, rest = reference.partition(SEPARATOR)
    return (table, _row_and_column(rest)[0]) if separator else (b"", 0)


def sound_at(reference: bytes) -> Path | bytes:
    """The file, or the bytes of one that a row holds; where a row names a file beside its table, that file.

    Of a table, only the row group with this row is read. Raises AudioFault where the table cannot be read or the row
    holds no sound.
    """
    table, separator, rest = reference.partition(SEPARATOR)
    path = os.fsdecode(table)
    if not separator:
        return Path(path)
    row, column = _row_and_column(rest)
    try:
        cell = _cell(path, row, column)
    except (pa.ArrowException, IndexError) as error:
        name = os.path.basename(path)
        raise AudioFault("unreadable", f"row {row} of {name} cannot be read ({error}): fetch the file again") from error
    except OSError as error:
        raise unreadable(error) from error
    if cell.content is not None:
        return cell.content
    found = file_beside(path, cell.path)
    if found is None:
        raise AudioFault("unreadable", no_sound(cell.path))
    return Path(found)


def file_beside(table: str, named: str | None) -> str | None:
    """The absolute path of the file that a row names, beside its table or one folder up; None where it is not there."""
    if not named or "\0" in named:
        return None
    folder = os.path.dirname(table)
    for start in (folder, os.path.dirname(folder)):
        path = os.path.normpath(os.path.join(start, named))
        if os.path.isfile(path):
            return path
    return None


def no_sound(named: str | None) -> str:
    """What is said of a row without bytes, whose file is not there either."""
    if not named:
        return "the row holds no sound: take it out"
    return f"the row holds no bytes, and the file {named!r} that it names is not beside the table: add it"


def forget_tables() -> None:
    """Let go of the row groups in memory; what is asked for after this is read again."""
    with _LOCK:
        _GROUPS.clear()
        _ends.cache_clear()


_LOCK = threading.Lock()  # so that threads which want rows of one group decode it once
_GROUPS: OrderedDict[tuple[str, int, int, str], pa.ChunkedArray] = OrderedDict()


def _row_and_column(rest: bytes) -> tuple[int, str]:
    row, _, column = rest.partition(SEPARATOR)
    return int(row.removeprefix(ROW)), column.decode()


def _cell(path: str, row: int, column: str) -> Cell:
    with _LOCK:
        changed_ns = os.stat(path).st_mtime_ns
        ends = _ends(path, changed_ns)
        group = int(np.searchsorted(ends, row, side="right"))
        if group >= len(ends):
            raise IndexError(f"the table has {int(ends[-1]) if len(ends) else 0} rows")
        key = (path, changed_ns, group, column)
        if key not in _GROUPS:
            while len(_GROUPS) >= GROUPS_KEPT:
                _GROUPS.popitem(last=False)
            _GROUPS[key] = _table(path).column(group, column)
        _GROUPS.move_to_end(key)
        values = _GROUPS[key]
    return cell_at(values, row - (int(ends[group - 1]) if group else 0))


@lru_cache(maxsize=64)
def _ends(path: str, changed_ns: int) -> np.ndarray:
    """The number of the first row behind each group, (groups,) int64; `changed_ns` makes a changed file another."""
    return np.cumsum(_table(path).group_rows, dtype=np.int64)


def _table(path: str) -> TableFile:
    return open_table(path)
