"""Tags of sound files: what is read of each format, how it is cleaned, and that no header makes it fail or hang."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.data.tags import VALUE_CHARACTERS, read_tags, read_tags_of, written_key


def frame(name: bytes, content: bytes) -> bytes:
    return name + struct.pack(">I", len(content)) + b"\0\0" + content


def text_frame(name: bytes, text: str) -> bytes:
    return frame(name, b"\x01\xff\xfe" + text.encode("utf-16-le"))


def id3(*frames: bytes) -> bytes:
    """An ID3v2.3 tag. Source: id3.org/id3v2.3.0, sections 3.1 to 3.3."""
    size = len(b"".join(frames))
    return b"ID3\x03\0\0" + bytes((size >> shift) & 127 for shift in (21, 14, 7, 0)) + b"".join(frames)


def comments(*items: str) -> bytes:
    """A Vorbis comment header. Source: xiph.org/vorbis/doc/v-comment.html."""
    raw = [item.encode("utf-8", "surrogateescape") for item in items]
    body = b"".join(struct.pack("<I", len(item)) + item for item in raw)
    return struct.pack("<I", 4) + b"test" + struct.pack("<I", len(raw)) + body


def flac(*items: str, picture: bytes = b"") -> bytes:
    block = comments(*items)
    image = b"\0\0\0\3" + b"\0\0\0\0" * 2 + b"\0" * 16 + struct.pack(">I", len(picture)) + picture
    return b"fLaC\x06" + struct.pack(">I", len(image))[1:] + image + b"\x84" + struct.pack(">I", len(block))[1:] + block


def ogg(*packets: bytes) -> bytes:
    """Pages of one Ogg stream, without check sums. Source: RFC 3533, section 6."""
    pages = b""
    for packet in packets:
        chunks = [packet[start : start + 255 * 254] for start in range(0, len(packet) + 1, 255 * 254)]
        for number, chunk in enumerate(chunks):
            sizes = [255] * (len(chunk) // 255) + ([len(chunk) % 255] if number == len(chunks) - 1 else [])
            pages += b"OggS\0\0" + struct.pack("<qIII", 0, 1, 0, 0) + bytes([len(sizes), *sizes]) + chunk
    return pages


def atom(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content) + 8) + name + content


def m4a(*entries: bytes) -> bytes:
    meta = atom(b"meta", bytes(4) + atom(b"ilst", b"".join(entries)))
    return atom(b"ftyp", b"M4A ") + atom(b"moov", atom(b"udta", meta))


def data_atom(text: str) -> bytes:
    return atom(b"data", struct.pack(">II", 1, 0) + text.encode())


def wav(*chunks: tuple[bytes, bytes]) -> bytes:
    body = b"WAVE"
    for name, part in chunks:
        body += name + struct.pack("<I", len(part)) + part + bytes(len(part) % 2)
    return b"RIFF" + struct.pack("<I", len(body)) + body


MP3_TAG = id3(text_frame(b"TIT2", "Räuber"), text_frame(b"TBPM", "92.0"), text_frame(b"TKEY", "F#m"),
              text_frame(b"TCON", "(17)"), text_frame(b"TMOO", "calm"), text_frame(b"TYER", "2019-03-01"))  # fmt: skip
TAGGED = {"title": "Räuber", "bpm": "92", "key": "F# minor", "genre": "Rock", "mood": "calm", "year": "2019"}
VORBIS = ("title=Räuber", "BPM=92", "initialkey=F#m", "GENRE=Rock", "Mood=calm", "DATE=2019-03-01")
RIFF = b"INFO" + b"".join(
    name + struct.pack("<I", len(text)) + text + bytes(len(text) % 2)
    for name, text in ((b"INAM", "Räuber".encode()), (b"IBPM", b"92"), (b"IGNR", b"Rock"), (b"ICRD", b"2019"))
)
PICTURE = "METADATA_BLOCK_PICTURE=" + "A" * 400_000
FILES = {
    "mp3": MP3_TAG,
    "flac": flac(*VORBIS, picture=bytes(300_000)),
    "opus": ogg(b"OpusHead\1\2" + bytes(10), b"OpusTags" + comments(*VORBIS, PICTURE)),
    "vorbis": ogg(b"\1vorbis" + bytes(23), b"\3vorbis" + comments(*VORBIS)),
    "m4a": m4a(
        atom(b"covr", atom(b"data", bytes(8) + bytes(300_000))), atom(b"\xa9nam", data_atom("Räuber")),
        atom(b"tmpo", atom(b"data", struct.pack(">IIH", 21, 0, 92))), atom(b"\xa9gen", data_atom("Rock")),
        atom(b"----", atom(b"name", bytes(4) + b"initialkey") + data_atom("F#m")), atom(b"\xa9day", data_atom("2019")),
        atom(b"----", atom(b"name", bytes(4) + b"MOOD") + data_atom("calm")),
    ),
    "wav with ID3": wav((b"data", bytes(100)), (b"id3 ", MP3_TAG)),
    "wav": wav((b"LIST", RIFF), (b"data", bytes(100))),
}  # fmt: skip


@pytest.mark.parametrize("kind", FILES)
def test_the_tags_of_each_format_are_read_as_the_same_fields(kind: str, tmp_path: Path) -> None:
    expected = {field: TAGGED[field] for field in ("title", "bpm", "genre", "year")} if kind == "wav" else TAGGED
    (tmp_path / "a.bin").write_bytes(FILES[kind])  # told by content, whatever the name
    assert read_tags(tmp_path / "a.bin") == read_tags_of(FILES[kind]) == expected


@pytest.mark.parametrize("format", ["WAV", "FLAC", "OGG", "MP3", "AIFF"])
def test_what_libsndfile_writes_into_a_file_is_read(format: str, tmp_path: Path) -> None:
    path = tmp_path / "a.x"
    with soundfile.SoundFile(path, "w", 44100, 1, format=format) as file:
        file.title, file.artist = "Slow River", "Ann"  # type: ignore[attr-defined]
        file.write(np.zeros(44100, np.float32))
    assert {"title": "Slow River", "artist": "Ann"}.items() <= read_tags(path).items()


def test_files_without_tags_or_that_are_none_give_nothing(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "text").write_text("no sound")
    os.mkfifo(tmp_path / "pipe")
    for name in ("empty", "text", "pipe", "missing", "."):
        assert read_tags(tmp_path / name) == {}
    soundfile.write(tmp_path / "plain.wav", np.zeros(100), 8000)
    assert read_tags(tmp_path / "plain.wav") == {}


def test_values_are_single_clean_lines_of_bounded_length() -> None:
    tags = read_tags_of(flac(
        "title=a\r\n\tb\x00c\x1b[31m \u202ed\ufeff \udcff", "genre=Rock", "genre=rock", "genre=Jazz",
        "artist=Unknown Artist",
        "album=" + "long word " * 400, "lyrics=words that are sung", "bpm=0", "date=n/a", "comment=   ",
    ))  # fmt: skip
    assert tags["title"] == "a b c[31m d"
    assert tags["genre"] == "Rock, Jazz", "a value that is there twice stands once"
    assert len(tags["album"]) <= VALUE_CHARACTERS and tags["album"].endswith("word")
    assert set(tags) == {"title", "genre", "album"}


@pytest.mark.parametrize(
    ("text", "key"),
    [("Am", "A minor"), ("a min", "A minor"), ("A-moll", "A minor"), ("8A", "A minor"), ("08B", "C major"),
     ("C", "C major"), ("Bb", "Bb major"), ("Ebmaj", "Eb major"), ("F# minor", "F# minor"), ("12B", "E major"),
     ("o", "o"), ("13A", "13A"), ("off-key", "off-key")],
)  # fmt: skip
def test_keys_are_written_out(text: str, key: str) -> None:
    assert written_key(text) == key


def hostile(kind: str) -> bytes:
    """Headers that would take tinytag minutes or gigabytes, were its reads not bounded."""
    many = [f"title={number}" for number in range(200_000)]
    synced = frame(b"SYLT", b"\1eng\2\0" + b"\1\0\0\1" * 100_000)
    return {
        "a title of 200,000 values": id3(frame(b"TIT2", b"\0" + "\0".join(many).encode())),
        "200,000 titles": ogg(b"OpusHead\1\2" + bytes(10), b"OpusTags" + comments(*many)),
        "200,000 titles in flac": b"fLaC\x84\xff\xff\xff" + comments(*many),
        "200,000 moods": m4a(atom(b"----", atom(b"name", bytes(4) + b"MOOD") + b"".join(map(data_atom, many)))),
        "sung words": id3(synced),
        "a length of 4 GB": flac("title=x")[:-15] + struct.pack("<I", 2**32 - 1),
        "a count of 4 billion": b"fLaC\x84\xff\xff\xff" + struct.pack("<II", 0, 2**32 - 1),
        "an atom of 16 EB": atom(b"ftyp", b"M4A ") + struct.pack(">I4sQ", 1, b"moov", 2**63) + bytes(99),
    }[kind]


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "kind",
    ["a title of 200,000 values", "200,000 titles", "200,000 titles in flac", "200,000 moods", "sung words",
     "a length of 4 GB", "a count of 4 billion", "an atom of 16 EB"],
)  # fmt: skip
def test_no_header_makes_reading_long_or_large(kind: str) -> None:
    for values in read_tags_of(hostile(kind)).values():
        assert len(values) <= VALUE_CHARACTERS


def damaged(kind: str, cuts: list[tuple[int, bytes]], length: int) -> None:
    raw = bytearray(FILES[kind][:4000])
    for place, patch in cuts:
        raw[place % len(raw) : place % len(raw) + len(patch)] = patch
    for value in read_tags_of(bytes(raw[: length % (len(raw) + 1)]) if length else bytes(raw)).values():
        assert value and len(value) <= VALUE_CHARACTERS and value == " ".join(value.split())


CUTS = st.lists(st.tuples(st.integers(0, 4000), st.binary(min_size=1, max_size=8)), max_size=6)


@settings(max_examples=400, derandomize=True, deadline=None)
@given(st.sampled_from(sorted(FILES)), CUTS, st.integers(0, 4000))
def test_damaged_headers_give_clean_fields_or_none(kind: str, cuts: list[tuple[int, bytes]], length: int) -> None:
    damaged(kind, cuts, length)


@pytest.mark.full
@settings(max_examples=50_000, derandomize=False, deadline=None)
@given(st.sampled_from(sorted(FILES)), CUTS, st.integers(0, 4000))
def test_damaged_headers_give_clean_fields_for_long(kind: str, cuts: list[tuple[int, bytes]], length: int) -> None:
    damaged(kind, cuts, length)
