from __future__ import annotations

import csv
import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile

from tests.audio_files import noise, write_clip, write_sparse_hours
from tests.opens import counted_opens
from trainer.data import audio, audio_facts, manifest
from trainer.data.caption_settings import CaptionSettings
from trainer.data.fates import Fate, changed_since, summary, write_report
from trainer.data.held_out import share_of
from trainer.data.manifest import Manifest
from trainer.data.wav_header import REREAD
from trainer.errors import ConfigError, StorageError

ROOT = Path(__file__).resolve().parents[2]


def scan(folder: Path, facts: Path | None = None, **options: bool) -> Manifest:
    return manifest.scan(
        folder, captions=CaptionSettings(no_label=options.get("no_label", False)), min_seconds=0.5, show_progress=False,
        facts_folder=facts or folder.parent / "facts", rehash=options.get("rehash", False),
    )


def fates(found: Manifest) -> dict[str, str]:
    assert len({one.path for one in found.fates}) == len(found.fates)
    return {one.path: one.fate for one in found.fates}


def details(found: Manifest) -> dict[str, str]:
    return {one.path: one.detail for one in found.fates}


def captions(found: Manifest) -> dict[str, str | None]:
    return dict(zip(found.clips["path"], found.clips["caption"], strict=True))


def test_the_table_holds_what_the_files_hold(tmp_path: Path) -> None:
    write_clip(tmp_path / "data" / "a.wav", "calm piano", seconds=1.5)
    soundfile.write(tmp_path / "data" / "b.wav", noise(1, 48_000, 2), 48_000)
    (tmp_path / "data" / "b.txt").write_text("")
    clips = scan(tmp_path / "data").clips
    assert {name: feature.dtype for name, feature in clips.features.items()} == {
        "path": "string", "path_bytes": "binary", "size_bytes": "int64", "caption": "string", "seconds": "float64",
        "sample_rate_hz": "int32", "channels": "int32", "content": "string",
        "caption_source": "string", "caption_fields": "string",
        "first_frame": "int64", "frames": "int64", "gain": "float64", "sound": "string",
        "melody_path_bytes": "binary", "melody_content": "string", "melody_size_bytes": "int64",
    }
    rows = {row["path"]: row for row in clips}
    of_a = audio.inspect(tmp_path / "data" / "a.wav")
    assert rows["a.wav"] == {
        "path": "a.wav", "path_bytes": os.fsencode(tmp_path / "data" / "a.wav"), "caption": "calm piano",
        "size_bytes": (tmp_path / "data" / "a.wav").stat().st_size, "seconds": 1.5, "sample_rate_hz": 8_000,
        "channels": 1, "content": of_a.content, "sound": of_a.sound,
        "first_frame": 0, "frames": 12_000, "gain": 1.0,
        "caption_source": "a.txt", "caption_fields": "",
        "melody_path_bytes": b"", "melody_content": "", "melody_size_bytes": 0,
    }
    b = rows["b.wav"]
    assert (b["caption"], b["seconds"], b["sample_rate_hz"], b["channels"]) == (None, 1.0, 48_000, 2)


def test_the_same_files_elsewhere_in_another_order_give_the_same_table(tmp_path: Path) -> None:
    names = [f"{folder}{name}.wav" for folder in ("", "x/", "x/y/") for name in ("b", "a", "c", "é")]
    for place, order in (("one", names), ("two/deeper", names[::-1])):
        for name in order:
            write_clip(tmp_path / place / name, caption=f"about {name}", seed=names.index(name) % 5)
    one, two = scan(tmp_path / "one"), scan(tmp_path / "two" / "deeper")
    assert one.fates == two.fates
    assert one.clips.remove_columns("path_bytes")[:] == two.clips.remove_columns("path_bytes")[:]
    assert [os.fsdecode(path) for path in two.clips["path_bytes"]] == [
        str(tmp_path / "two" / "deeper" / name) for name in one.clips["path"]
    ]
    keys = [(row["content"], row["caption"]) for row in one.clips]
    assert len(keys) == len(names) and keys == sorted(keys)


def test_a_relative_folder_is_the_same_as_an_absolute_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_clip(tmp_path / "data" / "a.wav", "x")
    absolute = scan(tmp_path / "data").clips[:]
    monkeypatch.chdir(tmp_path)
    assert scan(Path("data")).clips[:] == absolute


def test_captions_pair_by_stem_whatever_the_case_and_the_way_accents_are_stored(tmp_path: Path) -> None:
    pairs = {
        "plain.wav": "plain.txt", "UPPER.WAV": "UPPER.TXT", "Mixed.Wav": "mixed.txt",
        "v1.2 final.wav": "v1.2 final.txt",
        "caf\N{LATIN SMALL LETTER E WITH ACUTE}.wav": "cafe\N{COMBINING ACUTE ACCENT}.txt",
        "sub/plain.wav": "sub/plain.txt",
    }
    for seed, (name, caption_name) in enumerate(pairs.items()):
        write_clip(tmp_path / "data" / name, seed=seed)
        (tmp_path / "data" / caption_name).write_text(f"from {caption_name}")
    assert captions(scan(tmp_path / "data")) == {name: f"from {text}" for name, text in pairs.items()}


def test_an_exact_stem_wins_over_one_that_differs_in_case(tmp_path: Path) -> None:
    for seed, stem in enumerate(("song", "Song")):
        write_clip(tmp_path / "data" / f"{stem}.wav", f"of {stem}", seed=seed)
    write_clip(tmp_path / "data" / "solo.wav", "exact", seed=2)
    (tmp_path / "data" / "SOLO.txt").write_text("other")
    found = scan(tmp_path / "data")
    assert captions(found) == {"song.wav": "of song", "Song.wav": "of Song", "solo.wav": "exact"}
    assert fates(found)["SOLO.txt"] == "ignored"
    (tmp_path / "data" / "Song.txt").unlink()
    assert fates(scan(tmp_path / "data"))["Song.wav"] == "no caption"


def test_a_caption_may_have_the_whole_name_of_its_sound(tmp_path: Path) -> None:
    pairs = {"a.wav": "a.wav.txt", "B.WAV": "b.wav.txt", "c.wav": "c.txt", "d.wav.wav": "d.wav.txt"}
    for seed, (name, caption_name) in enumerate(pairs.items()):
        write_clip(tmp_path / "data" / name, seed=seed)
        (tmp_path / "data" / caption_name).write_text(f"from {caption_name}")
    (tmp_path / "data" / "c.wav.txt").write_text("the shorter name wins")
    write_clip(tmp_path / "data" / "d.wav", seed=9)  # its d.wav.txt is that of d.wav.wav
    found = scan(tmp_path / "data")
    assert captions(found) == {name: f"from {text}" for name, text in pairs.items()}
    assert fates(found)["c.wav.txt"] == "ignored" and fates(found)["d.wav"] == "no caption"


def test_equal_sound_with_an_equal_caption_is_used_once_and_with_another_again(tmp_path: Path) -> None:
    for name, caption in (("c", "calm"), ("a/z", "calm"), ("b", " calm\n"), ("d", "loud"), ("e", "")):
        write_clip(tmp_path / "data" / f"{name}.wav", caption)
    found = scan(tmp_path / "data")
    assert fates(found) == {
        "a/z.wav": "used", "b.wav": "duplicate", "c.wav": "duplicate", "d.wav": "used", "e.wav": "used",
    }
    assert "a/z.wav" in details(found)["b.wav"] and "a/z.wav" in details(found)["c.wav"]
    assert captions(found) == {"a/z.wav": "calm", "d.wav": "loud", "e.wav": None}


def test_no_label_trains_all_clips_without_text_even_where_there_is_some(tmp_path: Path) -> None:
    write_clip(tmp_path / "data" / "a.wav", seed=1)
    write_clip(tmp_path / "data" / "b.wav", "unused", seed=2)
    write_clip(tmp_path / "data" / "c.wav", seed=3)
    (tmp_path / "data" / "c.txt").write_bytes(b"\0\0 not even text")
    found = scan(tmp_path / "data", no_label=True)
    assert captions(found) == {"a.wav": None, "b.wav": None, "c.wav": None}
    assert "--no_label" in details(found)["b.wav"] and details(found)["a.wav"] == ""


def test_every_file_has_one_fate_and_a_caption_in_use_shares_that_of_its_clip(tmp_path: Path) -> None:
    for seed, name in enumerate(("a.wav", "b.wav", "x/a.wav")):
        write_clip(tmp_path / "data" / name, f"{name}", seed=seed)
    for name in ("a.mp3", "notes.md", "x/lonely.txt", "x/cover.jpg", ".DS_Store", "x/Thumbs.db"):
        (tmp_path / "data" / name).write_text("x")
    found = fates(scan(tmp_path / "data"))
    files = {str(path.relative_to(tmp_path / "data")) for path in (tmp_path / "data").rglob("*") if path.is_file()}
    assert set(found) == files - {"a.txt", "b.txt", "x/a.txt"}
    assert Counter(found.values()) == {"used": 3, "unreadable": 1, "no audio": 1, "ignored": 4}


def replace_unseen(path: Path) -> None:
    """Other bytes of equal number under an equal modification time."""
    status = path.stat()
    path.write_bytes(b"#" * status.st_size)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_unchanged_files_are_not_read_again_unless_asked(tmp_path: Path) -> None:
    good, other = write_clip(tmp_path / "data" / "a.wav", "a"), write_clip(tmp_path / "data" / "b.wav", "b", seed=1)
    bad = tmp_path / "data" / "bad.wav"
    bad.write_bytes(b"nothing")
    bad.with_suffix(".txt").write_text("bad")
    before = scan(tmp_path / "data")
    assert fates(before) == {"a.wav": "used", "b.wav": "used", "bad.wav": "unreadable"}
    replace_unseen(good)
    replace_unseen(bad)
    again = scan(tmp_path / "data")
    assert again.clips[:] == before.clips[:] and again.fates == before.fates
    assert fates(scan(tmp_path / "data", rehash=True))["a.wav"] == "unreadable"
    assert fates(scan(tmp_path / "data"))["a.wav"] == "unreadable"
    write_clip(bad, seed=2)
    os.utime(other, ns=(0, 0))
    other.write_bytes(b"#" * other.stat().st_size)
    assert fates(scan(tmp_path / "data")) == {"a.wav": "unreadable", "b.wav": "unreadable", "bad.wav": "used"}


def test_a_second_scan_opens_each_caption_once_and_asks_once_what_each_file_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "music"
    (folder / "sub").mkdir(parents=True)
    for number in range(12):
        write_clip((folder / "sub" if number % 2 else folder) / f"{number}.wav", "slow rock", seed=number)
    first = scan(folder, tmp_path / "facts")
    files = [str(path) for path in folder.rglob("*.*")]
    asked: Counter[str] = Counter()
    listed: Counter[str] = Counter()
    for counts, function in ((asked, "stat"), (asked, "lstat"), (listed, "scandir")):
        real = getattr(os, function)
        monkeypatch.setattr(
            os, function,
            lambda path, counts=counts, real=real, **more: (counts.update([os.fsdecode(path)]), real(path, **more))[1],
        )
    with counted_opens(folder) as opened, counted_opens(folder / "sub") as opened_below:
        again = scan(folder, tmp_path / "facts")
    assert again == first
    assert len(files) == 24 and {path: asked[path] for path in files} == dict.fromkeys(files, 1)
    opened.pop("sub")  # to list it
    assert {**opened, **opened_below} == {f"{number}.txt": 1 for number in range(12)}
    # For tables, and for sounds; the folder itself also to see whether it can be listed.
    assert listed == {str(folder): 3, str(folder / "sub"): 2}


def test_captions_and_limits_are_looked_at_anew_every_time(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "data" / "a.wav", "before", seconds=1)
    write_clip(tmp_path / "data" / "b.wav", "b", seconds=2)
    scan(tmp_path / "data")
    path.with_suffix(".txt").write_text("after")
    assert captions(scan(tmp_path / "data"))["a.wav"] == "after"
    facts = tmp_path / "facts"
    longer = manifest.scan(tmp_path / "data", min_seconds=1.5, facts_folder=facts, show_progress=False)
    assert fates(longer)["a.wav"] == "too short"


def test_what_an_older_version_judged_is_judged_anew_once_and_keeps_its_key(tmp_path: Path) -> None:
    good, loud = write_clip(tmp_path / "data" / "a.wav", "a"), tmp_path / "data" / "b.wav"
    soundfile.write(loud, noise(1) * 32_768, 8_000, subtype="FLOAT")
    loud.with_suffix(".txt").write_text("b")
    facts, files = tmp_path / "facts" / audio_facts.FILE_NAME, {}
    for path in (good, loud):  # as version 1 wrote it
        content = hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()
        said = {"seconds": 1.0, "sample_rate_hz": 8_000, "channels": 1, "content": content}
        files[str(path)] = [path.stat().st_size, path.stat().st_mtime_ns, said]
    write_clip(tmp_path / "more" / "c.wav", "c")
    facts.parent.mkdir()
    facts.write_text(json.dumps({"version": 1, "files": files}))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))  # a complete cache need not be writable
    try:
        read_only = scan(tmp_path / "data")
        with pytest.raises(StorageError, match="--cache_dir"):
            scan(tmp_path / "more", tmp_path / "facts")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    found = scan(tmp_path / "data")
    assert found == read_only and fates(found) == {"a.wav": "used", "b.wav": "out of range"}
    assert found.columns["content"] == [files[str(good)][2]["content"]]
    replace_unseen(good)
    assert scan(tmp_path / "data") == found


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"version": 1, "files": {"/a.wav": [1]}}', b"\xff\xfe\0"])
def test_damaged_facts_are_made_anew(tmp_path: Path, content: bytes) -> None:
    write_clip(tmp_path / "data" / "a.wav", "a")
    expected = scan(tmp_path / "data", tmp_path / "other").clips[:]
    (tmp_path / "facts").mkdir()
    (tmp_path / "facts" / audio_facts.FILE_NAME).write_bytes(content)
    assert scan(tmp_path / "data").clips[:] == expected
    assert list(json.loads((tmp_path / "facts" / audio_facts.FILE_NAME).read_text())["files"]) == [
        str(tmp_path / "data" / "a.wav")
    ]


def test_a_killed_scan_keeps_what_it_saved(tmp_path: Path) -> None:
    small = [str(write_clip(tmp_path / f"{seed}.wav", seed=seed)) for seed in range(3)]
    large = str(write_sparse_hours(tmp_path / "large.wav", hours=4))
    program = (
        "import sys; from pathlib import Path; from trainer.data import audio_facts; audio_facts.SAVE_SECONDS = 0.0;"
        "audio_facts.inspect_all(sys.argv[2:], Path(sys.argv[1]), show_progress=False)"
    )
    facts = tmp_path / "facts"
    process = subprocess.Popen([sys.executable, "-c", program, str(facts), *small, large], cwd=ROOT)
    try:
        deadline = time.monotonic() + 60
        while len(audio_facts._load(facts)) < 3 and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.01)
    finally:
        process.kill()
        assert process.wait() == -signal.SIGKILL
    known = audio_facts._load(facts)
    assert {path: said for path, (_, said) in known.items()} == {path: audio.inspect(Path(path)) for path in small}


def test_a_folder_for_facts_that_cannot_be_written_is_named_with_its_flag(tmp_path: Path) -> None:
    write_clip(tmp_path / "data" / "a.wav", "a")
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(StorageError, match=r"taken/facts.*Not a directory.*--cache_dir"):
        scan(tmp_path / "data", tmp_path / "taken" / "facts")
    # A limit on the size of files fails as a full disk does: after some of the bytes are written.
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))
    try:
        with pytest.raises(StorageError, match=r"full.*File too large.*--cache_dir"):
            scan(tmp_path / "data", tmp_path / "full")
        with pytest.raises(StorageError, match=r"report\.csv.*--output_dir"):
            write_report([Fate(path="a.wav", fate="used")], tmp_path / "report.csv")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list((tmp_path / "full").iterdir()) == [] and not list(tmp_path.glob("*report*"))


def test_complete_facts_need_not_be_writable(tmp_path: Path) -> None:
    write_clip(tmp_path / "data" / "a.wav", "a")
    expected = scan(tmp_path / "data").clips[:]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        assert scan(tmp_path / "data").clips[:] == expected
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_the_split_is_about_the_share_asked_for() -> None:
    contents = [f"{number:032x}" for number in range(5_000)]
    for seed in range(5):
        # 5 standard deviations of a binomial with n = 5,000 and p = 0.1: one false alarm in 1.7 million.
        assert abs(share_of(contents, seed, 0.1).sum() - 500) < 5 * np.sqrt(5_000 * 0.1 * 0.9)


def test_added_files_move_no_other_and_equal_files_stay_together() -> None:
    contents = [f"{number:032x}" for number in range(300)]
    chosen = dict(zip(contents, share_of(contents, 3, 0.2), strict=True))
    some = contents[::-7] + contents[::3]
    np.testing.assert_array_equal(share_of(some, 3, 0.2), [chosen[content] for content in some])


def test_a_larger_share_keeps_what_a_smaller_one_chose_and_another_seed_chooses_anew() -> None:
    contents = [f"{number:032x}" for number in range(1_000)]
    masks = [share_of(contents, 1, share) for share in (0.0, 0.05, 0.3, 1.0)]
    assert not masks[0].any() and masks[3].all()
    assert (masks[1] <= masks[2]).all() and masks[1].sum() < masks[2].sum()
    # Two seeds agree on being chosen for 0.3 x 0.3 of the clips: 90 of 1,000, deviation 9.
    assert abs((masks[2] & share_of(contents, 2, 0.3)).sum() - 90) < 45
    assert share_of([], 1, 0.5).shape == (0,) and masks[0].dtype == bool


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan")])
def test_a_share_outside_0_to_1_is_refused(share: float) -> None:
    with pytest.raises(ConfigError, match="0 to 1"):
        share_of(["a"], 1, share)


def test_the_report_reads_back_with_every_name_and_detail(tmp_path: Path) -> None:
    path = tmp_path / "run" / "report.csv"
    rows = [
        Fate(path='a "quoted", name.wav', fate="used"),
        Fate(path="é — 音楽.wav", fate="too short", detail="0.1 s, under"),
    ]
    write_report(rows, path)
    with open(path, newline="", encoding="utf-8") as file:
        assert [Fate(**row) for row in csv.DictReader(file)] == rows  # type: ignore[arg-type]
    assert os.listdir(path.parent) == ["report.csv"]


def test_files_that_are_used_otherwise_than_in_a_report_are_named_and_no_others(tmp_path: Path) -> None:
    then = [Fate(path=name, fate="used") for name in ("same.wav", "gone.wav", "loud.wav", "stale.wav", "remarked.wav")]
    then += [Fate(path="short.wav", fate="too short"), Fate(path="other.wav", fate="truncated")]
    write_report(then, tmp_path / "report.csv")
    now = [
        Fate(path="same.wav", fate="used"), Fate(path="loud.wav", fate="out of range", detail="divide it"),
        Fate(path="stale.wav", fate="used", detail=f"all 2.00 s {REREAD}"), Fate(path="short.wav", fate="used"),
        Fate(path="remarked.wav", fate="used", detail="T5 does not know x"), Fate(path="new.wav", fate="used"),
        Fate(path="other.wav", fate="silent"), Fate(path="notes.md", fate="ignored"),
    ]  # fmt: skip
    assert changed_since(tmp_path / "report.csv", now) == (
        "files used otherwise than then: gone.wav (used then, not there now), loud.wav (used then, out of range now),"
        " new.wav (not there then, used now), short.wav (too short then, used now),"
        f" stale.wav (all 2.00 s {REREAD})"
    )
    assert changed_since(tmp_path / "report.csv", then) == ""
    many = [Fate(path=f"{number:02}.wav", fate="used") for number in range(12)]
    assert changed_since(tmp_path / "missing.csv", many).endswith("09.wav (not there then, used now) and 2 more")


def test_the_summary_counts_all_and_shows_each_kind_left_out_before_a_second_of_any() -> None:
    rows = [Fate(path=f"used {number}.wav", fate="used") for number in range(1_234)]
    rows += [Fate(path=f"short {number}.wav", fate="too short", detail="use a longer take") for number in range(500)]
    rows += [Fate(path=f"text {number}.txt", fate="no audio", detail="add it") for number in range(2)]
    text = summary(rows)
    assert "1,234  used" in text and "500  too short" in text and "2  no audio" in text
    shown = [line for line in text.splitlines() if line.startswith("  ") and ": " in line]
    assert len(shown) == 10
    assert [line.split()[0] for line in shown[:4]] == ["short", "text", "short", "text"]
    assert shown[0] == "  short 0.wav: too short: use a longer take"


def test_the_summary_shows_what_is_no_music_once_where_music_is_left_out_and_how_to_caption_it_without_a_text_each():
    rows = [Fate(path=f"{number}.jpg", fate="ignored") for number in range(30)]
    rows += [Fate(path=f"{number:02}.mp3", fate="no caption", detail="write it") for number in range(30)]
    lines = summary(rows, rest="named elsewhere").splitlines()
    shown = [line.split(":")[0].strip() for line in lines if line.startswith("  ") and ": " in line]
    assert shown == ["00.mp3", "0.jpg", *(f"{number:02}.mp3" for number in range(1, 9))]
    assert "  and 50 more, named elsewhere" in lines
    for way in ("scripts/caption.py", "--caption_template", "--default_caption", "--no_label 1"):
        assert any(way in line for line in lines)
        assert way not in summary(rows[:30])  # nothing there lacks a caption
    assert len([line for line in summary(rows[:30]).splitlines() if ".jpg" in line]) == 10


def test_importing_the_manifest_and_scanning_loads_no_torch(tmp_path: Path) -> None:
    write_clip(tmp_path / "data" / "a.wav", "a")
    program = (
        "import sys; from pathlib import Path; from trainer.data import manifest;"
        "assert 'torch' not in sys.modules and 'datasets' not in sys.modules;"
        "manifest.scan(Path(sys.argv[1]), min_seconds=0.5, facts_folder=Path(sys.argv[2]));"
        "assert 'torch' not in sys.modules"
    )
    arguments = [sys.executable, "-c", program, str(tmp_path / "data"), str(tmp_path / "facts")]
    assert subprocess.run(arguments, cwd=ROOT, timeout=60).returncode == 0
