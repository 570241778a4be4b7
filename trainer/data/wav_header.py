"""Where the sound of a WAV file ends, which its header may not know, and a header for libsndfile that does.

libsndfile believes the header and reports nothing: it reads half a second of a recording whose program never came back
to write the size, and takes a file that is cut off for a whole one.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import Literal

from trainer.data.raw_file import FileView

FORMS = (b"RIFF", b"RIFX", b"RF64", b"BW64")
BEYOND_ANY_FILE = 1 << 62
MAX_CHUNKS = 4096  # a real file has a few; a sparse file of zeros would offer one every 8 bytes
# A header may count itself (44 to 104 bytes), a chunk's head or padding among the samples. A file that lacks no more
# than this is whole.
SPARE_BYTES = 128
TAIL_BYTES = 4 << 20  # of a file whose header does not say where its sound ends: searched for chunks behind the sound
HEADER_BYTES = 16 << 20  # a longer head of a file is not copied into memory, and its size not mended
WRAP = 1 << 32  # sizes are kept modulo this in a RIFF file
# Of samples that lie side by side, so that another number of them is another length and nothing else: PCM, float,
# A-law, mu-law, and what names one of these in an extended header.
PLAIN_CODECS = (1, 3, 6, 7, 0xFFFE)
# Ends the remark on a file of which versions before 2026-11-27 read other samples, see `Sound.reread`.
REREAD = "(earlier versions read other samples)"
APPENDED = "another sound file stands behind its samples, which is not read: save it as a file of its own"

# Chunks that programs write behind the samples. Others are known by leading to the end of the file.
_KNOWN_CHUNKS = (
    *(b"LIST", b"list", b"INFO", b"cue ", b"smpl", b"inst", b"plst", b"labl", b"note", b"ltxt", b"adtl", b"fact"),
    *(b"bext", b"iXML", b"_PMX", b"axml", b"aXML", b"chna", b"umid", b"qlty", b"mext", b"levl", b"link", b"cart"),
    *(b"id3 ", b"ID3 ", b"acid", b"strc", b"DISP", b"PEAK", b"JUNK", b"junk", b"FLLR", b"PAD ", b"afsp", b"ResU"),
    *(b"LGWV", b"minf", b"elm1", b"regn", b"SMED", b"MARK", b"clm "),
)
_KNOWN = re.compile(b"|".join(re.escape(name) for name in _KNOWN_CHUNKS))
_TAGS = (b"ID3", b"TAG", b"APETAGEX")  # of taggers that know no chunks


@dataclass(frozen=True, kw_only=True)
class WavLayout:
    """The data chunk of a RIFF file, which holds the samples. All places are in bytes from the file's start.

    form              RIFF, RIFX (big-endian), RF64 or BW64
    codec             the format tag of the fmt chunk, 0 where there is none
    bytes_per_second  by the fmt chunk, at least 1
    long_at           where the ds64 chunk of an RF64 file holds the size of the samples; 0 without one
    size_at           where the data chunk's size stands, 4 bytes
    data_at           the first sample
    data_bytes        size of the samples by the header
    held_bytes        from the first sample to the end of the file
    streamed          whether the size is a placeholder of a program that could not know it, and so says nothing
    unclosed          whether that placeholder is 0, where libsndfile by itself would read no sample
    """

    form: bytes
    codec: int
    bytes_per_second: int
    long_at: int
    size_at: int
    data_at: int
    data_bytes: int
    held_bytes: int
    streamed: bool
    unclosed: bool


@dataclass(frozen=True, kw_only=True)
class Sound:
    """Where the sound of a WAV file ends.

    end     in bytes from the file's start
    mended  whether libsndfile has to be given another header (`MendedWav`) to read up to there and no further
    reread  whether versions before 2026-11-27 read other samples; codes that they cached are not those of this sound
    remark  what about the header is wrong, and what was done; "" for nothing
    """

    end: int
    mended: bool = False
    reread: bool = False
    remark: str = ""


class CutOff(Exception):
    """A WAV file that lacks samples that its header counts; the message says how many bytes it holds."""


def read_at(descriptor: int, count: int, at: int) -> bytes:
    """Up to `count` bytes from byte `at` of an open file, none beyond its end: headers may name any place at all.

    os.pread raises OverflowError, or gives EOVERFLOW, for places that no file can have.
    """
    return os.pread(descriptor, count, at) if at < BEYOND_ANY_FILE else b""


def wav_layout(descriptor: int, file_bytes: int) -> WavLayout | None:
    """The data chunk of the open file, found by walking its chunks; None if it has none or is no RIFF file.

    Source: Multimedia Programming Interface 1.0 (RIFF, chunks padded to even sizes), EBU Tech 3306 (RF64).
    """
    head = read_at(descriptor, 12, 0)
    if len(head) < 12 or head[:4] not in FORMS or head[8:] != b"WAVE":
        return None
    order = _order(head[:4])
    riff_bytes, at, long_bytes, long_at, codec, rate = int.from_bytes(head[4:8], order), 12, None, 0, 0, 1
    for _ in range(MAX_CHUNKS):
        chunk = read_at(descriptor, 24, at)
        if len(chunk) < 8:
            return None
        size = int.from_bytes(chunk[4:8], order)
        if chunk[:4] == b"ds64" and len(chunk) == 24:
            long_bytes, long_at = int.from_bytes(chunk[16:24], order), at + 16
        if chunk[:4] == b"fmt " and len(chunk) == 24:
            codec, rate = int.from_bytes(chunk[8:10], order), max(1, int.from_bytes(chunk[16:20], order))
        if chunk[:4] == b"data":
            held = file_bytes - at - 8
            is_long = size == 0xFFFFFFFF and long_bytes is not None
            unclosed = size == 0 and held > 0 and riff_bytes + 8 < file_bytes
            return WavLayout(
                form=head[:4], codec=codec, bytes_per_second=rate, long_at=long_at if is_long else 0,
                size_at=at + 4, data_at=at + 8, data_bytes=(long_bytes or 0) if is_long else size, held_bytes=held,
                streamed=long_bytes == 0 if is_long else _is_placeholder(size), unclosed=unclosed,
            )
        at += 8 + size + size % 2
    return None


def sound_of(descriptor: int, file_bytes: int, wav: WavLayout) -> Sound:
    """Where the file's sound ends, by its header or, where that is wrong, by what the file holds.

    Raises CutOff where it lacks more than some bytes that the header counts, as half a file does.
    """
    by_header = wav.data_at + wav.data_bytes
    if wav.streamed and wav.data_bytes == 0 and not (wav.unclosed or wav.long_at):
        return Sound(end=by_header)  # the header is in order: there is no sound, and what follows is something else
    if wav.streamed and not 0 < wav.data_bytes <= wav.held_bytes:
        end = _chunks_at_end(descriptor, wav, file_bytes)
        reread = end < file_bytes or (wav.unclosed and wav.held_bytes >= WRAP)
        seconds = (end - wav.data_at) / wav.bytes_per_second
        remark = f"its header gives no length: its sound ends after {seconds:,.2f} s {REREAD}" if reread else ""
        return Sound(end=end, mended=wav.unclosed or reread, reread=reread, remark=remark)
    if wav.data_bytes > wav.held_bytes:
        return _shorter(descriptor, file_bytes, wav)
    if file_bytes - by_header <= 1:
        return Sound(end=by_header)
    if _chunk_follows(descriptor, wav, by_header, file_bytes):
        # libsndfile opens no such file: it reads the chunks behind the samples too.
        appended = read_at(descriptor, 4, by_header) in FORMS
        return Sound(end=by_header, mended=appended, remark=APPENDED if appended else "")
    end = _wrapped_end(descriptor, file_bytes, wav)
    if end == by_header:
        end = _chunks_at_end(descriptor, wav, file_bytes)
        if _is_padding(descriptor, by_header, end):
            return Sound(end=by_header, remark=f"{end - by_header:,} zero bytes behind its samples are not read")
    if end - by_header < min(wav.data_bytes, wav.bytes_per_second) or not _can_be_mended(wav):
        return Sound(end=by_header, remark=f"{end - by_header:,} bytes behind its samples, by its header, are not read")
    given, found = (size / wav.bytes_per_second for size in (wav.data_bytes, end - wav.data_at))
    remark = f"its header gives {given:,.2f} s and was not updated: all {found:,.2f} s are used {REREAD}"
    return Sound(end=end, mended=True, reread=True, remark=remark)


class MendedWav(FileView):
    """A WAV file as libsndfile would find it if its header were right: sound up to `sound.end`, and nothing behind."""

    def __init__(self, descriptor: int, wav: WavLayout, sound: Sound):
        head = _mended_head(read_at(descriptor, wav.data_at, 0), wav, sound)
        super().__init__(descriptor, wav.data_at, sound.end, head)


def _order(form: bytes) -> Literal["big", "little"]:
    return "big" if form == b"RIFX" else "little"


def _is_placeholder(size: int) -> bool:
    """Whether a program that wrote into a pipe left this size, unable to seek back and correct it.

    ffmpeg leaves 2^32 - 1, sox 0x7FFFF000, arecord 2^31.
    """
    return size == 0 or size >= 0xFFFF0000 or 0x7FFF0000 <= size <= 0x80000000


def _shorter(descriptor: int, file_bytes: int, wav: WavLayout) -> Sound:
    """The sound of a file that ends before its header says; raises CutOff unless only some bytes are missing."""
    missing = wav.data_bytes - wav.held_bytes
    if missing > SPARE_BYTES or missing > wav.held_bytes:
        raise CutOff(f"holds {wav.held_bytes:,} of {wav.data_bytes:,} bytes")
    end = _chunks_at_end(descriptor, wav, file_bytes)
    remark = f"its header counts {missing:,} bytes more than the file has: it is used as it is"
    return Sound(end=end, mended=end < file_bytes, remark=remark)


def _wrapped_end(descriptor: int, file_bytes: int, wav: WavLayout) -> int:
    """Where the samples end if the size of 4 GiB or more was kept modulo 2^32; by the header if nothing shows that.

    What shows it is that the file, or a chunk, ends or begins just there.
    """
    by_header = wav.data_at + wav.data_bytes
    if wav.form in (b"RF64", b"BW64"):
        return by_header
    for end in range(by_header + WRAP, file_bytes + 1, WRAP):
        if file_bytes - end <= 1 or _chunk_follows(descriptor, wav, end, file_bytes):
            return end
    return by_header


def _is_padding(descriptor: int, start: int, end: int) -> bool:
    """Whether all is zeros from `start` to `end`, as in a file that was made larger than its sound."""
    step = 1 << 20
    # Its first part and its last one tell: to read all would double what a file of gigabytes costs.
    places = [*range(start, min(end, start + 16 * step), step), max(start, end - step)]
    return not any(any(read_at(descriptor, min(step, end - place), place)) for place in places)


def _can_be_mended(wav: WavLayout) -> bool:
    """Whether a header can be written that gives another length: not for big-endian files beyond 4 GiB."""
    too_long = wav.form == b"RIFX" and wav.data_at + wav.held_bytes >= WRAP
    return wav.codec in PLAIN_CODECS and wav.data_at <= HEADER_BYTES and not too_long


def _chunk_follows(descriptor: int, wav: WavLayout, end: int, file_bytes: int) -> bool:
    """Whether what stands at `end`, or behind a byte of padding there, is no sound: chunks, or a tagger's tag."""
    for at in (end, end + 1):
        head = read_at(descriptor, 8, at)
        if head[:4] in _KNOWN_CHUNKS or head.startswith(_TAGS) or _leads_to_end(descriptor, wav, at, file_bytes):
            return True
    return False


def _leads_to_end(descriptor: int, wav: WavLayout, at: int, file_bytes: int) -> bool:
    """Whether chunks with printable names stand one behind the other from `at` to the end of the file."""
    places = {at}  # some programs leave out the padding of odd sizes, so that two places are possible
    for _ in range(64):
        following = set()
        for place in places:
            head = read_at(descriptor, 8, place)
            if len(head) < 8 or not all(32 <= byte < 127 for byte in head[:4]):
                continue
            size = int.from_bytes(head[4:8], _order(wav.form))
            ends = {place + 8 + size, place + 8 + size + size % 2}
            if file_bytes in ends:
                return True
            following |= {end for end in ends if end < file_bytes}
        places = following
    return False


def _chunks_at_end(descriptor: int, wav: WavLayout, file_bytes: int) -> int:
    """Where the chunks begin that stand at the very end of the file, which has no say where its sound ends.

    The end of the file where there are none. A known chunk is looked for whose size leads to the end, alone or with
    others behind it: sound that looks so by chance is next to impossible.
    """
    start = max(wav.data_at, file_bytes - TAIL_BYTES)
    tail = read_at(descriptor, file_bytes - start, start)
    for found in _KNOWN.finditer(tail):
        if _can_be_mended(wav) and _leads_to_end(descriptor, wav, start + found.start(), file_bytes):
            return start + found.start()
    return file_bytes


def _mended_head(head: bytes, wav: WavLayout, sound: Sound) -> bytes:
    """All before the samples, with the sizes that `sound` has. Beyond 4 GiB it is that of an RF64 file."""
    data_bytes, order = sound.end - wav.data_at, _order(wav.form)
    if wav.long_at:
        return _with(_with(head, wav.long_at - 8, sound.end - 8, 8), wav.long_at, data_bytes, 8)
    if sound.end < WRAP - SPARE_BYTES or not _can_be_mended(wav):
        riff_bytes, data_bytes = min(sound.end - 8, WRAP - 1), min(data_bytes, WRAP - 1)
        return _with(_with(head, 4, riff_bytes, 4, order), wav.size_at, data_bytes, 4, order)
    # EBU Tech 3306: the sizes stand in a ds64 chunk, which comes first, and 2^32 - 1 in their former places.
    sizes = b"".join(size.to_bytes(8, "little") for size in (sound.end + 36 - 8, data_bytes, 0)) + bytes(4)
    long = b"RF64" + b"\xff" * 4 + b"WAVEds64" + len(sizes).to_bytes(4, "little") + sizes
    return long + _with(head, wav.size_at, WRAP - 1, 4)[12:]


def _with(head: bytes, at: int, value: int, size: int, order: Literal["big", "little"] = "little") -> bytes:
    return head[:at] + value.to_bytes(size, order) + head[at + size :]
