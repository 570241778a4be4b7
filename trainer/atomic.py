"""Files and folders that are there whole or not at all: written beside their place, flushed to disk, and renamed.

A process that is killed at any moment leaves the former content or the new one, and at worst a file or folder beside it
whose name ends in `.partial`.
"""

from __future__ import annotations

import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PARTIAL, FORMER = ".partial", ".former"
# Errors by which some network file systems say that they cannot flush a folder.
CANNOT_FLUSH_FOLDERS = (errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES, errno.EPERM)


def write_whole(path: Path, content: bytes, *, shared: bool = False) -> None:
    """Make `path` hold `content`; on OSError it holds what it held before. `shared`: see `replacing`."""
    with replacing(path, shared=shared) as partial:
        partial.write_bytes(content)


@contextmanager
def replacing(path: Path, *, shared: bool = False) -> Iterator[Path]:
    """Gives the path of a file to write inside the block; it takes the place of `path` if the block raises nothing.

    shared  whether processes that know nothing of each other may write `path` at the same time. Each then writes beside
            it under a random name, and the last rename counts. Otherwise the name is that of `path` with .partial, so
            that the next process writes over what a killed one left
    """
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}{PARTIAL}" if shared else path.name + PARTIAL)
    try:
        yield partial
        flush(partial)
        os.replace(partial, path)
        flush_folder(path.parent)
    finally:
        with suppress(OSError):  # it is there only if something failed
            partial.unlink(missing_ok=True)


@contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """Gives an empty folder to fill inside the block; it takes the place of `folder` if the block raises nothing.

    That takes two renames, because a rename cannot replace a folder that has files in it. Between the two the former
    folder exists as NAME.former only. A process that is killed there leaves it so, and the next call takes it back.
    """
    partial, former = folder.with_name(folder.name + PARTIAL), folder.with_name(folder.name + FORMER)
    if former.exists() and not folder.exists():
        os.rename(former, folder)
    for left in (partial, former):
        if left.exists():
            shutil.rmtree(left)
    partial.mkdir(parents=True)
    try:
        yield partial
        for path in sorted(partial.rglob("*")):
            flush_folder(path) if path.is_dir() else flush(path)
        flush_folder(partial)
        if folder.exists():
            os.rename(folder, former)
        os.rename(partial, folder)
        flush_folder(folder.parent)
        if former.exists():
            shutil.rmtree(former)
    finally:
        if partial.exists():
            shutil.rmtree(partial, ignore_errors=True)


def write_once(path: Path, content: bytes) -> None:
    """Make `path` hold `content` unless it exists. Of several processes that try at the same time, the first counts."""
    beside = path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}{PARTIAL}")
    try:
        beside.write_bytes(content)
        flush(beside)
        os.link(beside, path)  # not os.replace: a link fails where the name exists, on NFS too
    except FileExistsError:
        pass
    except OSError:  # this file system has no hard links
        if not path.exists():
            os.replace(beside, path)
    finally:
        with suppress(OSError):
            beside.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Return once the content of a file is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush_folder(folder: Path) -> None:
    """Flush the entries of a folder, so that a rename in it survives a power cut, where the file system can do that."""
    try:
        flush(folder)
    except OSError as error:
        if error.errno not in CANNOT_FLUSH_FOLDERS:
            raise
