"""How long a WAV file should be by its header, and how long it is: libsndfile accepts one that is cut off."""

from __future__ import annotations

import io
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

MAX_CHUNKS = 4096  # a real file has a few; a sparse file of zeros would offer one every 8 bytes


@dataclass(frozen=True, kw_only=True)
class WavLayout:
    """The data chunk of a RIFF file, which holds the samples.

    size_at     where in the file the chunk's size stands, 4 bytes; in bytes from the start
    data_bytes  size of the chunk by the header
    held_bytes  bytes from the chunk's start to the end of the file
    streamed    whether the size is a placeholder of a program that could not know it, and so says nothing
    unclosed    whether that placeholder is 0, where libsndfile by itself would read no sample
    """

    size_at: int
    data_bytes: int
    held_bytes: int
    streamed: bool
    unclosed: bool


def wav_layout(descriptor: int, file_bytes: int) -> WavLayout | None:
    """The data chunk of the open file, found by walking its chunks; None if it has none or is no RIFF file.

    Source: Multimedia Programming Interface 1.0 (RIFF, chunks padded to even sizes), EBU Tech 3306 (RF64).
    """
    head = os.pread(descriptor, 12, 0)
    if len(head) < 12 or head[:4] not in (b"RIFF", b"RIFX", b"RF64", b"BW64") or head[8:] != b"WAVE":
        return None
    order: Literal["big", "little"] = "big" if head[:4] == b"RIFX" else "little"
    riff_bytes, at, long_bytes = int.from_bytes(head[4:8], order), 12, None
    for _ in range(MAX_CHUNKS):
        chunk = os.pread(descriptor, 24, at)
        if len(chunk) < 8:
            return None
        size = int.from_bytes(chunk[4:8], order)
        if chunk[:4] == b"ds64" and len(chunk) == 24:
            long_bytes = int.from_bytes(chunk[16:24], order)
        if chunk[:4] == b"data":
            held = file_bytes - at - 8
            if size == 0xFFFFFFFF and long_bytes is not None:
                return WavLayout(size_at=at + 4, data_bytes=long_bytes, held_bytes=held,
                                  streamed=long_bytes == 0, unclosed=False)
            unclosed = size == 0 and held > 0 and riff_bytes + 8 < file_bytes
            return WavLayout(size_at=at + 4, data_bytes=size, held_bytes=held,
                              streamed=_is_placeholder(size), unclosed=unclosed)
        at += 8 + size + size % 2
    return None


def _is_placeholder(size: int) -> bool:
    """Whether a program that wrote into a pipe left this size, unable to seek back and correct it.

    ffmpeg leaves 2^32 - 1, sox 0x7FFFF000, arecord 2^31.
    """
    return size == 0 or size >= 0xFFFF0000 or 0x7FFF0000 <= size <= 0x80000000


class UnclosedWav(io.FileIO):
    """A WAV file in which the data size of 0 is read as 2^32 - 1, which libsndfile takes for "to the file's end"."""

    def __init__(self, path: Path, size_at: int):
        super().__init__(path, "rb")
        self._size_at = size_at

    def readinto(self, buffer) -> int:  # type: ignore[no-untyped-def]
        start = self.tell()
        count = super().readinto(buffer) or 0
        for at in range(max(start, self._size_at), min(start + count, self._size_at + 4)):
            memoryview(buffer).cast("B")[at - start] = 0xFF
        return count
