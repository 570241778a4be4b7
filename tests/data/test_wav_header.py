"""Headers that give another length than the file has: what is read, what is said, and under which key it is cached."""

from __future__ import annotations

import hashlib
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import soundfile

from tests.audio_files import noise, pcm16, wav_header
from trainer.data import audio
from trainer.data.wav_header import MendedWav, Sound, sound_of, wav_layout

SECOND = pcm16(1)
GIB = 1 << 30


def chunk(name: bytes, content: bytes) -> bytes:
    return name + struct.pack("<I", len(content)) + content + bytes(len(content) % 2)


CHUNKS = {
    "cue": chunk(b"cue ", struct.pack("<III4sIII", 1, 1, 0, b"data", 0, 0, 0)),
    "smpl": chunk(b"smpl", bytes(36)),
    "LIST": chunk(b"LIST", b"INFO" + chunk(b"ISFT", b"a program")),
    "bext": chunk(b"bext", bytes(602)),
    "id3": chunk(b"id3 ", b"ID3\x04\0\0" + bytes(501)),
    "unknown": chunk(b"Xyz1", b"odd"),
    "several": chunk(b"LIST", b"INFO" + chunk(b"INAM", b"odd")) + chunk(b"smpl", bytes(36)) + chunk(b"id3 ", bytes(99)),
}
CHUNKS["a big id3"] = chunk(b"id3 ", noise(1).tobytes())


def plain_hash(path: Path) -> str:
    return hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()


def samples(path: Path) -> np.ndarray:
    return np.concatenate(list(audio.stream(path, 8_000)))


def expected(raw: bytes, kind: str = "<i2") -> np.ndarray:
    return (np.frombuffer(raw, kind) / 32_768).astype(np.float32)


@pytest.mark.parametrize("spare", [1, 8, 16, 44, 104])
def test_a_header_that_counts_some_bytes_too_many_is_used_with_a_remark(tmp_path: Path, spare: int) -> None:
    path = tmp_path / "x.wav"
    path.write_bytes(wav_header(len(SECOND) + spare) + SECOND)
    facts = audio.inspect(path)
    assert facts.seconds == 1 and f"{spare} bytes more" in facts.remark
    assert facts.content == plain_hash(path)
    np.testing.assert_array_equal(samples(path), expected(SECOND))


@pytest.mark.parametrize("form", ["RF64", "WAVEX"])
def test_the_same_in_other_headers(tmp_path: Path, form: str) -> None:
    path = tmp_path / "x.wav"
    soundfile.write(path, noise(1), 8_000, format=form, subtype="PCM_16")
    os.truncate(path, path.stat().st_size - 44)
    facts = audio.inspect(path)
    assert facts.seconds == 1 - 22 / 8_000 and "44 bytes more" in facts.remark


@pytest.mark.parametrize("kind", CHUNKS)
def test_chunks_behind_the_samples_are_no_sound_whatever_the_header_says(tmp_path: Path, kind: str) -> None:
    right, streamed, unclosed, over, stale = (tmp_path / f"{name}.wav" for name in "abcde")
    behind = CHUNKS[kind]
    right.write_bytes(wav_header(len(SECOND), 36 + len(SECOND) + len(behind)) + SECOND + behind)
    facts = audio.inspect(right)
    assert (facts.seconds, facts.remark, facts.content) == (1, "", plain_hash(right))
    if kind == "unknown":  # cannot be found where no size leads to it
        return
    streamed.write_bytes(wav_header(0xFFFFFFFF, 0xFFFFFFFF) + SECOND + behind)
    unclosed.write_bytes(wav_header(0, 0) + SECOND + behind)
    over.write_bytes(wav_header(len(SECOND) + len(behind) + 16) + SECOND + behind)
    stale.write_bytes(wav_header(4_000) + SECOND + behind)
    for path in (streamed, unclosed, over, stale):
        assert audio.inspect(path).seconds == 1, path.name
        np.testing.assert_array_equal(samples(path), expected(SECOND))
        # What older versions refused, as `over`, has no codes from then.
        assert (audio.content_of(path) == plain_hash(path)) == (path == over), path.name


def test_chunks_right_behind_a_short_data_chunk_end_it_even_if_they_are_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "x.wav"
    path.write_bytes(wav_header(len(SECOND)) + SECOND + CHUNKS["a big id3"][:-5_000])
    facts = audio.inspect(path)
    assert (facts.seconds, facts.remark, facts.content) == (1, "", plain_hash(path))


@pytest.mark.parametrize("riff_bytes", [4_036, 36, 36 + 4 * len(SECOND)])
@pytest.mark.parametrize("big_endian", [False, True])
def test_a_header_that_was_never_updated_is_read_to_the_end_under_another_key(
    tmp_path: Path, riff_bytes: int, big_endian: bool
) -> None:
    """2.0 s of which the header gives 0.25; and a program before this read 0.25 of them."""
    path, sound = tmp_path / "x.wav", pcm16(2)
    if big_endian:
        soundfile.write(path, np.frombuffer(sound, "<i2"), 8_000, subtype="PCM_16", endian="BIG")
        whole = path.read_bytes()
        at = whole.index(b"data") + 4
        path.write_bytes(whole[:at] + struct.pack(">I", 4_000) + whole[at + 4 :])
    else:
        path.write_bytes(wav_header(4_000, riff_bytes) + sound)
    assert soundfile.info(path).frames == 2_000
    facts = audio.inspect(path)
    assert facts.seconds == 2 and "0.25 s" in facts.remark and "2.00 s" in facts.remark
    assert facts.content != plain_hash(path) and len(facts.content) == 32
    np.testing.assert_array_equal(samples(path), expected(sound))


@pytest.mark.parametrize("subtype", ["PCM_U8", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ULAW", "ALAW"])
@pytest.mark.parametrize("form", ["WAV", "WAVEX"])
def test_a_header_that_was_never_updated_is_mended_in_every_plain_format(
    tmp_path: Path, subtype: str, form: str
) -> None:
    path = tmp_path / "x.wav"
    soundfile.write(path, noise(2, channels=2), 8_000, format=form, subtype=subtype)
    whole, frames = soundfile.read(path, dtype="float32", always_2d=True)[0].mean(axis=1), path.read_bytes()
    at = frames.index(b"data") + 4
    data_bytes = struct.unpack_from("<I", frames, at)[0]
    path.write_bytes(frames[:at] + struct.pack("<I", data_bytes // 4) + frames[at + 4 :])
    assert audio.inspect(path).seconds == 2
    np.testing.assert_allclose(samples(path), whole, atol=1e-7)


def test_a_block_codec_whose_header_was_never_updated_says_what_was_not_read(tmp_path: Path) -> None:
    path = tmp_path / "x.wav"
    soundfile.write(path, noise(4), 8_000, subtype="MS_ADPCM")
    whole = path.read_bytes()
    at = whole.index(b"data") + 4
    path.write_bytes(whole[:at] + struct.pack("<I", struct.unpack_from("<I", whole, at)[0] // 4) + whole[at + 4 :])
    facts = audio.inspect(path)
    assert facts.seconds < 2 and "are not read" in facts.remark and facts.content == plain_hash(path)


def test_a_little_behind_the_samples_that_is_no_chunk_is_not_read_and_counted(tmp_path: Path) -> None:
    (tmp_path / "pad.wav").write_bytes(wav_header(len(SECOND)) + SECOND + bytes(468))
    facts = audio.inspect(tmp_path / "pad.wav")
    assert facts.seconds == 1 and "468 zero bytes" in facts.remark
    assert facts.content == plain_hash(tmp_path / "pad.wav")
    (tmp_path / "junk.wav").write_bytes(wav_header(len(SECOND)) + SECOND + bytes(range(1, 256)))
    assert "255 bytes behind its samples" in audio.inspect(tmp_path / "junk.wav").remark
    (tmp_path / "tag.wav").write_bytes(wav_header(len(SECOND)) + SECOND + b"TAG" + bytes(125))
    assert audio.inspect(tmp_path / "tag.wav").remark == ""


def test_zeros_behind_the_samples_are_room_that_was_not_needed(tmp_path: Path) -> None:
    path = tmp_path / "x.wav"
    path.write_bytes(wav_header(len(SECOND)) + SECOND + bytes(200_000))
    facts = audio.inspect(path)
    assert facts.seconds == 1 and "200,000 zero bytes" in facts.remark and facts.content == plain_hash(path)


def test_a_second_file_appended_to_the_first_is_not_read_and_said(tmp_path: Path) -> None:
    one = wav_header(len(SECOND)) + SECOND
    (tmp_path / "x.wav").write_bytes(one + one)
    facts = audio.inspect(tmp_path / "x.wav")
    assert facts.seconds == 1 and "another sound file" in facts.remark


@pytest.mark.parametrize("held", [0, 7_000, 8_000, 15_500])
def test_half_a_file_stays_truncated(tmp_path: Path, held: int) -> None:
    (tmp_path / "x.wav").write_bytes(wav_header(len(SECOND)) + SECOND[:held])
    with pytest.raises(audio.AudioFault, match=f"truncated: holds {held:,} of 16,000 bytes of audio"):
        audio.inspect(tmp_path / "x.wav")


# A day at 192 kHz would not need more than a few KiB of disk: all but the last second is a hole.
@pytest.mark.parametrize(
    ("data_bytes", "given"),
    [
        (5 * GIB, 5 * GIB - 4 * GIB),  # the size wrapped, and the file ends where it should
        (4 * GIB + 4_000, 4_000),
        (9 * GIB + 4_000, GIB + 4_000),  # wrapped twice
        (5 * GIB, 16_000),  # never updated
        (5 * GIB, 0xFFFFFFFF),  # streams that went on beyond what their placeholder can say
        (3 * GIB, 0x7FFFF000),
        (3 * GIB, 0x80000000),
        (5 * GIB, 0),
    ],
)
@pytest.mark.parametrize("behind", [b"", CHUNKS["LIST"]])
def test_a_file_of_gigabytes_whose_size_wrapped_is_read_to_its_last_sample(
    tmp_path: Path, data_bytes: int, given: int, behind: bytes
) -> None:
    path = tmp_path / "x.wav"
    path.write_bytes(wav_header(given, given + 36 if given < 0xFFFFFFFF - 36 else 0xFFFFFFFF))
    os.truncate(path, 44 + data_bytes - len(SECOND))
    with open(path, "ab") as file:
        file.write(SECOND + behind)
    size = path.stat().st_size
    with open(path, "rb") as file:
        wav = wav_layout(file.fileno(), size)
        assert wav is not None
        sound = sound_of(file.fileno(), size, wav)
    assert sound.end == 44 + data_bytes and sound.mended and sound.reread
    with open(path, "rb") as raw, MendedWav(raw.fileno(), wav, sound) as mended, soundfile.SoundFile(mended) as decoder:
        assert decoder.frames == data_bytes // 2
        decoder.seek(decoder.frames - 8_000)
        np.testing.assert_array_equal(decoder.read(dtype="float32"), expected(SECOND))


def test_a_file_of_gigabytes_whose_header_is_right_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "x.wav"
    path.write_bytes(wav_header(0x7FFF8000, 36 + 0x7FFF8000 + len(CHUNKS["id3"])))  # it looks like a placeholder
    os.truncate(path, 44 + 0x7FFF8000)
    with open(path, "ab") as file:
        file.write(CHUNKS["id3"])
    size = path.stat().st_size
    with open(path, "rb") as file:
        wav = wav_layout(file.fileno(), size)
        assert wav is not None
        assert sound_of(file.fileno(), size, wav) == Sound(end=44 + 0x7FFF8000)


def test_the_mended_file_reads_like_any_file_at_every_place(tmp_path: Path) -> None:
    path = tmp_path / "x.wav"
    path.write_bytes(wav_header(4_000) + SECOND)
    size = path.stat().st_size
    with open(path, "rb") as file:
        wav = wav_layout(file.fileno(), size)
        assert wav is not None
        sound = sound_of(file.fileno(), size, wav)
    right = wav_header(len(SECOND)) + SECOND
    with open(path, "rb") as raw, MendedWav(raw.fileno(), wav, sound) as mended:
        assert mended.readall() == right
        for at, count in ((0, 3), (2, 8), (38, 20), (41, 1), (44, 10), (len(right) - 3, 99), (len(right) + 5, 4)):
            assert mended.seek(at) == at == mended.tell()
            assert mended.read(count) == right[at : at + count]
        assert mended.seek(-4, os.SEEK_END) == len(right) - 4 and mended.read(-1) == right[-4:]
