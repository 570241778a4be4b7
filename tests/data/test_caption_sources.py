"""Where a sound's caption comes from: files of its name, metadata files, .json files, templates and flags, in order."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.audio_files import write_clip
from tests.opens import counted_opens
from trainer.data import manifest
from trainer.data.caption_settings import CaptionSettings
from trainer.data.caption_sources import check_texts
from trainer.data.fates import Fate
from trainer.data.inventory import UnusableDataError
from trainer.data.manifest import Manifest
from trainer.data.music_fields import MergeRates
from trainer.errors import ConfigError

LYRICS = "[Verse]\nla la\n[Chorus]\nlo lo\n"


def folder_of(root: Path, files: Mapping[str, str | bytes | None]) -> Path:
    """A data folder of these files by name; those that end in .wav are written as sounds, each of its own content."""
    for seed, (name, content) in enumerate(files.items()):
        path = root / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.lower().endswith(".wav"):
            write_clip(path, seed=seed)
        elif isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.write_text(str(content), encoding="utf-8")
    return root / "data"


def scan(folder: Path, **settings: Any) -> Manifest:
    facts = folder.parent / "facts"
    captions = CaptionSettings(**settings)
    return manifest.scan(folder, min_seconds=0.5, facts_folder=facts, show_progress=False, captions=captions)


def rows_of(found: Manifest) -> dict[str, tuple[str | None, str]]:
    """Caption and source of each clip, by its name."""
    columns = found.columns
    rows = zip(columns["path"], columns["caption"], columns["caption_source"], strict=True)
    return {path: (caption, source) for path, caption, source in rows}


def fates_of(found: Manifest) -> dict[str, Fate]:
    assert len({one.path for one in found.fates}) == len(found.fates)
    return {one.path: one for one in found.fates}


def fates_or_error(folder: Path, name: str, **settings: Any) -> str:
    """Fate and detail of a file, as the table or the refusal shows them."""
    try:
        one = fates_of(scan(folder, **settings))[name]
    except UnusableDataError as error:
        (one,) = (fate for folder in error.folders for fate in folder.fates if fate.path == name)
    return f"{one.fate}: {one.detail}"


ALL: dict[str, str | None] = {
    "song.wav": None, "song.caption.txt": "marked", "song.txt": "plain", "song.wav.txt": "whole name",
    "metadata.csv": "file_name,text\nsong.wav,row", "song.json": json.dumps({"description": "described"}),
}  # fmt: skip


def test_the_first_source_in_the_order_of_the_list_speaks_and_is_named(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, ALL)
    settings: dict[str, Any] = {"template": "a {name}", "default": "last"}
    assert rows_of(scan(folder, **settings))["song.wav"] == ("marked", "song.caption.txt")
    for order, expected in {
        ("metadata", "text"): ("row", "metadata.csv line 2"),
        ("json", "text"): ("described", "song.json"),
        ("template", "text"): ("a song", "--caption_template"),
    }.items():
        found = scan(folder, **settings, sources=order)
        assert rows_of(found)["song.wav"] == expected
        assert fates_of(found)["song.wav"].detail == f"caption from {expected[1]}"
    seen = []
    for name in ("song.caption.txt", "song.txt", "song.wav.txt", "metadata.csv", "song.json"):
        seen.append(rows_of(scan(folder, **settings))["song.wav"][0])
        (folder / name).unlink()
    seen.append(rows_of(scan(folder, **settings))["song.wav"][0])
    seen.append(rows_of(scan(folder, default="last"))["song.wav"][0])
    assert seen == ["marked", "plain", "whole name", "row", "described", "a song", "last"]
    assert fates_or_error(folder, "song.wav").startswith("no caption: write song.txt beside it")
    assert rows_of(scan(folder, instead="for all"))["song.wav"] == ("for all", "--caption")


def test_a_plain_folder_has_its_captions_and_fates_as_before(tmp_path: Path) -> None:
    folder = folder_of(
        tmp_path,
        {"a.wav": None, "a.txt": " slow\n rock ", "b.wav": None, "b.wav.txt": "", "notes.csv": "x", "a.json": "{}",
         "c.wav": None},
    )  # fmt: skip
    found = scan(folder)
    assert [(one.path, one.fate, one.detail) for one in found.fates] == [
        ("a.json", "ignored", "neither a sound nor a caption"),
        ("a.wav", "used", ""),
        ("b.wav", "used", "empty caption: trained without text"),
        ("c.wav", "no caption", "write c.txt beside it, or train without text: --no_label 1"),
        ("notes.csv", "ignored", "neither a sound nor a caption"),
    ]
    assert rows_of(found) == {"a.wav": ("slow rock", "a.txt"), "b.wav": (None, "b.wav.txt")}


def test_where_a_text_is_lyrics_the_next_source_is_asked_and_the_report_says_so(tmp_path: Path) -> None:
    table = "File,BPM,Key,Caption\n" + "".join(f"{name}.wav,90,C,slow\n" for name in "abcd")
    sung = "we ride tonight\nall the way\n\nwe ride again\nuntil the day\n"
    folder = folder_of(
        tmp_path,
        {"a.wav": None, "a.txt": LYRICS, "b.wav": None, "b.txt": "[Instrumental]\n", "c.wav": None, "c.txt": sung,
         "d.wav": None, "d.txt": "its own\ncaption", "e.wav": None, "e.txt": LYRICS,
         "e.json": json.dumps({"caption": "fast"}), "f.wav": None, "f.txt": sung, "g.wav": None, "g.txt": LYRICS,
         "key_bpm.csv": table},
    )  # fmt: skip
    found, captions = fates_of(scan(folder)), {name: caption for name, (caption, _) in rows_of(scan(folder)).items()}
    assert {name: captions.get(f"{name}.wav") for name in "abcdeg"} == {
        "a": "slow", "b": "slow", "c": "slow", "d": "its own caption", "e": "fast", "g": None
    }
    assert found["a.wav"].detail == "caption from key_bpm.csv line 2; a.txt is lyrics, and not read"
    assert found["c.wav"].detail == "caption from key_bpm.csv line 4; c.txt looks like lyrics, and is not read"
    assert found["e.wav"].detail.startswith("caption from e.json; e.txt is lyrics, and not read")
    assert captions["f.wav"] == " ".join(sung.split()) and "look like lyrics" in found["f.wav"].detail
    assert found["g.wav"].fate == "caption unreadable" and "g.txt is lyrics" in found["g.wav"].detail
    last = scan(folder, default="last")
    assert rows_of(last)["g.wav"][0] == "last" and "g.txt is lyrics, and not read" in fates_of(last)["g.wav"].detail
    assert rows_of(scan(folder, sources=("text",)))["c.wav"][0] == " ".join(sung.split())


def test_a_text_of_another_program_beside_a_sound_is_told_the_name_that_is_read(tmp_path: Path) -> None:
    folder = folder_of(
        tmp_path,
        {"a.wav": None, "a_prompt.txt": "slow", "a_lyrics.txt": "la la", "a-caption.txt": "slow", "b.wav": None,
         "b.txt": "fast", "caption.txt": "for all", "c_lyrics.wav": None, "c_lyrics.txt": "about lyrics"},
    )  # fmt: skip
    found = fates_of(scan(folder))
    for name in ("a_prompt.txt", "a-caption.txt"):
        assert found[name].fate == "ignored" and found[name].detail.endswith("it is named a.caption.txt")
    assert (found["a_lyrics.txt"].fate, found["a.wav"].fate) == ("ignored", "no caption")
    assert "not trained on" in found["a_lyrics.txt"].detail
    assert found["caption.txt"].fate == "no audio" and "--default_caption" in found["caption.txt"].detail
    assert rows_of(scan(folder))["c_lyrics.wav"] == ("about lyrics", "c_lyrics.txt")


def test_a_table_that_does_not_say_of_which_files_its_captions_are_says_what_it_lacks(tmp_path: Path) -> None:
    folder = folder_of(
        tmp_path,
        {"a.wav": None, "a.txt": "a", "b.wav": None, "metadata.csv": "filename,description\nb.wav,slow\n",
         "sub/c.wav": None, "sub/captions.csv": "ytid,caption\nc,slow\n", "sub/tempo.csv": "ytid,tempo\nc,90\n"},
    )  # fmt: skip
    found = fates_of(scan(folder))
    lacks = "has no column file_name (its columns: filename, description)"
    assert found["metadata.csv"].fate == "ignored"
    assert found["metadata.csv"].detail.startswith(f"{lacks}: call the one that names the files so")
    assert found["b.wav"].fate == "no caption"
    assert found["b.wav"].detail.startswith(f"metadata.csv {lacks}: write b.txt")
    assert found["sub/captions.csv"].detail.startswith("has no column file_name (its columns: ytid, caption)")
    assert found["sub/c.wav"].detail.startswith("sub/captions.csv has no column file_name")
    assert found["sub/tempo.csv"].detail == "neither a sound nor a caption"


def test_a_row_without_the_folder_of_its_file_is_told_the_name_to_write(tmp_path: Path) -> None:
    rows = "file_name,text\nb.wav,slow\nc.wav,fast\nd.wav,loud\n"
    sounds = dict.fromkeys(["a.wav", "set/x/B.wav", "set/x/c.wav", "set/y/c.wav", "d.wav"])
    folder = folder_of(tmp_path, {**sounds, "a.txt": "a", "set/metadata.csv": rows})
    found = fates_of(scan(folder))
    one, of_two, outside = (found[f"set/metadata.csv line {line}"] for line in (2, 3, 4))
    assert {fate.fate for fate in (one, of_two, outside)} == {"no audio"}
    assert one.detail == "names b.wav, which is not there: write x/B.wav, which is there"
    for fate in (of_two, outside):
        assert fate.detail.endswith("which is not there: add the file, or remove the row")


def test_lyrics_are_never_a_caption(tmp_path: Path) -> None:
    folder = folder_of(
        tmp_path,
        {"a.wav": None, "a.caption.txt": "slow", "a.txt": "I walk alone", "a.lyrics.txt": LYRICS,
         "b.wav": None, "b.txt": LYRICS, "c.wav": None, "c.lyrics.txt": "la la", "d.lyrics.wav": None,
         "d.lyrics.txt": "about lyrics", "e.caption.wav": None, "e.caption.txt": "its own", "e.wav": None,
         "f.wav": None, "f.json": json.dumps({"lyrics": "la", "description": LYRICS})},
    )  # fmt: skip
    found = fates_of(scan(folder))
    assert rows_of(scan(folder)) == {
        "a.wav": ("slow", "a.caption.txt"), "d.lyrics.wav": ("about lyrics", "d.lyrics.txt"),
        "e.caption.wav": ("its own", "e.caption.txt"),
    }  # fmt: skip
    assert found["a.txt"].fate == found["a.lyrics.txt"].fate == found["c.lyrics.txt"].fate == "ignored"
    assert "as lyrics" in found["a.txt"].detail and "not trained on" in found["a.lyrics.txt"].detail
    assert {found[name].fate for name in ("b.wav", "f.wav")} == {"caption unreadable"}
    assert "b.txt is lyrics" in found["b.wav"].detail and ".caption.txt" in found["b.wav"].detail
    assert found["c.wav"].fate == found["e.wav"].fate == "no caption"
    for name in ("a.wav", "d.lyrics.wav", "e.caption.wav"):
        assert ("caption from" in found[name].detail) == (name == "a.wav")


def csv_of(text: str, encoding: str = "utf-8") -> bytes:
    return text.encode(encoding)


CSVS = {
    "plain": csv_of("file_name,text\na.wav,slow\nsub/b.wav,\"wide, and\nslow\"\n"),
    "excel": csv_of("sep=;\r\nFile_Name;Caption\r\na.wav;slow\r\nsub\\b.wav;\"wide, and\r\nslow\"\r\n", "utf-8-sig"),
    "tabs in UTF-16": csv_of("file_name\tprompt\na.wav\tslow\nsub/b.wav\twide, and slow\n", "utf-16"),
    "other columns": csv_of("n,description,file_name,x\n1,slow,./a.wav,\n\n2,\"wide, and slow\",sub//B.WAV,y,z\n"),
    "jsonl": b'{"file_name": "a.wav", "text": "slow"}\n\n{"file_names": ["sub/b.wav"], "text": ["wide, and slow"]}\n',
    "ACE-Step": csv_of("File,BPM,Key,Caption\na.wav,90,C,slow\nsub/b.wav,,,\"wide, and slow\"\n"),
}


@pytest.mark.parametrize("kind", [*CSVS, "parquet"])
def test_metadata_of_every_kind_is_read(tmp_path: Path, kind: str) -> None:
    folder = folder_of(tmp_path, {"a.wav": None, "sub/b.wav": None})
    if kind == "parquet":
        table = pa.table({"file_name": ["a.wav", "sub/b.wav"], "n": [1, 2], "caption": ["slow", "wide, and slow"]})
        pq.write_table(table, folder / "metadata.parquet")
    else:
        name = {"jsonl": "metadata.jsonl", "ACE-Step": "my tempos.csv"}.get(kind, "metadata.csv")
        (folder / name).write_bytes(CSVS[kind])
    found = scan(folder)
    assert {path: caption for path, (caption, _) in rows_of(found).items()} == {
        "a.wav": "slow", "sub/b.wav": "wide, and slow",
    }  # fmt: skip
    assert {one.fate for one in found.fates} == {"used"}
    assert all(one.detail.startswith("caption from m") for one in found.fates)


def test_rows_are_looked_for_in_the_nearest_folder_and_their_lines_are_those_of_an_editor(tmp_path: Path) -> None:
    folder = folder_of(
        tmp_path,
        {"x/y/a.wav": None, "x/y/b.wav": None, "x/y/c.wav": None, "x/y/d.wav": None,
         "metadata.csv": "file_name,text\nx/y/a.wav,top\nx/y/b.wav,\"top\ntop\"\nx/y/c.wav,top\n",
         "x/metadata.jsonl": '{"file_name": "y/a.wav", "text": "middle"}\n{"file_name": "y/b.wav", "text": ""}',
         "x/y/metadata.csv": "file_name,text\na.wav,nearest\n"},
    )  # fmt: skip
    found = scan(folder, default="none")
    assert rows_of(found) == {
        "x/y/a.wav": ("nearest", "x/y/metadata.csv line 2"),
        "x/y/b.wav": ("none", "--default_caption"),  # its row says nothing
        "x/y/c.wav": ("top", "metadata.csv line 5"),
        "x/y/d.wav": ("none", "--default_caption"),
    }
    assert "x/y/metadata.csv has no caption for it" in fates_of(found)["x/y/d.wav"].detail
    assert "x/y/metadata.csv has no caption for it" in fates_or_error(folder, "x/y/d.wav")


def test_rows_without_their_file_and_hostile_ones_are_in_the_report(tmp_path: Path) -> None:
    rows = [
        "a.wav,first", "gone.wav,x", "../a.wav,x", "/etc/passwd,x", "C:\\a.wav,x", "a.wav,second", ",x", "notes.md,x",
    ]  # fmt: skip
    folder = folder_of(
        tmp_path, {"a.wav": None, "notes.md": "x", "metadata.csv": "file_name,text\n" + "\n".join(rows)}
    )
    found = fates_of(scan(folder))
    assert {path: one.fate for path, one in found.items()} == {
        "a.wav": "used", "notes.md": "ignored", "metadata.csv line 3": "no audio", "metadata.csv line 4": "ignored",
        "metadata.csv line 5": "ignored", "metadata.csv line 6": "ignored", "metadata.csv line 7": "ignored",
        "metadata.csv line 8": "caption unreadable",
    }  # fmt: skip
    assert "gone.wav" in found["metadata.csv line 3"].detail and "line 2 counts" in found["metadata.csv line 7"].detail
    assert all("leads out" in found[f"metadata.csv line {line}"].detail for line in (4, 5, 6))


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        ("metadata.csv", b"\x81\x8d\x8f\x90\xff\xfe", "is no text"),
        ("metadata.csv", b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n", "git-lfs pointer"),
        ("metadata.jsonl", b"file_name,text\na.wav,x\n", "holds no JSON object"),
        ("metadata.parquet", b"PAR1 but no more", "cannot be read"),
        (".metadata.csv.icloud", b"", "iCloud"),
    ],
)
def test_sounds_of_metadata_that_cannot_be_read_say_so_and_take_no_other_caption(
    tmp_path: Path, name: str, content: bytes, part: str
) -> None:
    folder = folder_of(
        tmp_path,
        {"a.wav": None, "b.wav": None, "b.txt": "plain", "a.json": json.dumps({"caption": "other"}), name: content},
    )
    found = fates_of(scan(folder, default="other"))
    assert found["a.wav"].fate == found[name].fate == "caption unreadable" and found["b.wav"].fate == "used"
    assert part in found["a.wav"].detail and part in found[name].detail and "--captions" in found[name].detail
    mended = scan(folder, sources=("text", "json"))
    assert rows_of(mended)["a.wav"] == ("other", "a.json") and fates_of(mended)[name].fate == "ignored"


def test_a_broken_line_leaves_the_others_good_and_a_table_of_other_things_is_no_metadata(tmp_path: Path) -> None:
    lines = ['{"file_name": "a.wav", "text": "slow"}', '{"file_name": "b.wav", "te', "[1]", "[" * 100_000, "9" * 5_000]
    folder = folder_of(
        tmp_path,
        {"a.wav": None, "c.wav": None, "metadata.jsonl": "\n".join(lines), "metadata.csv": "name,label\nc.wav,loud\n"},
    )
    found = fates_of(scan(folder, default="x"))
    assert found["a.wav"].detail == "caption from metadata.jsonl line 1"
    assert {found[f"metadata.jsonl line {line}"].fate for line in (2, 3, 4, 5)} == {"caption unreadable"}
    assert "no column file_name" in found["metadata.csv"].detail and found["c.wav"].fate == "used"
    (folder / "metadata.jsonl").unlink()
    (folder / "metadata.csv").write_text("file_name,label\nc.wav,loud\na.wav,\n")
    assert "--caption_column" in fates_of(scan(folder, default="x"))["metadata.csv"].detail
    assert rows_of(scan(folder, column="Label", default="x")) == {
        "c.wav": ("loud", "metadata.csv line 2"), "a.wav": ("x", "--default_caption"),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("content", "caption"),
    [
        ({"description": "slow", "caption": "b", "genre": "rock"}, "slow"),
        ({"Prompt": " slow\nrock ", "bpm": 90}, "slow rock"),
        ({"description": "", "caption": None, "text": "slow"}, "slow"),
        ({"tags": ["slow", "rock"], "path": "x"}, "slow, rock"),
        ({"description": ["slow", "loud"]}, "slow"),
        ([{"caption": "slow"}], "slow"),
        ({"caption": "caption: slow\nlyrics:\nla la"}, "slow"),
        ({"sample_rate": 48_000}, None), ([1, 2], None), ("text", None), ({"description": 3, "tags": {"a": 1}}, None),
    ],
)  # fmt: skip
def test_captions_of_json_files_are_told_by_their_keys(tmp_path: Path, content: Any, caption: str | None) -> None:
    folder = folder_of(tmp_path, {"a.wav": None, "a.json": json.dumps(content)})
    found = rows_of(scan(folder, default="other"))["a.wav"]
    assert found == ((caption, "a.json") if caption else ("other", "--default_caption"))


def test_a_json_that_cannot_be_read_is_its_sounds_fate(tmp_path: Path) -> None:
    bad: dict[str, str | bytes] = {
        "cut": '{"description": "slo', "deep": "[" * 100_000, "large": '{"description": "' + "x" * 2**20 + '"}',
        "half": '{"description": "\\ud800"}', "bytes": b"\xff\xfe\x81", "long": json.dumps({"caption": "x" * 2_001}),
        "zero": json.dumps({"caption": "a\0b"}),
    }  # fmt: skip
    files: dict[str, str | bytes | None] = {"good.wav": None, "good.txt": "x"}
    for name, content in bad.items():
        files |= {f"{name}.wav": None, f"{name}.json": content}
    folder = folder_of(tmp_path, files)
    found = fates_of(scan(folder, default="other"))
    assert {name: found[f"{name}.wav"].fate for name in bad} == {
        name: "caption too long" if name == "long" else "caption unreadable" for name in bad
    }
    assert all(f"{name}.json" in found[f"{name}.wav"].detail for name in bad)


def test_several_captions_of_a_json_are_drawn_among_with_caption_lines(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, {"a.wav": None, "a.json": json.dumps({"description": ["slow", "loud\nwide"]})})
    assert rows_of(scan(folder, lines=True))["a.wav"][0] == "slow\nloud\nwide"
    assert "the first of 2" in fates_of(scan(folder))["a.wav"].detail


def test_what_is_merged_is_in_the_table_where_it_is_merged_and_nowhere_else(tmp_path: Path) -> None:
    folder = folder_of(
        tmp_path,
        {"a.wav": None, "a.json": json.dumps({"description": "slow", "bpm": "90"}), "b.wav": None,
         "metadata.csv": "file_name,text,genre\nb.wav,loud,Rock\n", "c.wav": None, "c.txt": "plain",
         "c.json": json.dumps({"bpm": 1}), "d.wav": None, "d.json": json.dumps({"bpm": 80})},
    )  # fmt: skip
    off, on = scan(folder, default="x"), scan(folder, default="x", merge=MergeRates(merge=0.25))
    assert set(off.columns["caption_fields"]) == {""}
    fields = dict(zip(on.columns["path"], on.columns["caption_fields"], strict=True))
    assert fields == {
        "a.wav": '[["bpm", "90.0"]]', "b.wav": '[["genre", "rock"]]', "c.wav": "", "d.wav": '[["bpm", "80.0"]]',
    }  # fmt: skip
    # Fields alone are a caption only where they are merged.
    assert rows_of(off)["d.wav"] == ("x", "--default_caption") and rows_of(on)["d.wav"] == (None, "d.json")


def test_a_template_speaks_only_where_one_of_its_fields_is_there(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, {"Dub/slow river.wav": None, "7.wav": None})
    found = scan(folder, template="{name}, {folder}", default="other")
    assert {path: caption for path, (caption, _) in rows_of(found).items()} == {
        "Dub/slow river.wav": "slow river, Dub", "7.wav": "other",
    }  # fmt: skip
    with pytest.raises(ConfigError, match="nonsense"):
        check_texts("{nonsense}", {})
    with pytest.raises(ConfigError, match="--default_caption"):
        check_texts(None, {"--caption": "fine", "--default_caption": "x" * 2_001})


@pytest.mark.parametrize("settings", [{"instead": "x"}, {"no_label": True}])
def test_no_caption_file_is_opened_where_none_is_used(tmp_path: Path, settings: dict[str, Any]) -> None:
    folder = folder_of(tmp_path, {**ALL, "b.wav": None, "b.txt": LYRICS})
    with counted_opens(folder) as opened:
        found = scan(folder, **settings)
    assert set(opened) <= {"song.wav", "b.wav"} and len(found.columns["path"]) == 2
    assert set(found.columns["caption"]) == {settings.get("instead")}


def test_metadata_is_read_once_and_what_is_not_needed_never(tmp_path: Path) -> None:
    files: dict[str, str | bytes | None] = {f"{number}.wav": None for number in range(20)}
    files["metadata.csv"] = "file_name,text\n" + "".join(f"{number}.wav,of {number}\n" for number in range(20))
    folder = folder_of(tmp_path, files)
    with counted_opens(folder) as opened:
        assert len(rows_of(scan(folder))) == 20
    assert opened["metadata.csv"] == 1
    for number in range(20):
        (folder / f"{number}.txt").write_text(f"text {number}")
        (folder / f"{number}.json").write_text("{}")
    with counted_opens(folder) as opened:
        found = scan(folder)
    assert {name: count for name, count in opened.items() if not name.endswith(".wav")} == {
        f"{number}.txt": 1 for number in range(20)
    }
    assert fates_of(found)["metadata.csv"].detail == "not read: no file here needs a caption from it"


def test_names_of_rows_match_as_captions_do_whatever_the_case_and_the_way_accents_are_stored(tmp_path: Path) -> None:
    folder = folder_of(
        tmp_path,
        {"cafe\u0301.wav": None, "A.wav": None, "a.wav": None,
         "metadata.csv": "file_name,text\nCAF\u00c9.WAV,coffee\na.wav,small\nA.wav,large\n"},
    )  # fmt: skip
    assert {os.path.basename(path): caption for path, (caption, _) in rows_of(scan(folder)).items()} == {
        "cafe\u0301.wav": "coffee", "a.wav": "small", "A.wav": "large",
    }  # fmt: skip
