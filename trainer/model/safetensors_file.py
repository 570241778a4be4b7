"""Safetensors files, of whose tensors any range is read from an open file.

The library's own way to a range is to open and map the file again for each tensor. That parses the header of the whole
file each time: 6 ms for a checkpoint of `large`, so that one pass over 768 tensors in 64 processes' files took five
minutes (docs/benchmarks.md). One map that is kept instead would count all that was read as memory of the process, and
on a network file system a file that another machine deletes ends a process that reads its map. So the header is
read once, and values are copied from the file.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from trainer.errors import StorageError

# The format's names of what torch has.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
# The most files that `files_kept_open` keeps. A process may usually have 1,024 open in all; files beyond these are
# opened for each read.
MOST_KEPT_OPEN = 512

# The open files of the block that this thread is in.
_kept_open: ContextVar[dict[Path, BinaryIO] | None] = ContextVar("_kept_open", default=None)


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a tensor's values lie in its file: one after the other, from byte `offset` of the file."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int


def read_header(path: Path) -> tuple[dict[str, Place], Mapping[str, str]]:
    """Where each tensor of a safetensors file lies, by name, and the file's metadata.

    Raises SafetensorError where the file is cut or none of the format, OSError where it cannot be read.
    """
    with safe_open(path, framework="numpy"):
        pass  # the library holds the header to the format and to the length of the file
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header: dict[str, Any] = json.loads(file.read(length))
    metadata = header.pop("__metadata__", {})
    if unknown := {entry["dtype"] for entry in header.values()} - DTYPES.keys():
        raise SafetensorError(f"it holds values of the kind {', '.join(sorted(unknown))}, which are not known here")
    places = {
        name: Place(
            shape=tuple(entry["shape"]), dtype=DTYPES[entry["dtype"]], offset=8 + length + entry["data_offsets"][0]
        )
        for name, entry in header.items()
    }
    return places, metadata


@contextmanager
def files_kept_open() -> Iterator[None]:
    """Inside the block, a file that `fill` reads stays open for the next read; all are closed after it.

    For a pass over many tensors, as a block or as the decorator of a function: opening a file costs a round trip or two
    on a network file system. Not for longer, because on such a system a folder cannot be removed while a file in it is
    open. Holds for this thread; in a block within another one, the outer block keeps the files.
    """
    if _kept_open.get() is not None:
        yield
        return
    files: dict[Path, BinaryIO] = {}
    token = _kept_open.set(files)
    try:
        yield
    finally:
        _kept_open.reset(token)
        for file in files.values():
            file.close()


def fill(values: Tensor, path: Path, offset: int) -> None:
    """Fill `values`, contiguous in host memory, from the bytes of the file at `offset`.

    Raises StorageError where the file is gone, cannot be read, or ends before.
    """
    if not math.prod(values.shape):
        return
    try:
        with _opened(path) as file:
            _read_whole(file, offset, values.reshape(-1).view(torch.uint8).numpy().data)
    except OSError as error:
        raise StorageError(
            f"{path} could not be read ({error}): it was there when it was opened first. Run the same command again"
        ) from error


def _read_whole(file: BinaryIO, offset: int, wanted: memoryview) -> None:
    file.seek(offset)
    while wanted:  # one call reads 2 GiB at most
        count = file.readinto(wanted)  # type: ignore[attr-defined]  # of a raw file, see _opened
        if not count:
            raise OSError("the file ends too early")
        wanted = wanted[count:]


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    kept = _kept_open.get()
    if kept is None or (path not in kept and len(kept) >= MOST_KEPT_OPEN):
        with path.open("rb", buffering=0) as file:
            yield file
        return
    if path not in kept:
        kept[path] = path.open("rb", buffering=0)
    yield kept[path]
