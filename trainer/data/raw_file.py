"""The bytes of a sound, whether they lie in a file or in memory, as an open file that every decoder can read."""

from __future__ import annotations

import errno
import io
import os
import stat
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trainer.data.audio_fault import ONLINE_ONLY, AudioFault, not_here, unreadable


@contextmanager
def raw_file(sound: Path | bytes) -> Iterator[io.FileIO]:
    """The open file, unbuffered and at its start; raises AudioFault for what is no regular file, empty, or cannot be
    opened. Bytes become a file without a name, in memory where the system can do that.

    An AudioFault that is raised while it is open becomes `not_here` where none of its bytes are on the disk.
    """
    try:
        if isinstance(sound, bytes):
            file = _file_of(sound)
        else:
            # Before open(), which waits for ever on a pipe into which nobody writes.
            if not stat.S_ISREG(os.stat(sound).st_mode):
                raise AudioFault("not a file", "a folder, pipe or device: put a sound file in its place")
            file = io.FileIO(sound)
    except OSError as error:
        raise unreadable(error) from error
    with file:
        if os.fstat(file.fileno()).st_size == 0:
            raise AudioFault("unreadable", f"zero bytes: copy or export it again. {ONLINE_ONLY}")
        try:
            yield file
        except AudioFault:
            # Asked only of a file that is no sound: some file systems keep a small one without a block of its own.
            if os.fstat(file.fileno()).st_blocks == 0:
                # As if the system had failed: it may be fetched without a change of its size and date.
                raise not_here() from OSError(errno.ENODATA, "no bytes")
            raise


class FileView(io.RawIOBase):
    """`head`, and behind it the bytes from `start` to `end` of an open file, as a file that can be read and searched.

    The open file's own place is left alone.
    """

    def __init__(self, descriptor: int, start: int, end: int, head: bytes = b""):
        self._descriptor = os.dup(descriptor)
        self._head = head
        self._shift = len(head) - start
        self._size = end + self._shift
        self._at = 0

    def readable(self) -> bool:
        """True."""
        return True

    def seekable(self) -> bool:
        """True."""
        return True

    def tell(self) -> int:
        """The place of the next byte."""
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """As of any file."""
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        self._at = max(0, start + offset)
        return self._at

    def readinto(self, buffer) -> int:  # type: ignore[no-untyped-def]
        """As of any file: fewer bytes than asked for only at the end."""
        view = memoryview(buffer).cast("B")
        wanted = max(0, min(len(view), self._size - self._at))
        done = min(wanted, max(0, len(self._head) - self._at))
        view[:done] = self._head[self._at : self._at + done]
        while done < wanted:
            count = os.preadv(self._descriptor, [view[done:wanted]], self._at + done - self._shift)
            if count == 0:
                break
            done += count
        self._at += done
        return done

    def close(self) -> None:
        """Close the file."""
        if not self.closed:
            os.close(self._descriptor)
        super().close()


def _file_of(sound: bytes) -> io.FileIO:
    """A file without a name that holds these bytes, at its start."""
    if sys.platform == "linux":
        descriptor = os.memfd_create("sound")
    else:
        descriptor, name = tempfile.mkstemp()
        os.unlink(name)
    file, rest = io.FileIO(descriptor, "r+b"), memoryview(sound)
    while rest:
        rest = rest[file.write(rest) :]
    file.seek(0)
    return file
