"""Each kind of bad file and folder, and the answer it gets."""

from __future__ import annotations

import csv
import os
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile

from tests.audio_files import noise, pcm16, wav_header, write_clip
from trainer.data import manifest
from trainer.data.caption_settings import CaptionSettings
from trainer.data.fates import Fate, display, summary, write_report
from trainer.data.manifest import Manifest
from trainer.errors import DataError


def scan(folder: Path, no_label: bool = False) -> Manifest:
    facts = folder.parent / "facts"
    captions = CaptionSettings(no_label=no_label)
    return manifest.scan(folder, captions=captions, min_seconds=0.5, facts_folder=facts, show_progress=False)


def fate_of(folder: Path, name: str, no_label: bool = False) -> Fate:
    """The fate of one file; a good clip is put beside it, so that the scan has something to use."""
    write_clip(folder / "good.wav", "good", seed=99)
    by_path = {one.path: one for one in scan(folder, no_label).fates}
    assert by_path["good.wav"].fate == "used"
    return by_path[name]


def float_wav(*values: float) -> Callable[[Path], None]:
    """A second of noise whose last samples are `values`."""

    def write(path: Path) -> None:
        samples = noise(1)
        samples[len(samples) - len(values) :] = values
        soundfile.write(path, samples, 8_000, subtype="FLOAT")

    return write


def holding(content: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content)


def of_samples(samples: np.ndarray, rate_hz: int = 8_000, **options: str) -> Callable[[Path], None]:
    return lambda path: soundfile.write(path, samples, rate_hz, **options)


SECOND = pcm16(1)
WHOLE = wav_header(len(SECOND)) + SECOND
APPLE_DOUBLE = struct.pack(">II16x", 0x00051607, 0x00020000) + bytes(4_000)
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"ab" * 32 + b"\nsize 12345\n"
FAST_CLOCK = WHOLE[:24] + struct.pack("<II", 2_000_000_000, 4_000_000_000) + WHOLE[32:]

BAD: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "zero bytes": (holding(b""), "unreadable", "zero bytes"),
    "cut in the header": (holding(WHOLE[:30]), "unreadable", "export it again"),
    "cut behind the header": (holding(WHOLE[:44]), "truncated", "0 of 16,000 bytes"),
    "cut in the samples": (holding(WHOLE[:-6_000]), "truncated", "10,000 of 16,000 bytes"),
    "web page": (holding(b"<!DOCTYPE html><html>404 Not Found</html>" * 20), "unreadable", "a web page (HTML)"),
    "AppleDouble": (holding(APPLE_DOUBLE), "unreadable", "not a sound file"),
    "zeros": (holding(bytes(100_000)), "unreadable", "not a sound file"),
    "impossible rate": (holding(FAST_CLOCK), "unreadable", "2,000,000,000 Hz"),
    "NaN": (float_wav(float("nan"), 0.0), "not finite", "near 0.0 s"),
    "infinity": (float_wav(float("inf")), "not finite", "NaN or infinite"),
    "minus infinity": (float_wav(float("-inf"), 0.0), "not finite", "NaN or infinite"),
    "16-bit numbers": (of_samples(noise(1) * 32_768, subtype="FLOAT"), "out of range", "divide them by 32768"),
    "git-lfs pointer": (holding(LFS), "unreadable", "run git lfs pull"),
    "silence": (of_samples(np.zeros(8_000)), "silent", "-80 dBFS"),
    "near silence": (of_samples(np.full(8_000, 9e-5), subtype="FLOAT"), "silent", "-80 dBFS"),
    "cancelling channels": (of_samples(noise(1)[:, None] * np.array([1, -1])), "silent", "cancel"),
    "no samples": (of_samples(np.zeros(0)), "empty", "no samples"),
    "a tenth of a second": (of_samples(noise(0.1)), "too short", "0.10 s, under the 0.5 s of --min_seconds"),
    "a folder": (Path.mkdir, "not a file", "folder"),
    "a FIFO": (os.mkfifo, "not a file", "pipe"),
    "dangling link": (lambda path: path.symlink_to("nowhere.wav"), "unreadable", "No such file"),
    "link to itself": (lambda path: path.symlink_to(path), "unreadable", "symbolic links"),
}

GOOD: dict[str, Callable[[Path], object]] = {
    "renamed mp3": of_samples(noise(1, 44_100), 44_100, format="MP3"),
    "renamed flac": of_samples(noise(1), format="FLAC"),
    "5.1 at 96 kHz": of_samples(noise(1, 96_000, 6), 96_000, subtype="PCM_24"),
    "8 kHz mu-law": of_samples(noise(1), subtype="ULAW"),
    "beyond full scale": of_samples(noise(1) * 10, subtype="FLOAT"),
    "just audible": of_samples(np.full(8_000, 1.1e-4), subtype="FLOAT"),
    "streamed": holding(wav_header(0xFFFFFFFF, 0xFFFFFFFF) + SECOND),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_sound_gets_its_fate_and_leaves_the_others_alone(tmp_path: Path, kind: str) -> None:
    make, fate, phrase = BAD[kind]
    folder = tmp_path / "data"
    folder.mkdir()
    make(folder / "x.wav")
    (folder / "x.txt").write_text("a caption")
    found = fate_of(folder, "x.wav")
    assert found.fate == fate and phrase in found.detail


@pytest.mark.parametrize("kind", GOOD)
def test_an_unusual_sound_is_used(tmp_path: Path, kind: str) -> None:
    (tmp_path / "data").mkdir()
    GOOD[kind](tmp_path / "data" / "x.wav")
    assert fate_of(tmp_path / "data", "x.wav", no_label=True).fate == "used"


def test_all_bad_sounds_in_one_folder_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for kind, (make, _, _) in BAD.items():
        make(tmp_path / "data" / f"{kind}.wav")
    found = {one.path: one.fate for one in scan_with_good(tmp_path / "data").fates}
    assert found == {f"{kind}.wav": fate for kind, (_, fate, _) in BAD.items()} | {"good.wav": "used"}


def scan_with_good(folder: Path) -> Manifest:
    write_clip(folder / "good.wav", seed=99)
    return scan(folder, no_label=True)


CAPTIONS: dict[str, tuple[bytes, str, str | None, str]] = {
    "UTF-8": ("sanfte Töne — 音楽".encode(), "used", "sanfte Töne — 音楽", ""),
    "UTF-8 with BOM": ("\ufeffcalm".encode(), "used", "calm", ""),
    "white space": (b"  calm\r\n\r\npiano\t \x0bsolo\r\n", "used", "calm piano solo", ""),
    "UTF-16 with BOM": ("Töne".encode("utf-16"), "used", "Töne", "UTF-16"),
    "UTF-16 big-endian": (b"\xfe\xff" + "Töne".encode("utf-16-be"), "used", "Töne", "UTF-16"),
    "Latin-1": ("sanfte Töne".encode("latin-1"), "used", "sanfte Töne", "Latin-1"),
    "Windows quotes": (b"a \x93loud\x94 caf\xe9", "used", "a “loud” café", "Latin-1"),
    "2,000 characters": (b"x" * 2_000, "used", "x" * 2_000, ""),
    "much white space": (b"calm" + b" " * 60_000 + b"piano", "used", "calm piano", ""),
    "empty": (b"", "used", None, "without text"),
    "blank": (b" \r\n\t", "used", None, "without text"),
    "BOM alone": (b"\xef\xbb\xbf", "used", None, "without text"),
    "2,001 characters": (b"x" * 2_001, "caption too long", None, "2,001 characters"),
    "60,000 characters": (b"word " * 12_000, "caption too long", None, "59,999 characters"),
    "two megabytes": (b"x" * 2_000_000, "caption too long", None, "right file"),
    "git-lfs pointer": (LFS, "caption unreadable", None, "run git lfs pull"),
    "rich text": (rb"{\rtf1\ansi\deff0 {\fonttbl {\f0 Times;}} slow rock}", "caption unreadable", None, "RTF"),
    "JSON": (b'{"caption": "slow rock",\n "bpm": 90}', "caption unreadable", None, "is JSON"),
    "web page": (b"<!DOCTYPE html><html><body>404</body></html>", "caption unreadable", None, "HTML"),
    "long web page": (b"<!DOCTYPE html>" + b"<p>x</p>" * 300_000, "caption unreadable", None, "HTML"),
    "angle brackets": (b"<my-style> <CAPTION>rock</CAPTION> a<b", "used", "<my-style> <CAPTION>rock</CAPTION> a<b", ""),
    "NULs": (b"calm\0piano", "caption unreadable", None, "UTF-8"),
    "UTF-16 without BOM": ("calm".encode("utf-16-le"), "caption unreadable", None, "UTF-8"),
    "cut UTF-16": ("calm".encode("utf-16")[:-1], "caption unreadable", None, "UTF-8"),
    "binary": (bytes(range(256)), "caption unreadable", None, "UTF-8"),
    "terminal codes": (b"\x1b[31mred\x1b[0m", "caption unreadable", None, "control"),
}


@pytest.mark.parametrize("kind", CAPTIONS)
def test_a_caption_is_read_or_its_clip_left_out_with_the_reason(tmp_path: Path, kind: str) -> None:
    content, fate, caption, phrase = CAPTIONS[kind]
    folder = tmp_path / "data"
    write_clip(folder / "x.wav").with_suffix(".txt").write_bytes(content)
    found = fate_of(folder, "x.wav")
    assert found.fate == fate and phrase in found.detail
    clips = scan(folder).clips
    used = dict(zip(clips["path"], clips["caption"], strict=True))
    assert used == ({"good.wav": "good", "x.wav": caption} if fate == "used" else {"good.wav": "good"})


def test_a_caption_that_is_a_pipe_or_a_dangling_link_is_unreadable(tmp_path: Path) -> None:
    os.mkfifo(write_clip(tmp_path / "data" / "pipe.wav", seed=1).with_suffix(".txt"))
    write_clip(tmp_path / "data" / "link.wav", seed=2).with_suffix(".txt").symlink_to("nowhere")
    assert fate_of(tmp_path / "data", "pipe.wav").fate == "caption unreadable"
    assert fate_of(tmp_path / "data", "link.wav").fate == "caption unreadable"


def test_a_sound_without_text_and_a_text_without_sound_say_what_is_missing(tmp_path: Path) -> None:
    write_clip(tmp_path / "data" / "sound.wav")
    (tmp_path / "data" / "text.txt").write_text("calm")
    sound, text = fate_of(tmp_path / "data", "sound.wav"), fate_of(tmp_path / "data", "text.txt")
    assert sound.fate == "no caption" and "sound.txt" in sound.detail and "--no_label 1" in sound.detail
    assert text.fate == "no audio" and "no sound of this name" in text.detail


def test_sounds_of_one_stem_share_a_caption_and_each_has_its_own_fate(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    write_clip(folder / "x.wav", "shared")
    names = ["x.mp3", "x.FLAC", "x.ogg", "x.m4a", "x.aiff"]
    for name in names:
        (folder / name).write_bytes(b"sound")
        found = fate_of(folder, name)
        assert found.fate == "unreadable" and "not a sound file" in found.detail
    soundfile.write(folder / "x.FLAC", noise(1, seed=5), 8_000, format="FLAC")
    (folder / "x.ogg.txt").write_text("fits the .ogg alone, which x.txt fits better")
    assert {name: fate_of(folder, name).fate for name in ("x.wav", "x.FLAC", "x.ogg.txt")} == {
        "x.wav": "used", "x.FLAC": "used", "x.ogg.txt": "ignored",
    }


def test_hidden_and_system_files_are_ignored_and_hidden_folders_skipped_whole(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    hidden = ("._x.wav", ".x.wav", ".DS_Store", "Thumbs.db", "sub/._x.txt")
    for name in (*hidden, "__MACOSX/a.wav", "__MACOSX/b/c.wav", "sub/.git/a.wav"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(APPLE_DOUBLE)
    fates = scan_with_good(folder).fates
    found = {one.path: one.fate for one in fates}
    assert all(("AppleDouble" in one.detail) == ("._" in one.path) for one in fates)
    assert found == {"good.wav": "used"} | dict.fromkeys([*hidden, "__MACOSX", "sub/.git"], "ignored")


def test_a_dataset_inside_a_hidden_folder_is_read(tmp_path: Path) -> None:
    assert len(scan_with_good(tmp_path / ".cache" / "data").clips) == 1


def test_links_to_files_and_folders_are_followed_and_each_real_folder_searched_once(tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
    folder.mkdir()
    write_clip(elsewhere / "x.wav", seed=1)
    write_clip(elsewhere / "deep/y.wav", seed=2)
    write_clip(folder / "own/z.wav", seed=3)
    write_clip(tmp_path / "third/w.wav", seed=4)
    (folder / "linked.wav").symlink_to(elsewhere / "x.wav")
    (folder / "folder").symlink_to(elsewhere)
    (folder / "again").symlink_to(elsewhere / "deep")  # searched first, by its name
    (folder / "another").symlink_to(elsewhere / "deep")
    (folder / "aa").symlink_to("own")
    (folder / "loop").symlink_to(".")
    (folder / "up").symlink_to("..")
    (folder / "own/back").symlink_to("..")
    (elsewhere / "deep/round").symlink_to("..")
    (elsewhere / "on").symlink_to(tmp_path / "third")
    (folder / "nowhere").symlink_to("missing")
    by_path = {one.path: one for one in scan_with_good(folder).fates}
    used = ["good.wav", "folder/x.wav", "again/y.wav", "own/z.wav", "folder/on/w.wav"]
    loops = ["loop", "up", "own/back", "again/round"]
    known = {"another": "again", "aa": "own", "folder/deep": "again"}
    assert {path: one.fate for path, one in by_path.items()} == {
        **dict.fromkeys(used, "used"), "linked.wav": "duplicate",
        **dict.fromkeys([*loops, *known, "nowhere"], "ignored"),
    }
    assert all("holds this one" in by_path[name].detail for name in loops)
    assert by_path["nowhere"].detail.startswith("a link to missing, which is not there: connect its disk")
    assert all(f"the same folder as {first}," in by_path[name].detail for name, first in known.items())


def test_two_links_that_lead_to_each_other_end(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    for seed, (name, other) in enumerate((("a", "b"), ("b", "a"))):
        write_clip(tmp_path / name / "x.wav", seed=seed)
        (tmp_path / name / "to").symlink_to(tmp_path / other)
    folder.mkdir()
    (folder / "a").symlink_to(tmp_path / "a")
    found = {one.path: one.fate for one in scan_with_good(folder).fates}
    assert found == {"good.wav": "used", "a/x.wav": "used", "a/to/x.wav": "used", "a/to/to": "ignored"}


def test_what_a_sync_tool_keeps_elsewhere_is_named_with_its_cause(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    write_clip(folder / "song.wav", seed=1)
    write_clip(folder / "note.wav", seed=2)
    causes = {
        ".other.wav.icloud": "iCloud", ".song.txt.icloud": "iCloud", "a.wav.nextcloud": "Nextcloud",
        "b.wav.cloud": "odrive", "c.WAV.rsls": "Resilio", "d.wav.crdownload": "unfinished download",
        ".syncthing.e.wav.tmp": "Syncthing", "~syncthing~f.wav.tmp": "Syncthing",
    }
    for name in (*causes, "note.gdoc", "a.part"):
        (folder / name).write_bytes(b"{}")
    write_clip(folder / "good.wav", "good", seed=99)
    by_path = {one.path: one for one in scan(folder).fates}
    for name, cause in causes.items():
        assert by_path[name].fate == ("ignored" if ".txt" in name else "unreadable") and cause in by_path[name].detail
    assert by_path["a.part"].detail == "neither a sound nor a caption"
    assert by_path["song.wav"].fate == by_path["note.wav"].fate == "caption unreadable"
    assert "song.txt is kept in iCloud" in by_path["song.wav"].detail
    assert "note.gdoc holds a link to a Google document" in by_path["note.wav"].detail
    assert {one.path: one.fate for one in scan(folder, no_label=True).fates}["song.wav"] == "used"


def test_a_placeholder_with_the_size_of_its_file_is_not_here_and_is_read_once_it_was_fetched(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    goods = {name: write_clip(folder / name, "x", seed=at) for at, name in enumerate(("a.wav", "b.wav"))}
    whole = {name: (path.read_bytes(), path.stat()) for name, path in goods.items()}
    for name, path in goods.items():
        path.write_bytes(b"")
        os.truncate(path, whole[name][1].st_size)
        os.utime(path, ns=(whole[name][1].st_mtime_ns,) * 2)
    with pytest.raises(DataError, match=r"none of its bytes are on this disk.*download it first"):
        scan(folder)
    for name, path in goods.items():  # as a sync tool fetches it: size and date stay
        path.write_bytes(whole[name][0])
        os.utime(path, ns=(whole[name][1].st_mtime_ns,) * 2)
    assert {one.path: one.fate for one in scan(folder).fates} == {"a.wav": "used", "b.wav": "used"}


def test_a_file_that_git_annex_has_not_fetched_says_how_to_fetch_it(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data/x.wav").symlink_to("../.git/annex/objects/f8/8J/SHA256E-s1--ab.wav/SHA256E-s1--ab.wav")
    found = fate_of(tmp_path / "data", "x.wav", no_label=True)
    assert found.fate == "unreadable" and "git annex get" in found.detail


def test_a_folder_named_like_a_sound_is_searched(tmp_path: Path) -> None:
    write_clip(tmp_path / "data" / "take.wav" / "a.wav", seed=1)
    found = {one.path: one.fate for one in scan_with_good(tmp_path / "data").fates}
    assert found == {"good.wav": "used", "take.wav": "not a file", "take.wav/a.wav": "used"}


NAMES = [
    b"line\nbreak", b'"quoted", and; $(echo no) `no`', b"-rf", b"=1+1", b" spaces ", b"many.dots.here",
    b"\xff\xfe broken",
    "音楽 é".encode(), "e\N{COMBINING ACUTE ACCENT}".encode(), b"\x1b[31mred", b"x" * 240, b"back\\slash", b"tab\there",
]


@pytest.mark.parametrize("no_label", [False, True])
def test_any_name_is_used_printed_and_reported(tmp_path: Path, no_label: bool) -> None:
    folder = tmp_path / "data"
    for seed, stem in enumerate(NAMES):
        write_clip(folder / os.fsdecode(stem + b".wav"), f"caption {seed}", seed=seed)
        write_clip(folder / "left out" / os.fsdecode(stem + b".wav"), "short", seconds=0.1)
        write_clip(folder / os.fsdecode(b"sub" + stem[:100]) / "a.wav", f"in {seed}", seed=100 + seed)
    found = scan(folder, no_label)
    assert len(found.clips) == 2 * len(NAMES) and len(found.fates) == 3 * len(NAMES)
    for row in found.clips:
        assert os.path.isfile(row["path_bytes"])
    text = summary(found.fates)
    assert text.encode("utf-8") and all(line.isprintable() for line in text.splitlines())
    write_report(found.fates, tmp_path / "report.csv")
    with open(tmp_path / "report.csv", newline="", encoding="utf-8") as file:
        assert [Fate(**row) for row in csv.DictReader(file)] == list(found.fates)  # type: ignore[arg-type]
    assert scan(folder, no_label).clips[:] == found.clips[:]  # from the facts that were kept


def test_names_are_shown_as_one_printable_line() -> None:
    assert display(os.fsdecode(b"a\nb\xff\x1bc \xc3\xa9.wav")) == r"a\nb\xff\x1bc é.wav"


def test_no_usable_clip_is_an_error_that_counts_and_says_what_to_do(tmp_path: Path) -> None:
    for seed in range(3):
        write_clip(tmp_path / "data" / f"{seed}.wav", seed=seed)
    (tmp_path / "data" / "x.mp3").write_bytes(b"sound")
    with pytest.raises(DataError) as caught:
        scan(tmp_path / "data")
    counts = ("4  no caption",)
    for phrase in (str(tmp_path / "data"), *counts, "--no_label 1", "0.txt", "x.txt"):
        assert phrase in str(caught.value)


def test_where_no_clip_is_left_the_error_says_how_to_caption_many_and_names_no_report(tmp_path: Path) -> None:
    for seed in range(12):
        write_clip(tmp_path / "data" / f"{seed}.wav", seed=seed)
    with pytest.raises(DataError, match=r"and 2 more\n(.*\n)*.*scripts/caption\.py") as caught:
        scan(tmp_path / "data")
    assert "dataset.csv" not in str(caught.value)


def test_an_empty_folder_is_an_error_that_says_what_to_put_there(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    with pytest.raises(DataError, match=r"no files.*\.wav.*\.txt"):
        scan(tmp_path / "data")


def test_no_such_folder_a_file_and_a_looping_link_are_errors_that_name_it(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"missing cannot be opened \(No such file"):
        scan(tmp_path / "missing")
    with pytest.raises(DataError, match=r"a\.wav is a file: give the folder"):
        scan(write_clip(tmp_path / "a.wav"))
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(DataError, match="loop cannot be opened"):
        scan(tmp_path / "loop")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_what_may_not_be_read_is_reported_and_mended_rights_are_noticed(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    path, inside = write_clip(folder / "x.wav", seed=1), write_clip(folder / "sub" / "a.wav", seed=2).parent
    path.chmod(0)
    inside.chmod(0)
    try:
        found = {one.path: one.fate for one in scan_with_good(folder).fates}
        assert found == {"good.wav": "used", "x.wav": "unreadable", "sub": "unreadable"}
    finally:
        path.chmod(0o600)
        inside.chmod(0o700)
    found = {one.path: one.fate for one in scan_with_good(folder).fates}
    assert found == {"good.wav": "used", "x.wav": "used", "sub/a.wav": "used"}
