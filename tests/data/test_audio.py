from __future__ import annotations

import hashlib
import os
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import soundfile
import soxr

from tests.audio_files import noise, pcm16, wav_header, write_sparse_hours
from trainer.data import audio
from trainer.data.audio_fault import FAULT_KINDS


def joined(path: Path, rate_hz: int, block_seconds: float = 10.0) -> np.ndarray:
    return np.concatenate(list(audio.stream(path, rate_hz, block_seconds)))


@pytest.mark.parametrize(
    ("form", "subtype", "rate_hz", "channels"),
    [
        ("WAV", "PCM_16", 44_100, 2),
        ("WAV", "PCM_U8", 8_001, 1),  # an odd number of bytes
        ("WAV", "FLOAT", 48_000, 1),
        ("WAV", "ULAW", 8_000, 1),
        ("WAV", "MS_ADPCM", 22_050, 2),
        ("WAV", "PCM_24", 96_000, 6),
        ("WAVEX", "PCM_24", 96_000, 6),
        ("RF64", "PCM_16", 44_100, 2),
        ("FLAC", "PCM_16", 44_100, 2),
        ("MP3", "MPEG_LAYER_III", 44_100, 2),
        ("OGG", "VORBIS", 44_100, 2),
        ("AIFF", "PCM_16", 44_100, 1),
    ],
)
def test_facts_are_those_of_soundfile_and_hashlib_whatever_the_content(
    tmp_path: Path, form: str, subtype: str, rate_hz: int, channels: int
) -> None:
    path = tmp_path / "x.wav"
    soundfile.write(path, noise(1, rate_hz, channels), rate_hz, format=form, subtype=subtype)
    whole, _ = soundfile.read(path)
    facts = audio.inspect(path)
    assert (facts.sample_rate_hz, facts.channels) == (rate_hz, channels)
    assert facts.seconds == len(whole) / rate_hz
    assert facts.content == hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()


@pytest.mark.parametrize(("peak", "remark"), [(1.0, ""), (1.01, "peak is 1.01"), (8.0, "peak is 8 of full scale")])
def test_samples_somewhat_beyond_full_scale_are_used_with_a_remark(tmp_path: Path, peak: float, remark: str) -> None:
    samples = noise(1) / 10
    samples[4_000] = -peak
    soundfile.write(tmp_path / "x.wav", samples, 8_000, subtype="FLOAT")
    facts = audio.inspect(tmp_path / "x.wav")
    assert facts.seconds == 1 and remark in facts.remark and bool(remark) == bool(facts.remark)


@pytest.mark.parametrize(
    ("scale", "divisor"),
    [
        *((8.1, "8.1"), (100.0, "100"), (16_400.0, "32768"), (32_767.0, "32768")),
        *((2.0**22, "8388608"), (2.0**31, "2147483648"), (1e12, "1e[+]12")),
    ],
)
def test_numbers_of_another_scale_saved_as_floats_are_out_of_range_and_the_divisor_is_named(
    tmp_path: Path, scale: float, divisor: str
) -> None:
    samples = noise(1) / 10
    samples[4_000] = 1
    soundfile.write(tmp_path / "x.wav", samples * scale, 8_000, subtype="FLOAT")
    with pytest.raises(audio.AudioFault, match=f"out of range.*divide .* {divisor}\\b") as caught:
        audio.inspect(tmp_path / "x.wav")
    assert caught.value.fate == "out of range"


@pytest.mark.parametrize("block_seconds", [1e-9, 0.01, 0.3337, 1.0, 100.0])
@pytest.mark.parametrize(("rate_hz", "to_hz"), [(44_100, 32_000), (8_000, 32_000), (48_000, 16_000)])
def test_blocks_of_any_size_join_to_the_resampled_whole(
    tmp_path: Path, block_seconds: float, rate_hz: int, to_hz: int
) -> None:
    seconds = 0.05 if block_seconds < 0.001 else 2.5
    path, samples = tmp_path / "x.wav", noise(seconds, rate_hz, 2)
    soundfile.write(path, samples, rate_hz, subtype="FLOAT")
    expected = soxr.resample(samples.mean(axis=1), rate_hz, to_hz, quality="HQ")
    np.testing.assert_array_equal(joined(path, to_hz, block_seconds), expected)


@pytest.mark.parametrize("block_seconds", [0.01, 0.3337, 100.0])
def test_mono_at_its_own_rate_passes_bit_for_bit(tmp_path: Path, block_seconds: float) -> None:
    path, samples = tmp_path / "x.wav", noise(1.5, 32_000)
    soundfile.write(path, samples, 32_000, subtype="FLOAT")
    np.testing.assert_array_equal(joined(path, 32_000, block_seconds), samples)


def test_blocks_are_mono_float32_of_the_size_asked_for_and_stay_valid(tmp_path: Path) -> None:
    path, samples = tmp_path / "x.wav", noise(1.05, 8_000, 6)
    soundfile.write(path, samples, 8_000, subtype="FLOAT")
    blocks = list(audio.stream(path, 8_000, 0.1))
    assert [block.shape for block in blocks] == [(800,)] * 10 + [(400,)]
    assert {block.dtype for block in blocks} == {np.dtype(np.float32)}
    np.testing.assert_allclose(np.concatenate(blocks), samples.astype(np.float64).mean(axis=1), atol=1e-7)


@pytest.mark.parametrize("block_seconds", [1e-9, 0.01, 0.3337, 100.0])
@pytest.mark.parametrize("channels", [1, 2, 6])
@pytest.mark.parametrize("to_hz", [32_000, 44_100])
def test_stereo_is_the_first_two_channels_each_resampled_alone_and_a_mono_file_twice(
    tmp_path: Path, block_seconds: float, channels: int, to_hz: int
) -> None:
    seconds = 0.05 if block_seconds < 0.001 else 1.5
    path, samples = tmp_path / "x.wav", noise(seconds, 44_100, channels).reshape(-1, channels)
    soundfile.write(path, samples, 44_100, subtype="FLOAT")
    blocks = list(audio.stream(path, to_hz, block_seconds, channels=2))
    assert {(block.shape[1:], block.dtype.name) for block in blocks} == {((2,), "float32")}
    sides = [np.ascontiguousarray(samples[:, side]) for side in (0, min(1, channels - 1))]
    expected = [side if to_hz == 44_100 else soxr.resample(side, 44_100, to_hz, quality="HQ") for side in sides]
    np.testing.assert_array_equal(np.concatenate(blocks), np.stack(expected, axis=1))


@pytest.mark.parametrize("form", ["MP3", "OGG", "FLAC"])
def test_compressed_files_decode_the_same_in_blocks_as_whole(tmp_path: Path, form: str) -> None:
    path = tmp_path / "x.wav"
    soundfile.write(path, noise(3, 32_000), 32_000, format=form)
    whole, _ = soundfile.read(path, dtype="float32")
    np.testing.assert_array_equal(joined(path, 32_000, 0.2), whole)


# What programs leave that write to a pipe: GStreamer, an unclosed file, ffmpeg, sox, arecord.
STREAMED = [(0, 0), (36, 0), (8, 0), (0xFFFFFFFF, 0xFFFFFFFF), (0x7FFFF024, 0x7FFFF000), (0x80000024, 0x80000000)]


@pytest.mark.parametrize(("riff_bytes", "data_bytes"), STREAMED)
def test_streamed_headers_are_read_to_the_end_of_the_file(tmp_path: Path, riff_bytes: int, data_bytes: int) -> None:
    path, samples = tmp_path / "x.wav", pcm16(2)
    path.write_bytes(wav_header(data_bytes, riff_bytes) + samples)
    assert audio.inspect(path).seconds == 2
    expected = np.frombuffer(samples, "<i2") / np.float32(32_768)
    np.testing.assert_array_equal(joined(path, 8_000, 0.3), expected)


def test_metadata_behind_an_empty_data_chunk_is_not_taken_for_sound(tmp_path: Path) -> None:
    notes = b"LIST" + struct.pack("<I", 2000) + pcm16(0.125)
    (tmp_path / "x.wav").write_bytes(wav_header(0, 36 + len(notes)) + notes)
    with pytest.raises(audio.AudioFault) as caught:
        audio.inspect(tmp_path / "x.wav")
    assert caught.value.fate == "empty"


@pytest.mark.parametrize("form", ["WAV", "RF64", "WAVEX"])
@pytest.mark.parametrize("lost", [130, 1000, 8_000, 15_900])
def test_a_data_chunk_cut_anywhere_is_truncated(tmp_path: Path, form: str, lost: int) -> None:
    path = tmp_path / "x.wav"
    soundfile.write(path, noise(1), 8_000, format=form, subtype="PCM_16")
    os.truncate(path, path.stat().st_size - lost)
    with pytest.raises(audio.AudioFault) as caught:
        audio.inspect(path)
    assert caught.value.fate == "truncated"
    assert "of 16,000 bytes" in caught.value.detail


def test_an_odd_data_chunk_needs_no_padding_byte(tmp_path: Path) -> None:
    path = tmp_path / "x.wav"
    soundfile.write(path, noise(1, 8_001), 8_001, subtype="PCM_U8")
    assert path.stat().st_size == 44 + 8_001 + 1
    os.truncate(path, 44 + 8_001)
    assert audio.inspect(path).seconds == 1


def test_chunks_before_and_after_the_samples_change_nothing_but_the_hash(tmp_path: Path) -> None:
    samples = pcm16(1)
    plain = wav_header(len(samples)) + samples
    odd = b"note" + struct.pack("<I", 5) + b"hello\0"  # padded to an even size
    (tmp_path / "plain.wav").write_bytes(plain)
    (tmp_path / "notes.wav").write_bytes(plain[:12] + odd + plain[12:] + odd)
    np.testing.assert_array_equal(joined(tmp_path / "notes.wav", 8_000), joined(tmp_path / "plain.wav", 8_000))
    plain_facts, notes_facts = audio.inspect(tmp_path / "plain.wav"), audio.inspect(tmp_path / "notes.wav")
    assert plain_facts.seconds == notes_facts.seconds and plain_facts.content != notes_facts.content
    (tmp_path / "cut.wav").write_bytes((plain[:12] + odd + plain[12:])[:-1_010])
    with pytest.raises(audio.AudioFault, match="truncated: holds 14,990 of 16,000 bytes"):
        audio.inspect(tmp_path / "cut.wav")


def test_a_file_that_is_gone_or_cut_since_raises_a_fault_from_the_stream(tmp_path: Path) -> None:
    with pytest.raises(audio.AudioFault, match="No such file"):
        next(audio.stream(tmp_path / "gone.wav", 32_000))
    path = tmp_path / "x.wav"
    path.write_bytes(wav_header(4_000) + bytes(100))
    with pytest.raises(audio.AudioFault, match="truncated"):
        next(audio.stream(path, 32_000))


def test_damaged_bytes_give_facts_or_a_fault_and_nothing_else(tmp_path: Path) -> None:
    draw, path = np.random.default_rng(7), tmp_path / "x.wav"
    outcomes: list[float | str] = []
    for form in ("WAV", "WAVEX", "RF64", "FLAC", "OGG", "AIFF"):
        soundfile.write(path, noise(0.2, 8_000, 2), 8_000, format=form)
        whole = np.frombuffer(path.read_bytes(), np.uint8)
        for _ in range(40):
            damaged = whole.copy()
            damaged[draw.integers(0, 100, 4)] = draw.integers(0, 256, 4)
            path.write_bytes(damaged[: draw.integers(20, len(whole) * 2)].tobytes())
            try:
                outcomes.append(audio.inspect(path).seconds)
            except audio.AudioFault as fault:
                outcomes.append(fault.fate)
                assert fault.fate in FAULT_KINDS and fault.detail.isprintable()
    assert {"unreadable", "truncated"} < set(outcomes) and any(isinstance(one, float) for one in outcomes)


def test_an_hour_takes_a_few_megabytes_of_memory(tmp_path: Path) -> None:
    path = write_sparse_hours(tmp_path / "x.wav", hours=1)
    tracemalloc.start()
    facts = audio.inspect(path)
    first = next(audio.stream(path, 32_000))
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert facts.seconds == 3600
    assert 9 * 32_000 < len(first) <= 10 * 32_000
    assert peak_bytes < 16 * 2**20
