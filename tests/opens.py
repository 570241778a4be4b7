"""How often files are opened, counted by the kernel (inotify), whichever library opens them."""

from __future__ import annotations

import ctypes
import os
import struct
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

IN_CLOSE_NOWRITE, IN_OPEN, IN_Q_OVERFLOW = 0x10, 0x20, 0x4000
IN_NONBLOCK = os.O_NONBLOCK


@contextmanager
def counted_opens(folder: Path) -> Iterator[Counter[str]]:
    """How often each file of `folder` was opened inside the block, by its name; filled when the block ends."""
    libc = ctypes.CDLL(None, use_errno=True)
    queue = libc.inotify_init1(IN_NONBLOCK)
    assert queue >= 0
    try:
        # Closing is watched too: the kernel joins equal events that follow each other.
        assert libc.inotify_add_watch(queue, os.fsencode(folder), IN_OPEN | IN_CLOSE_NOWRITE) >= 0
        counts: Counter[str] = Counter()
        yield counts
        for mask, name in _events(queue):
            assert not mask & IN_Q_OVERFLOW, "more events than the kernel keeps"
            if mask & IN_OPEN and name:
                counts[name] += 1
    finally:
        os.close(queue)


def open_now(folder: Path) -> list[str]:
    """Names of the files of `folder` that this process has open."""
    links = [f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd")]
    targets = [Path(os.readlink(link)) for link in links if os.path.lexists(link)]
    return sorted(target.name for target in targets if target.parent == folder.resolve())


def _events(queue: int) -> Iterator[tuple[int, str]]:
    while True:
        try:
            data = os.read(queue, 1 << 20)
        except BlockingIOError:
            return
        while data:
            _, mask, _, length = struct.unpack_from("iIII", data)
            yield mask, os.fsdecode(data[16 : 16 + length].rstrip(b"\0"))
            data = data[16 + length :]
