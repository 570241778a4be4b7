"""The pages of an Ogg file, which decoders pass over in silence where they are damaged or missing."""

from __future__ import annotations

import io
import zlib

from trainer.data.audio_fault import COPY_AGAIN, AudioFault
from trainer.data.raw_file import FileView
from trainer.data.sound_kind import id3_end

FIRST, LAST = 2, 4  # flags of a stream's first and last page
_REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


def sounds_in(descriptor: int, file_bytes: int) -> list[tuple[int, int]]:
    """Where each sound of an open Ogg file begins and ends, in bytes: several where files were joined ("chained").

    Source: RFC 3533. Raises AudioFault for a damaged page, and where the last page is missing.
    """
    start = id3_end(descriptor)
    starts, open_streams, in_heads, at = [start], set[bytes](), True, start
    with io.BufferedReader(FileView(descriptor, 0, file_bytes), 1 << 20) as file:
        file.seek(start)
        while True:
            head = file.read(27)
            if head[:4] != b"OggS" or len(head) < 27:
                if b"OggS" in head[4:] + file.read(1 << 20):
                    raise _damaged(at)
                break  # a tag of another program, or nothing; `open_streams` shows whether pages are missing
            table = file.read(head[26])
            body = file.read(sum(table))
            if len(table) < head[26] or len(body) < sum(table):
                break
            if _checksum(head[:22] + bytes(4) + head[26:] + table + body) != int.from_bytes(head[22:26], "little"):
                raise _damaged(at)
            flags, serial = head[5], head[14:18]
            if flags & FIRST:
                if not in_heads:
                    starts.append(at)
                    open_streams.clear()
                open_streams.add(serial)
            in_heads = bool(flags & FIRST)
            if flags & LAST:
                open_streams.discard(serial)
            at += 27 + len(table) + len(body)
    if open_streams:
        detail = f"ends at byte {at:,} without its last page: {COPY_AGAIN}"
        raise AudioFault("truncated", detail)
    return list(zip(starts, [*starts[1:], file_bytes], strict=True))


def _damaged(at: int) -> AudioFault:
    return AudioFault("truncated", f"damaged: the Ogg page at byte {at:,} is not as it was written: {COPY_AGAIN}")


def _checksum(page: bytes) -> int:
    """The CRC-32 of RFC 3533 (polynomial 0x04C11DB7, highest bit first, from 0), by that of zlib, which is its mirror
    image and begins and ends with all bits set."""
    mirrored = zlib.crc32(page.translate(_REVERSED), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return int(f"{mirrored:032b}"[::-1], 2)
