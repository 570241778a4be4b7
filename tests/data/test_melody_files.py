"""song.melody.wav beside song.wav: the melody of that clip, and no clip of its own."""

from __future__ import annotations

import functools
import hashlib
import itertools
import os
import shutil
from pathlib import Path

import check_dataset
import numpy as np
import pyarrow as pa
import pytest
import soundfile
import torch

from tests.audio_files import noise, write_clip
from tests.data.table_files import AUDIO, write_parquet
from tests.data.test_prepared import make, opened, settings_of
from tests.data.test_shared_scan import RULES, hosts, on_each_rank  # noqa: F401 (a fixture)
from trainer.data import dataset, manifest
from trainer.data.caption_settings import CaptionSettings
from trainer.data.fates import Fate, reasons, summary
from trainer.data.manifest import Manifest
from trainer.data.shared_scan import check_encoded, check_sizes, scan_once
from trainer.errors import ConfigError
from trainer.model.source import open_model


def scan(folder: Path, *, no_label: bool = False, rehash: bool = False) -> Manifest:
    return manifest.look(
        folder, captions=CaptionSettings(no_label=no_label), min_seconds=0.5, show_progress=False, rehash=rehash,
        facts_folder=folder.parent / "facts",
    )


def fates(found: Manifest) -> dict[str, str]:
    assert len({one.path for one in found.fates}) == len(found.fates)
    return {one.path: one.fate for one in found.fates}


def details(found: Manifest) -> dict[str, str]:
    return {one.path: one.detail for one in found.fates}


def melodies(found: Manifest) -> dict[str, str]:
    """By clip, the name of its melody file, relative to the folder."""
    columns = found.columns
    names = [os.path.basename(os.fsdecode(path)) for path in columns["melody_path_bytes"]]
    return dict(zip(columns["path"], names, strict=True))


def content(path: Path) -> str:
    return hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two clips, the first of which has a melody file."""
    folder = tmp_path / "data"
    write_clip(folder / "ballad.wav", "calm piano", seed=1)
    write_clip(folder / "ballad.melody.wav", seed=2)
    write_clip(folder / "other.wav", "fast rock", seed=3)
    return folder


def test_a_melody_file_is_the_melody_of_the_clip_beside_it_and_no_clip(data: Path) -> None:
    found = scan(data)
    assert fates(found) == {"ballad.wav": "used", "ballad.melody.wav": "melody", "other.wav": "used"}
    assert details(found)["ballad.melody.wav"] == "of ballad.wav"
    rows = {row["path"]: row for row in found.clips}
    melody = data / "ballad.melody.wav"
    assert rows["ballad.wav"]["melody_path_bytes"] == os.fsencode(melody)
    assert rows["ballad.wav"]["melody_content"] == content(melody)
    assert rows["ballad.wav"]["melody_size_bytes"] == melody.stat().st_size
    none = (rows["other.wav"][f"melody_{name}"] for name in ("path_bytes", "content", "size_bytes"))
    assert tuple(none) == (b"", "", 0)


@pytest.mark.parametrize(
    ("clip", "melody"),
    [
        ("song.wav", "song.melody.flac"), ("song.flac", "SONG.Melody.wav"), ("v1.2.wav", "v1.2.melody.wav"),
        ("Caf\u00e9.wav", "Cafe\u0301.melody.wav"), ("song.mp3", "song.melody.ogg"),
    ],
)  # fmt: skip
def test_any_format_is_a_melody_and_names_are_compared_as_those_of_captions(
    tmp_path: Path, clip: str, melody: str
) -> None:
    for name, seed in ((clip, 1), (melody, 2)):
        (tmp_path / "data").mkdir(exist_ok=True)
        soundfile.write(tmp_path / "data" / name, noise(1, 32_000, seed=seed), 32_000)
    found = scan(tmp_path / "data", no_label=True)
    assert melodies(found) == {clip: melody} and fates(found)[melody] == "melody"


def test_the_name_that_is_exactly_the_clips_wins_and_no_melody_has_a_melody(tmp_path: Path) -> None:
    names = ("a.wav", "a.melody.wav", "A.melody.wav", "a.melody.melody.wav", "b.melody.wav", "sub/a.melody.wav")
    for seed, name in enumerate(names):
        write_clip(tmp_path / "data" / name, seed=seed)
    found = scan(tmp_path / "data", no_label=True)
    assert fates(found) == {
        "a.wav": "used", "a.melody.wav": "melody", "A.melody.wav": "ignored", "a.melody.melody.wav": "used",
        "b.melody.wav": "used", "sub/a.melody.wav": "used",
    }  # fmt: skip
    assert melodies(found)["a.wav"] == "a.melody.wav"
    said = details(found)
    assert said["A.melody.wav"] == "another melody file fits a.wav better"
    assert "no b.* beside it whose melody it could be" in said["b.melody.wav"]


def test_a_melody_alone_that_lacks_a_caption_is_told_that_its_clip_is_not_there(tmp_path: Path) -> None:
    write_clip(tmp_path / "data/a.wav", "a tune")
    write_clip(tmp_path / "data/b.melody.wav")
    found = scan(tmp_path / "data")
    assert fates(found) == {"a.wav": "used", "b.melody.wav": "no caption"}
    assert "no b.* beside it whose melody it could be" in details(found)["b.melody.wav"]


def test_texts_of_a_melody_file_are_no_captions_and_no_fault(data: Path) -> None:
    before = scan(data).columns["caption"]
    for name in ("ballad.melody.txt", "ballad.melody.caption.txt", "ballad.melody.wav.txt"):
        (data / name).write_text("a hummed tune")
    found = scan(data)
    assert found.columns["caption"] == before
    for name in ("ballad.melody.txt", "ballad.melody.caption.txt", "ballad.melody.wav.txt"):
        assert fates(found)[name] == "ignored" and "of ballad.wav" in details(found)[name]


def damaged(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:8_000])


def silent(path: Path) -> None:
    soundfile.write(path, np.zeros(8_000), 8_000)


def broken_link(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere.wav")


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


FAULTS = {damaged: "truncated", silent: "silent", broken_link: "unreadable", pipe: "not a file"}


@pytest.mark.parametrize("spoil", FAULTS, ids=lambda spoil: spoil.__name__)
def test_a_clip_whose_melody_file_is_bad_is_left_out_and_both_fates_say_why(data: Path, spoil) -> None:
    spoil(data / "ballad.melody.wav")
    found = scan(data)
    assert found.columns["path"] == ["other.wav"]
    assert fates(found) == {
        "ballad.wav": "melody unusable", "ballad.melody.wav": FAULTS[spoil], "other.wav": "used"
    }
    assert details(found)["ballad.wav"].startswith(f"its melody ballad.melody.wav is {FAULTS[spoil]}: ")


def test_a_melody_that_a_sync_tool_keeps_elsewhere_is_not_replaced_by_the_clips_own_sound(data: Path) -> None:
    (data / "ballad.melody.wav").rename(data / ".ballad.melody.wav.icloud")
    found = scan(data)
    assert fates(found)["ballad.wav"] == "melody unusable" and "iCloud" in details(found)["ballad.wav"]


def test_a_melody_that_ends_before_its_clip_is_remarked_on(data: Path) -> None:
    write_clip(data / "ballad.melody.wav", seconds=0.25, seed=2)
    found = scan(data)
    assert fates(found)["ballad.wav"] == "used"
    assert details(found)["ballad.wav"] == "its melody ballad.melody.wav ends after 0.25 of its 1.00 s"


def test_the_same_sound_with_two_melodies_is_two_clips_and_with_equal_ones_is_one(tmp_path: Path) -> None:
    for no_label, name in itertools.product((False, True), "abc"):
        write_clip(tmp_path / f"data{no_label}" / f"{name}.wav", "calm", seed=1)
        write_clip(tmp_path / f"data{no_label}" / f"{name}.melody.wav", seed=3 if name == "b" else 2)
    for no_label in (False, True):
        found = scan(tmp_path / f"data{no_label}", no_label=no_label)
        used = {path: fate for path, fate in fates(found).items() if fate != "melody"}
        assert used == {"a.wav": "used", "b.wav": "used", "c.wav": "duplicate"}
        assert found.columns["melody_content"] == sorted(found.columns["melody_content"])


def test_order_does_not_depend_on_names(tmp_path: Path) -> None:
    orders = []
    for names in ("ab", "ba"):
        folder = tmp_path / names / "data"
        for name, seed in zip(names, (2, 3), strict=True):
            write_clip(folder / f"{name}.wav", "calm", seed=1)
            write_clip(folder / f"{name}.melody.wav", seed=seed)
        orders.append(scan(folder).columns["melody_content"])
    assert orders[0] == orders[1] and len(set(orders[0])) == 2


def test_rehash_reads_a_melody_anew(data: Path) -> None:
    before = scan(data).columns["melody_content"]
    melody = data / "ballad.melody.wav"
    status = melody.stat()
    write_clip(melody, seed=9)
    os.utime(melody, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert scan(data).columns["melody_content"] == before
    assert scan(data, rehash=True).columns["melody_content"] == [content(melody) if one else "" for one in before]


def test_a_row_of_a_table_that_names_a_file_has_the_melody_beside_that(data: Path) -> None:
    (data / "ballad.txt").unlink()
    audio = pa.array([{"bytes": None, "path": "ballad.wav"}], AUDIO)
    write_parquet(data / "x.parquet", pa.table({"audio": audio, "text": ["from the table"]}))
    found = scan(data)
    (row,) = [name for name in melodies(found) if name != "other.wav"]
    assert melodies(found) == {row: "ballad.melody.wav", "other.wav": ""}
    assert fates(found)["ballad.melody.wav"] == "melody" and found.columns["caption"].count("from the table") == 1


@pytest.mark.usefixtures("hosts")
def test_melodies_lead_to_the_files_of_each_machine_and_others_are_refused(data: Path, tmp_path: Path) -> None:
    shutil.copytree(data, tmp_path / "1" / "data")
    folders = [data, tmp_path / "1" / "data"]
    tables = tmp_path / "cache/scan"

    def look(rank, peers):
        return scan_once(folders[rank], peers, tables, **RULES)

    first, second = on_each_rank(look, 2)
    row = first.columns["path"].index("ballad.wav")
    own = os.fsencode(folders[1] / "ballad.melody.wav")
    assert second.columns["melody_path_bytes"][row] == own and second.columns["melody_path_bytes"][1 - row] == b""
    write_clip(folders[1] / "ballad.melody.wav", seed=2, seconds=2)

    def check(rank, peers):
        check_sizes((first, second)[rank], [row], peers, of_melodies=True)

    def encoded(rank, peers):
        faults = [(), [(row, "truncated", "its melody is truncated")]]
        check_encoded((first, second)[rank], faults, peers, of_melodies=True)

    said = {check: "the melody of ballad.wav on host-1: has", encoded: "ballad.wav on host-1: its melody is truncated"}
    for function, words in said.items():
        found = on_each_rank(function, 2)
        assert any(isinstance(one, ConfigError) and words in str(one) for one in found)
    assert on_each_rank(lambda rank, peers: check_sizes((first, second)[rank], [row], peers), 2) == [None, None]


def test_the_digest_holds_melodies_where_there_are_any_and_is_what_it_was_where_there_are_none() -> None:
    columns = {"content": ["a", "b"], "caption": ["x", None], "caption_fields": ["", ""]}
    # As every version since the first has it.
    before = hashlib.blake2b(repr([("a", "x"), ("b", "")]).encode(), digest_size=16).hexdigest()
    assert dataset._digest({**columns, "melody_content": ["", ""]}) == before
    others = [dataset._digest({**columns, "melody_content": found}) for found in (["m", ""], ["", "m"], ["n", ""])]
    assert len({before, *others}) == 4


def test_summaries_count_melodies_and_call_none_of_them_left_out() -> None:
    found = [Fate(path="a.wav", fate="used"), Fate(path="a.melody.wav", fate="melody", detail="of a.wav")]
    assert summary(found).splitlines() == ["        1  used", "        1  melody"]
    assert reasons(found) == ""


def test_check_dataset_counts_melodies_on_console_and_page(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "report"
    given = [str(data), "--report", str(report), "--cache_dir", str(tmp_path / "cache"), "--strict"]
    assert check_dataset.main(given) == 0
    assert "2 clips, 2.0 s; 1 of them with a melody file" in capsys.readouterr().out
    page = (report / "dataset.html").read_text()
    assert 'data-figure="melodies" value="1"' in page and "of ballad.wav" in page
    assert "ballad.melody.wav,melody,of ballad.wav" in (report / "dataset.csv").read_text()


@functools.cache
def source():
    return open_model("debug")


def test_a_prepared_folder_keeps_melodies_and_is_what_it_was_without_any(data: Path, tmp_path: Path) -> None:
    write_clip(data / "again.wav", "calm piano", seed=1)
    write_clip(data / "again.melody.wav", seed=4)
    make(data, tmp_path / "prepared")
    cache_dir = tmp_path / "cache"
    of_sounds, of_prepared = opened(data, cache_dir), opened(tmp_path / "prepared", cache_dir)
    assert of_prepared.digest == of_sounds.digest
    assert of_prepared.table["melody_content"] == of_sounds.table["melody_content"]
    assert of_prepared.table["melody_path_bytes"] == [b""] * 3 and of_prepared.table["path_bytes"] == [b""] * 3
    for name in ("ballad.melody.wav", "again.melody.wav", "again.wav", "again.txt"):
        (data / name).unlink()
    from pyarrow import parquet

    make(data, tmp_path / "plain")
    assert "melody_content" not in parquet.ParquetFile(tmp_path / "plain/clips.parquet").schema_arrow.names
    plain = dataset.prepare(settings_of(tmp_path / "plain", cache_dir), source(), torch.device("cpu"))
    assert plain.table["melody_content"] == ["", ""]
