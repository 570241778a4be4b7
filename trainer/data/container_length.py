"""How many bytes a sound file has by its own header: decoders read what is there and report nothing.

WAV has a module of its own (trainer/data/wav_header.py), Ogg too (trainer/data/ogg_pages.py).
"""

from __future__ import annotations

from collections.abc import Iterator

from trainer.data.audio_fault import COPY_AGAIN, AudioFault
from trainer.data.sound_kind import id3_end
from trainer.data.wav_header import MAX_CHUNKS, SPARE_BYTES, read_at

ASF_DATA = bytes.fromhex("3626b2758e66cf11a6d900aa0062ce6c")
EBML_VOID, EBML_SEGMENT = 0xEC, 0x18538067


def check_whole(descriptor: int, file_bytes: int) -> None:
    """Raise AudioFault where the open file is shorter than its header says by more than some bytes, or lacks what it
    cannot be decoded without. A header that says nothing, as of a program that writes into a pipe, is in order."""
    expected = _expected_bytes(descriptor, file_bytes)
    if expected is not None and expected - file_bytes > SPARE_BYTES:
        raise AudioFault("truncated", f"holds {file_bytes:,} of {expected:,} bytes: {COPY_AGAIN}")


def counts_frames(descriptor: int) -> bool:
    """Whether the first frame of an MPEG audio file says how many there are (Xing, Info of LAME, VBRI of Fraunhofer).

    Without, a decoder estimates the length from the first frames.
    """
    head = read_at(descriptor, 256, id3_end(descriptor))
    return any(mark in head for mark in (b"Xing", b"Info", b"VBRI"))


def _expected_bytes(descriptor: int, file_bytes: int) -> int | None:
    """Where the sound ends by the header, in bytes from the file's start; None where that is not said."""
    head = read_at(descriptor, 16, 0)
    if head[:4] == b"FORM" and head[8:12] in (b"AIFF", b"AIFC"):
        return _end_of(b"SSND", _chunks(descriptor, 12, 4, 4, 2))
    if head[:4] == b"caff":
        return _end_of(b"data", _chunks(descriptor, 8, 4, 8, 1))
    if head[:4] == b"riff" and head[4:8] == b"\x2e\x91\xcf\x11":
        return _end_of(b"data", _w64_chunks(descriptor))
    if head[:4] in (b".snd", b"dns."):
        order = "big" if head[:1] == b"." else "little"
        start, count = (int.from_bytes(head[at : at + 4], order) for at in (4, 8))  # type: ignore[arg-type]
        return start + count if count != 0xFFFFFFFF else None
    if head[:4] == b"RIFF" and head[8:12] == b"AVI ":
        count = int.from_bytes(head[4:8], "little")
        return 8 + count if 0 < count < 0xFFFFFFF0 else None
    if head[:4] == b"\x1a\x45\xdf\xa3":
        return _matroska_end(descriptor)
    if head[:8] == b"\x30\x26\xb2\x75\x8e\x66\xcf\x11":
        at = int.from_bytes(read_at(descriptor, 8, 16), "little")
        second = read_at(descriptor, 24, at) if at < file_bytes else b""
        count = int.from_bytes(second[16:], "little")
        return at + count if second[:16] == ASF_DATA and count > 50 else None
    if head[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot"):
        return _mp4_end(descriptor, file_bytes)
    return None


def _end_of(name: bytes, chunks: Iterator[tuple[bytes, int, int]]) -> int | None:
    """The end of the first chunk of this name whose size is none that a program left for want of a better one."""
    return next((end for found, end, size in chunks if found == name and size not in (0, -1, 0xFFFFFFFF)), None)


def _chunks(descriptor: int, at: int, name_bytes: int, size_bytes: int, align: int) -> Iterator[tuple[bytes, int, int]]:
    """Name, end and size of each big-endian chunk from `at` on. Sources: AIFF-C draft 1991; Apple's CAF 1.0."""
    for _ in range(MAX_CHUNKS):
        head = read_at(descriptor, name_bytes + size_bytes, at)
        if len(head) < name_bytes + size_bytes:
            return
        size = int.from_bytes(head[name_bytes:], "big", signed=size_bytes == 8)
        end = at + len(head) + size
        yield head[:name_bytes], end, size
        if size < 0:
            return
        at = end + -size % align


def _w64_chunks(descriptor: int) -> Iterator[tuple[bytes, int, int]]:
    """Name, end and size of each chunk: names are GUIDs that begin with the name in WAV, sizes count their head."""
    at = 40
    for _ in range(MAX_CHUNKS):
        head = read_at(descriptor, 24, at)
        size = int.from_bytes(head[16:], "little")
        if len(head) < 24 or size < 24:
            return
        yield head[:4], at + size, size - 24
        at += size + -size % 8


def _matroska_end(descriptor: int) -> int | None:
    """The end of the segment, which holds all but the header. Source: RFC 8794 (EBML), section 4 to 6."""
    at = 0
    for _ in range(16):
        head = read_at(descriptor, 12, at)
        id_bytes = 9 - head[0].bit_length() if head and head[0] else 9
        size_at = head[id_bytes:]
        if id_bytes > 4 or not size_at or size_at[0] == 0:
            return None
        size_bytes = 9 - size_at[0].bit_length()
        name = int.from_bytes(head[:id_bytes], "big")
        mask = (1 << 7 * size_bytes) - 1
        size = int.from_bytes(size_at[:size_bytes], "big") & mask
        end = at + id_bytes + size_bytes + size
        if name == EBML_SEGMENT:
            return end if size != mask else None  # all bits set: not known when the head was written
        if at and name != EBML_VOID:
            return None
        at = end
    return None


def _mp4_end(descriptor: int, file_bytes: int) -> int | None:
    """The end of the last box. Raises AudioFault without the table of samples, which programs write last.

    Source: ISO 14496-12, section 4.2.
    """
    at, names = 0, set[bytes]()
    for _ in range(1 << 20):  # of fragments there may be one per second
        head = read_at(descriptor, 16, at)
        if len(head) < 8 or not all(32 <= byte < 127 or byte == 0xA9 for byte in head[4:8]):
            break
        size = int.from_bytes(head[:4], "big")
        if size == 1:
            size = int.from_bytes(head[8:], "big")
        names.add(head[4:8])
        if size < 8:  # 0: to the end of the file
            break
        at += size
        if at > file_bytes:
            break
    if b"moov" not in names and b"moof" not in names:
        detail = f"has no table of its samples (moov), which is written last: {COPY_AGAIN}"
        raise AudioFault("truncated", detail)
    return at
