"""Every format is read as the sound that it is, or gets the message of what is wrong with it."""

from __future__ import annotations

import builtins
import hashlib
import io
import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import soundfile
import soxr
import torch

from tests.sound_formats import FFMPEG, FORMATS, chirp, encoded
from trainer.data import audio, audio_facts, cache, manifest
from trainer.data.audio_fault import AudioFault
from trainer.data.caption_settings import CaptionSettings
from trainer.data.codec import encode
from trainer.data.sound_file import opened
from trainer.model.debug_model import build_debug_model

UNLABELLED = CaptionSettings(no_label=True)

SECONDS = 1.5
CACHED: dict[tuple[str, int], bytes] = {}


def file_of(name: str, seed: int = 0) -> bytes:
    """A chirp of 1.5 s in this format."""
    format = FORMATS[name]
    if (name, seed) not in CACHED:
        CACHED[name, seed] = encoded(format, chirp(SECONDS, format.rate_hz, seed=seed))
    return CACHED[name, seed]


def decoded(sound: Path | bytes, block_frames: int = 10_000) -> np.ndarray:
    """All samples (n, channels)."""
    with opened(sound) as decoder:
        return np.concatenate([block.copy() for block in decoder.blocks(block_frames)])


def joined(sound: Path | bytes, rate_hz: int, block_seconds: float) -> np.ndarray:
    return np.concatenate(list(audio.stream(sound, rate_hz, block_seconds)))


def lag_of(found: np.ndarray, original: np.ndarray) -> int:
    """By how many samples the first channel of one sound comes behind that of another."""
    size = 1 << (len(found) + len(original)).bit_length()
    product = np.fft.rfft(found[:, 0], size) * np.conj(np.fft.rfft(original[:, 0], size))
    best = int(np.argmax(np.fft.irfft(product)))
    return best if best < size // 2 else best - size


@pytest.mark.parametrize("name", FORMATS)
def test_onset_and_length_are_those_of_the_sound_and_lossless_samples_are_equal(name: str) -> None:
    format = FORMATS[name]
    original = chirp(SECONDS, format.rate_hz)
    found, facts = decoded(file_of(name)), audio.inspect(file_of(name))
    assert (facts.sample_rate_hz, facts.channels) == (format.rate_hz, 2) and facts.remark == ""
    assert facts.seconds == len(found) / format.rate_hz
    assert lag_of(found, original) == format.lag
    assert 0 <= len(found) - len(original) - format.lag <= format.padding
    if format.lossless:
        np.testing.assert_array_equal(found, original)
    common = len(original) - 4_096
    error = found[max(0, format.lag) :][:common] - original[max(0, -format.lag) :][:common]
    assert float(np.sqrt(np.mean(error**2))) < 0.05  # of a tone whose root mean square is 0.2


@pytest.mark.parametrize("name", FORMATS)
def test_blocks_of_any_size_join_to_the_whole_and_bytes_read_as_the_file_does(tmp_path: Path, name: str) -> None:
    path = tmp_path / "x"
    path.write_bytes(file_of(name))
    whole = decoded(path, 1 << 24)
    for block_frames in (1_000, 4_096):
        np.testing.assert_array_equal(decoded(file_of(name), block_frames), whole)
    rate = FORMATS[name].rate_hz
    np.testing.assert_array_equal(joined(path, rate, 0.0371), whole.mean(axis=1, dtype=np.float32))
    np.testing.assert_array_equal(joined(path, 32_000, 0.25), joined(file_of(name), 32_000, 100.0))
    assert audio.inspect(path) == audio.inspect(file_of(name))


@pytest.mark.parametrize(
    ("name", "rate_hz", "channels"),
    [
        *((name, 8_000, 1) for name in ("wav", "flac", "vorbis", "mp3", "aiff", "opus", "m4a", "alac")),
        *((name, 192_000, 8) for name in ("wav", "flac", "aiff", "caf", "w64", "wavpack")),
        *(("vorbis", 96_000, 6), ("m4a", 96_000, 8), ("webm", 48_000, 6), ("alac", 96_000, 6)),
    ],
)
def test_any_rate_and_number_of_channels_is_read(name: str, rate_hz: int, channels: int) -> None:
    data = encoded(FORMATS[name], chirp(0.6, rate_hz, channels), rate_hz)
    facts = audio.inspect(data)
    assert (facts.sample_rate_hz, facts.channels) == (rate_hz, channels)
    assert facts.seconds == pytest.approx(0.6, abs=0.03)


def test_equal_samples_in_another_format_are_one_sound_and_the_first_by_content_is_used(tmp_path: Path) -> None:
    folder, lossless = tmp_path / "data", [name for name, format in FORMATS.items() if format.lossless]
    folder.mkdir()
    facts = {}
    for name in lossless:
        path = folder / f"{name}{FORMATS[name].suffix}"
        path.write_bytes(file_of(name))
        path.with_suffix(".txt").write_text("one caption")
        facts[path.name] = audio.inspect(path)
    (folder / "mp3.mp3").write_bytes(file_of("mp3"))  # equal to the ear, but of other samples
    (folder / "mp3.txt").write_text("one caption")
    (folder / "other.wav").write_bytes(file_of("wav"))
    (folder / "other.txt").write_text("another caption")
    assert len({one.sound for one in facts.values()}) == 1
    assert len({one.content for one in facts.values()}) == len(facts)
    found = manifest.scan(folder, min_seconds=0.5, facts_folder=tmp_path, show_progress=False)
    first = min(facts, key=lambda name: facts[name].content)
    fates = {fate.path: fate for fate in found.fates}
    assert sorted(found.columns["path"]) == sorted([first, "mp3.mp3", "other.wav"])
    for name in facts.keys() - {first}:
        assert fates[name].fate == "duplicate" and f"as {first}," in fates[name].detail
        assert facts[name].format in fates[name].detail and facts[first].format in fates[name].detail


Edit = Callable[[bytes], bytes]
CUT: Edit = lambda data: data[: len(data) * 6 // 10]  # noqa: E731
LAST: Edit = lambda data: data[:-400]  # noqa: E731
TELLS = [name for name in FORMATS if name not in ("mp3", "aac")]


@pytest.mark.parametrize("cut", [CUT, LAST], ids=["in the middle", "at the end"])
@pytest.mark.parametrize("name", TELLS)
def test_a_cut_file_is_truncated_where_its_container_says_how_long_it_is(name: str, cut: Edit) -> None:
    with pytest.raises(AudioFault) as caught:
        audio.inspect(cut(file_of(name)))
    assert caught.value.fate == "truncated" and "copy or export it again" in caught.value.detail


@pytest.mark.parametrize("name", ["mp3", "aac"])
def test_a_cut_stream_without_a_table_is_used_as_far_as_it_goes(name: str) -> None:
    facts = audio.inspect(CUT(file_of(name)))
    assert 0.5 < facts.seconds < 1.2
    assert ("as of a file that was cut" in facts.remark) == (name == "mp3")  # its first frame counts the others


def test_an_mp3_without_a_count_is_as_long_as_what_is_read() -> None:
    data = file_of("mp3")
    plain = data[data.index(b"\xff\xfb", 4) :]  # the first frame holds the count and no sound
    facts = audio.inspect(plain)
    with soundfile.SoundFile(io.BytesIO(plain)) as sound:
        assert facts.seconds == len(sound.read()) / 44_100 and facts.remark == ""


def flipped(data: bytes, at: int, count: int = 20) -> bytes:
    return data[:at] + bytes(byte ^ 0x5A for byte in data[at : at + count]) + data[at + count :]


@pytest.mark.parametrize("name", ["flac", "vorbis", "opus", "mka of flac"])
def test_a_broken_frame_is_found_where_the_format_has_checksums(name: str) -> None:
    data = file_of(name)
    with pytest.raises(AudioFault) as caught:
        audio.inspect(flipped(data, len(data) // 2))
    assert caught.value.fate == "truncated" and "damaged" in caught.value.detail


def without_end_flag(data: bytes) -> bytes:
    """An Ogg file without its last page."""
    return data[: data.rindex(b"OggS")]


def without_table(data: bytes) -> bytes:
    return data[: data.index(b"moov") - 4]


def test_an_ogg_without_its_last_page_and_an_m4a_without_its_table_say_so() -> None:
    with pytest.raises(AudioFault, match=r"truncated: ends at byte .* without its last page"):
        audio.inspect(without_end_flag(file_of("vorbis")))
    with pytest.raises(AudioFault, match=r"truncated: has no table of its samples \(moov\)"):
        audio.inspect(without_table(file_of("m4a")))


@pytest.mark.parametrize("name", ["vorbis", "opus"])
def test_sounds_joined_in_one_ogg_are_all_used(name: str) -> None:
    facts = audio.inspect(file_of(name) + file_of(name, seed=1))
    assert facts.seconds == 2 * SECONDS and "2 sounds in one Ogg file" in facts.remark
    both = decoded(file_of(name) + file_of(name, seed=1))
    np.testing.assert_array_equal(both, np.concatenate([decoded(file_of(name)), decoded(file_of(name, seed=1))]))
    rate = FORMATS[name].rate_hz
    other = encoded(FORMATS[name], chirp(1, 24_000, 1), 24_000)
    with pytest.raises(AudioFault, match=f"from {rate:,} Hz, 2 channels to 24,000 Hz, 1 channels at 1.5 s"):
        audio.inspect(file_of(name) + other)


def id3(count: int) -> bytes:
    """An ID3v2 tag of a picture of so many bytes."""
    size = bytes(count >> shift & 127 for shift in (21, 14, 7, 0))
    return b"ID3\4\0\0" + size + b"\0" * count


@pytest.mark.parametrize("name", ["mp3", "flac", "aac"])
@pytest.mark.parametrize("count", [300, 10 << 20])
def test_a_tag_of_any_size_before_the_sound_changes_nothing(name: str, count: int) -> None:
    plain, tagged = audio.inspect(file_of(name)), audio.inspect(id3(count) + file_of(name))
    assert (tagged.seconds, tagged.sound) == (plain.seconds, plain.sound) and tagged.content != plain.content


@pytest.mark.parametrize("name", FORMATS)
def test_a_wrong_suffix_or_none_does_not_matter(tmp_path: Path, name: str) -> None:
    (tmp_path / "data").mkdir()
    for suffix in (".wav", ".mp3", ".m4a", ".xyz", ""):
        (tmp_path / "data" / f"x{suffix}").write_bytes(file_of(name))
    found = manifest.scan(
        tmp_path / "data", captions=UNLABELLED, min_seconds=0.5, facts_folder=tmp_path, show_progress=False
    )
    assert sorted(fate.fate for fate in found.fates) == ["duplicate"] * 4 + ["used"]


def test_what_is_no_sound_is_ignored_unread_and_what_has_an_unknown_suffix_is_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    for name in ("folder.jpg", "list.m3u8", "song.als", "disc.cue", "take.asd", "x.json"):
        (folder / name).write_bytes(file_of("mp3"))
    (folder / "page.xyz").write_bytes(b"\xff\xfeh\0e\0l\0l\0o\0")
    (folder / "short").write_bytes(b"R")
    (folder / "text").write_bytes(b"you skip this")
    (folder / "sound.xyz").write_bytes(file_of("mp3"))
    opens: list[str] = []
    plain = audio.inspect
    monkeypatch.setattr("trainer.data.audio_facts.inspect", lambda path: (opens.append(path.name), plain(path))[1])
    found = manifest.scan(folder, captions=UNLABELLED, min_seconds=0.5, facts_folder=tmp_path, show_progress=False)
    assert {fate.path for fate in found.fates if fate.fate == "used"} == {"sound.xyz"} == set(opens)
    assert {fate.fate for fate in found.fates if fate.path != "sound.xyz"} == {"ignored"}


def with_picture(data: bytes) -> bytes:
    """The m4a with a picture stream beside its sound, as cover art and videos have one."""
    out = io.BytesIO()
    with av.open(io.BytesIO(data)) as source, av.open(out, "w", format="matroska") as target:
        sound = target.add_stream_from_template(source.streams.audio[0])
        picture: Any = target.add_stream("mjpeg", rate=1)
        picture.width = picture.height = 64
        picture.pix_fmt = "yuvj420p"
        frame = av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), format="rgb24")
        target.mux(picture.encode(frame))
        target.mux(picture.encode(None))
        for packet in source.demux(source.streams.audio[0]):
            if packet.dts is not None:
                packet.stream = sound
                target.mux(packet)
    return out.getvalue()


def test_pictures_in_the_file_are_passed_over_and_a_file_of_pictures_alone_says_so() -> None:
    assert audio.inspect(with_picture(file_of("m4a"))).format == "AAC"
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as target:
        picture: Any = target.add_stream("mpeg4", rate=1)
        picture.width = picture.height = 64
        picture.pix_fmt = "yuv420p"
        frame = av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), format="rgb24")
        target.mux(picture.encode(frame))
        target.mux(picture.encode(None))
    with pytest.raises(AudioFault, match="unreadable: a MP4 or M4A file without sound"):
        audio.inspect(out.getvalue())


@pytest.mark.parametrize("name", FFMPEG)
def test_without_pyav_its_formats_are_unsupported_and_used_once_it_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / f"x{FORMATS[name].suffix}").write_bytes(file_of(name))
    (tmp_path / "data" / "good.wav").write_bytes(file_of("wav", seed=1))

    def fates() -> dict[str, str]:
        found = manifest.scan(
            tmp_path / "data", captions=UNLABELLED, min_seconds=0.5, facts_folder=tmp_path, show_progress=False
        )
        return {fate.path: f"{fate.fate} {fate.detail}" for fate in found.fates if fate.path != "good.wav"}

    real = builtins.__import__

    def without_av(module: str, *arguments: Any, **named: Any) -> Any:
        if module == "av":
            raise ModuleNotFoundError("No module named 'av'", name="av")
        return real(module, *arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(builtins, "__import__", without_av)
        (said,) = fates().values()
    assert said.startswith("unsupported format") and "bash scripts/setup.sh ffmpeg" in said
    (said,) = fates().values()
    assert said.startswith("used")


def test_a_playlist_or_a_list_of_files_is_never_followed(tmp_path: Path) -> None:
    (tmp_path / "x.wav").write_bytes(file_of("wav"))
    playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{tmp_path}/x.wav\n#EXT-X-ENDLIST\n"
    for text in (playlist, f"ffconcat version 1.0\nfile '{tmp_path}/x.wav'\n"):
        (tmp_path / "x.m4a").write_text(text)
        with pytest.raises(AudioFault, match="unreadable: not a sound file"):
            audio.inspect(tmp_path / "x.m4a")


def test_a_sound_whose_rate_changes_within_ffmpeg_is_a_fault() -> None:
    first, second = (encoded(FORMATS["aac"], chirp(1, rate), rate) for rate in (44_100, 22_050))
    with pytest.raises(AudioFault, match="from 44,100 Hz, 2 channels to 22,050 Hz, 2 channels"):
        audio.inspect(first + second)


def test_ffmpeg_writes_nothing_on_the_console(capfd: pytest.CaptureFixture[str]) -> None:
    for name in FFMPEG:
        for data in (CUT(file_of(name)), flipped(file_of(name), 3_000)):
            with pytest.raises(AudioFault):
                audio.inspect(data)
                raise AudioFault("silent", "used")
    assert capfd.readouterr() == ("", "")


def test_twenty_minutes_through_ffmpeg_take_a_few_megabytes_of_memory() -> None:
    data = encoded(FORMATS["mka of flac"], np.tile(chirp(60, 8_000, 1), (20, 1)), 8_000)
    tracemalloc.start()
    facts = audio.inspect(data)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert facts.seconds == 1_200 and peak_bytes < 8 * 2**20  # all samples are 37 MiB


@pytest.mark.numbers
@pytest.mark.parametrize("name", FORMATS)
def test_codes_from_windows_of_the_file_equal_those_of_the_whole_decoded_sound(name: str) -> None:
    codec = build_debug_model().audio_encoder
    sound = decoded(file_of(name), 1 << 24).mean(axis=1, dtype=np.float32)
    track = soxr.resample(sound, FORMATS[name].rate_hz, 32_000, quality="HQ")
    frames = len(track) // 640
    with torch.inference_mode():
        whole = codec.encode(torch.from_numpy(track)[None, None]).audio_codes[0, 0, :, :frames]
    blocks = audio.stream(file_of(name), 32_000, 0.137)
    (codes,) = encode(codec, blocks, offsets=[0], window_seconds=0.5)
    np.testing.assert_array_equal(codes, whole.numpy().astype(np.int16))


def test_facts_of_the_former_version_are_judged_anew_and_the_codes_of_its_cache_are_used(tmp_path: Path) -> None:
    path = tmp_path / "data" / "a.wav"
    path.parent.mkdir()
    path.write_bytes(file_of("wav"))
    content = hashlib.blake2b(file_of("wav"), digest_size=16).hexdigest()  # the key of all versions
    status = path.stat()
    said = {"seconds": SECONDS, "sample_rate_hz": 44_100, "channels": 2, "content": content, "remark": ""}
    facts = {"version": 2, "files": {str(path): [status.st_size, status.st_mtime_ns, said]}}
    (tmp_path / audio_facts.FILE_NAME).write_text(json.dumps(facts))
    found = manifest.scan(path.parent, captions=UNLABELLED, min_seconds=0.5, facts_folder=tmp_path, show_progress=False)
    assert found.columns["content"] == [content]
    kept = json.loads((tmp_path / audio_facts.FILE_NAME).read_text())
    assert kept["version"] == 3 and kept["files"][str(path)][2]["format"] == "WAV PCM_16"
    store = cache.code_store(tmp_path / "cache", "codec", 1)
    # A row as the former version wrote it: a file's codes stand under the hash of its bytes.
    codes = np.arange(4 * 75, dtype="<i2").reshape(4, 75)
    store.append([{"key": content, "views": 1, "codebooks": 4, "frames": [75], "codes": codes.tobytes()}])
    assert cache.missing_codes(store, found.columns) == {}
    np.testing.assert_array_equal(cache.open_codes(store, found.columns["content"]).crop(0, 0, 0, 75), codes)
