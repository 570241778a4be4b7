"""Files and folders that are there whole or not at all: written beside their place, flushed to disk, and renamed.

A process that is killed at any moment leaves the former content or the new one, and at worst a file or folder beside it
whose name ends in `.partial`.

File systems differ in what they can do. What is needed is tried by `check_operations`. Not needed are chmod, links,
locks, flushing a folder, and names that differ by case alone.
"""

from __future__ import annotations

import errno
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PARTIAL, FORMER = ".partial", ".former"
# Errors by which file systems say that they cannot flush a folder: CIFS, FUSE and the mounts of WSL among them.
CANNOT_FLUSH_FOLDERS = (
    *(errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF, errno.EISDIR, errno.EACCES, errno.EPERM),
)


def check_operations(folder: Path, *, whole_files_only: bool = False) -> None:
    """Raise OSError, which says what fails, unless the file system of `folder` can do all that a run needs there.

    That is: making files and folders, flushing a file and renaming it over another one; and, unless nothing but whole
    files is written there, adding to the end of a file, and renaming a folder with files in it. What is tried has names
    of its own, and is gone on return.
    """
    probe = folder / f".probe-{uuid.uuid4().hex}{PARTIAL}"
    renamed, file = probe.with_suffix(FORMER), probe / "file"
    try:
        probe.mkdir()
        write_whole(file, b"1")
        write_whole(file, b"12")
        if whole_files_only:
            return
        with _naming("adding to the end of a file", file):
            with file.open("ab") as end:
                end.write(b"3")
            if file.read_bytes() != b"123":
                raise OSError(errno.EIO, "the file then holds something else")
        rename_folder(probe, renamed)
    finally:
        with suppress(OSError):
            remove(probe)
            remove(renamed)


def write_whole(path: Path, content: bytes, *, shared: bool = False) -> None:
    """Make `path` hold `content`; on OSError it holds what it held before. `shared`: see `replacing`."""
    with replacing(path, shared=shared) as partial:
        partial.write_bytes(content)


@contextmanager
def replacing(path: Path, *, shared: bool = False, flush_entry: bool = True) -> Iterator[Path]:
    """Gives the path of a file to write inside the block; it takes the place of `path` if the block raises nothing.

    shared       whether processes that know nothing of each other may write `path` at the same time. Each then writes
                 beside it under a random name, and the last rename counts. Otherwise the name is that of `path` with
                 .partial, so that the next process writes over what a killed one left
    flush_entry  False where another process waits for `path`, then flushes its folder and may rename it: the folder
                 need not be there any more, once `path` is
    """
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}{PARTIAL}" if shared else path.name + PARTIAL)
    try:
        yield partial
        flush(partial)
        rename_file(partial, path)
        if flush_entry:
            flush_folder(path.parent)
    finally:
        with suppress(OSError):  # it is there only if something failed
            partial.unlink(missing_ok=True)


@contextmanager
def replacing_folder(folder: Path, *, is_ours: Callable[[str], bool]) -> Iterator[Path]:
    """Gives an empty folder to fill inside the block; it takes the place of `folder` if the block raises nothing.

    That takes two renames, because a rename cannot replace a folder that has files in it. Between the two the former
    folder exists as NAME.former only. A process that is killed there leaves it so, and the next call takes it back.

    is_ours  whether a file or folder of this name in the former folder is the program's own, and goes with it where the
             new one has none of that name. Everything else there is the user's, and moves to the new folder
    """
    partial, former = folder.with_name(folder.name + PARTIAL), folder.with_name(folder.name + FORMER)
    for path in (folder, partial, former):
        if path.exists() and not path.is_dir():
            raise FileExistsError(errno.EEXIST, "this file is where a folder has to go: move it", str(path))
    if former.exists() and not folder.exists():
        rename_folder(former, folder)
    if former.exists():
        _retire(former, folder, is_ours)
    remove(partial)
    partial.mkdir(parents=True)
    try:
        yield partial
        for path in sorted(partial.rglob("*")):
            flush_folder(path) if path.is_dir() else flush(path)
        flush_folder(partial)
        if folder.exists():
            rename_folder(folder, former)
        rename_folder(partial, folder)
        flush_folder(folder.parent)
        if former.exists():
            _retire(former, folder, is_ours)
    finally:
        with suppress(OSError):  # it is there only if something failed
            remove(partial)


def _retire(former: Path, folder: Path, is_ours: Callable[[str], bool]) -> None:
    """Remove the former folder once what is the user's in it has moved to the new one. A killed call is repeated."""
    if not former.is_symlink():  # of a link, only the link goes
        kept = (name for name in os.listdir(former) if not is_ours(name))
        for name in set(kept) - set(os.listdir(folder)):
            os.rename(former / name, folder / name)
    remove(former)


def write_once(path: Path, content: bytes) -> None:
    """Make `path` hold `content` unless it exists. Of several processes that try at the same time, the first counts."""
    beside = path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}{PARTIAL}")
    try:
        beside.write_bytes(content)
        flush(beside)
        try:
            os.link(beside, path)  # not os.replace: a link fails where the name exists, on NFS too
        except FileExistsError:
            pass
        except OSError:  # this file system has no hard links
            if not is_there(path):
                rename_file(beside, path)
    finally:
        with suppress(OSError):
            beside.unlink(missing_ok=True)


def remove(path: Path) -> None:
    """Remove a file, a folder with all that is in it, or a link and not what it leads to. An absent one is no error."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def rename_file(path: Path, target: Path) -> None:
    """os.replace, with an error that says what failed."""
    with _naming("renaming a file", path):
        os.replace(path, target)


def rename_folder(path: Path, target: Path) -> None:
    """os.rename, with an error that says what failed."""
    with _naming("renaming a folder", path):
        os.rename(path, target)


def flush(path: Path) -> None:
    """Return once the content of a file is on the disk."""
    # Opened for writing, because CIFS (Linux before 5.13) does not flush what was opened for reading.
    descriptor = os.open(path, os.O_RDWR)
    try:
        with _naming("flushing a file (fsync)", path):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush_folder(folder: Path) -> None:
    """Flush the entries of a folder, so that a rename in it survives a power cut, where the file system can do that."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in CANNOT_FLUSH_FOLDERS:
            raise


def names_in(folder: Path) -> list[str]:
    """The names in a folder, as they are now on the server; [] where there is no such folder.

    NFS remembers for up to a minute that a name does not exist. Listing the folder that has the name asks anew.
    Therefore processes look so for what another machine writes, and not by Path.exists().
    """
    try:
        return os.listdir(folder)
    except FileNotFoundError:
        if folder == folder.parent or folder.name not in names_in(folder.parent):
            return []
    try:
        return os.listdir(folder)
    except FileNotFoundError:  # a link that leads nowhere, or removed by now
        return []


def is_there(path: Path) -> bool:
    """Whether a file or folder of this name is there now, on any machine: see `names_in`."""
    return path.name in names_in(path.parent)


def appears(path: Path, seconds: float) -> bool:
    """Whether `path` is there, or comes within so many seconds, as what another machine has written may."""
    deadline = time.monotonic() + seconds
    while not is_there(path):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


@contextmanager
def _naming(operation: str, path: Path) -> Iterator[None]:
    """Puts the operation into an OSError: "Operation not permitted" alone does not say what a mount lacks."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, f"{operation} fails here: {error.strerror}", str(path)) from error
