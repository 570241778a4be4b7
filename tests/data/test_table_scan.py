"""Parquet and Arrow files as data sets: their rows are the clips that the same files beside each other would be."""

from __future__ import annotations

import json
import os
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import soundfile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.audio_files import noise
from tests.data.table_files import AUDIO, rows_of, sound_bytes, write_parquet
from tests.data.test_tags import id3, text_frame
from tests.opens import counted_opens
from trainer.data import manifest, places, table_file
from trainer.data.audio_fault import AudioFault
from trainer.data.caption_settings import CaptionSettings
from trainer.data.manifest import Manifest
from trainer.data.music_fields import MergeRates
from trainer.data.table_scan import TableSettings
from trainer.errors import ConfigError, DataError


def scan(folder: Path, cache: Path | None = None, **how: Any) -> Manifest:
    flags = {"min_seconds": 0.1, "show_progress": False}
    merge = MergeRates(merge=how.pop("merge", 0.0))
    captions = CaptionSettings(no_label=how.pop("no_label", False), column=how.get("caption_column"), merge=merge)
    tables = TableSettings(**{name: how.pop(name) for name in list(how) if name in TableSettings.__dataclass_fields__})
    cache = cache or folder.parent / "facts"
    everything = flags | how
    return manifest.scan(folder, facts_folder=cache, tables=tables, captions=captions, **everything)  # type: ignore


def fates(found: Manifest) -> dict[str, str]:
    return {fate.path: fate.fate for fate in found.fates}


def as_files(folder: Path, seeds: range) -> Path:
    folder.mkdir()
    for seed in seeds:
        (folder / f"{seed}.wav").write_bytes(sound_bytes(seed))
        (folder / f"{seed}.txt").write_text(f"caption {seed}")
    return folder


def test_rows_are_the_clips_that_the_same_files_in_a_folder_are(tmp_path: Path) -> None:
    files = scan(as_files(tmp_path / "files", range(7)))
    write_parquet(tmp_path / "tables/data/train-00000-of-00002.parquet", rows_of(range(4)))
    write_parquet(tmp_path / "tables/data/train-00001-of-00002.parquet", rows_of(range(4, 7)))
    rows = scan(tmp_path / "tables")
    for column in ("path", "caption", "seconds", "sample_rate_hz", "channels", "content"):
        assert rows.columns[column] == files.columns[column]
    assert fates(rows) == {f"{seed}.wav": "used" for seed in range(7)}
    for reference, seed in zip(rows.columns["path_bytes"], rows.columns["path"], strict=True):
        assert places.sound_at(reference) == sound_bytes(int(seed.removesuffix(".wav")))


def test_what_datasets_writes_is_read(tmp_path: Path) -> None:
    from datasets import Audio, Dataset, DatasetDict, Features, Value

    features = Features({"audio": {"bytes": Value("binary"), "path": Value("string")}, "caption": Value("string")})
    audio = [{"bytes": sound_bytes(seed), "path": f"{seed}.wav"} for seed in range(5)]
    texts = [f"caption {seed}" for seed in range(5)]
    made = Dataset.from_dict({"audio": audio, "caption": texts}, features).cast_column("audio", Audio(decode=False))
    expected = scan(as_files(tmp_path / "files", range(5))).columns
    (tmp_path / "parquet").mkdir()
    made.to_parquet(tmp_path / "parquet/x.parquet")
    made.save_to_disk(tmp_path / "saved", num_shards=2)
    DatasetDict({"train": made, "odd": made.select([0])}).save_to_disk(tmp_path / "both")
    for name in ("parquet", "parquet/x.parquet", "saved", "both"):
        found = scan(tmp_path / name).columns
        assert (found["content"], found["caption"]) == (expected["content"], expected["caption"]), name
    assert len(scan(tmp_path / "both", split="odd").columns["content"]) == 1
    with pytest.raises(ConfigError, match="no such split; it has odd, train"):
        scan(tmp_path / "both", split="test")


def test_rows_have_the_fates_that_files_have(tmp_path: Path) -> None:
    audio: list[Any] = [{"bytes": sound_bytes(seed), "path": None} for seed in range(4)]
    audio[2]["bytes"] = audio[2]["bytes"][:1000]
    audio += [{"bytes": None, "path": "gone.wav"}, None, {"bytes": b"", "path": "empty.wav"},
              {"bytes": sound_bytes(0), "path": "again.wav"}]  # fmt: skip
    texts = ["a", None, "c", "x" * 3000, "e", "f", "g", "a"]
    write_parquet(tmp_path / "data/x.parquet", pa.table({"audio": pa.array(audio, AUDIO), "text": texts}))
    (tmp_path / "data/cut.parquet").write_bytes((tmp_path / "data/x.parquet").read_bytes()[:-50])
    found = scan(tmp_path / "data")
    assert fates(found) == {
        "x.parquet row 0": "duplicate", "x.parquet row 1": "no caption", "x.parquet row 2": "truncated",
        "x.parquet row 3": "caption too long", "gone.wav": "unreadable", "x.parquet row 5": "unreadable",
        "empty.wav": "unreadable", "again.wav": "used", "cut.parquet": "unreadable",
    }  # fmt: skip
    details = {fate.path: fate.detail for fate in found.fates}
    assert "'gone.wav' that it names is not beside the table" in details["gone.wav"]
    assert "damaged or cut off" in details["cut.parquet"]
    assert fates(scan(tmp_path / "data", no_label=True))["x.parquet row 1"] == "used"


def test_rows_that_name_files_are_these_files(tmp_path: Path) -> None:
    folder = as_files(tmp_path / "data", range(3))
    expected = scan(folder).columns
    for text in folder.glob("*.txt"):
        text.unlink()
    audio = pa.array([{"bytes": None, "path": f"{seed}.wav"} for seed in range(3)], AUDIO)
    texts = [f"caption {seed}" for seed in range(3)]
    write_parquet(folder / "t/a.parquet", pa.table({"audio": audio, "text": texts}))
    found = scan(folder).columns
    for column in ("path_bytes", "caption", "content", "size_bytes"):
        assert found[column] == expected[column]
    (folder / "t/a.parquet").unlink()
    write_parquet(folder / "t/b.parquet", pa.table({"where": [f"{seed}.wav" for seed in range(3)], "text": texts}))
    assert scan(folder, audio_column="where").columns["path_bytes"] == expected["path_bytes"]


@pytest.mark.parametrize("form", ["parquet", "arrow"])
def test_what_columns_say_of_the_music_is_merged_as_what_json_files_say_of_it(tmp_path: Path, form: str) -> None:
    said: list[dict[str, Any]] = [
        {"text": "slow", "BPM": 90, "genre": "Rock", "moods": ["calm", "dark"]},
        {"text": None, "BPM": 120, "genre": None, "moods": None},
        {"text": "plain", "BPM": None, "genre": "None", "moods": []},
        {"text": None, "BPM": None, "genre": None, "moods": None},
    ]
    folder = as_files(tmp_path / "files", range(len(said)))
    for seed, values in enumerate(said):
        (folder / f"{seed}.txt").unlink()
        (folder / f"{seed}.json").write_text(json.dumps(values))
    rows = [{"audio": {"bytes": sound_bytes(seed), "path": f"{seed}.wav"}} | said[seed] for seed in range(len(said))]
    kinds = {"audio": AUDIO, "text": pa.string(), "BPM": pa.int64(), "genre": pa.string(),
             "moods": pa.list_(pa.string())}  # fmt: skip
    table = pa.Table.from_pylist(rows, pa.schema({**kinds, "key": pa.timestamp("ns")}))
    path = write_parquet(tmp_path / "rows/x.parquet", table)
    if form == "arrow":
        path.unlink()
        with pa.OSFile(str(path.with_suffix(".arrow")), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(table, max_chunksize=3)
    files, found = scan(folder, merge=0.25), scan(tmp_path / "rows", merge=0.25)
    for column in ("path", "content", "caption", "caption_fields"):
        assert found.columns[column] == files.columns[column]
    by_path = dict(zip(found.columns["path"], found.columns["caption_fields"], strict=True))
    assert {path: bool(fields) for path, fields in by_path.items()} == {"0.wav": True, "1.wav": True, "2.wav": False}
    assert fates(found)["3.wav"] == "no caption"
    plain = scan(tmp_path / "rows").columns  # without --merge_metadata nothing of it counts
    assert set(plain["caption"]) == {"slow", "plain"} and set(plain["caption_fields"]) == {""}


def test_a_table_without_sounds_names_its_columns_and_a_wrong_column_is_refused(tmp_path: Path) -> None:
    write_parquet(tmp_path / "d/x.parquet", pa.table({"a": [1], "b": ["text"]}))
    with pytest.raises(DataError, match=r"its columns: a, b\): name one with --audio_column"):
        scan(tmp_path / "d")
    with pytest.raises(ConfigError, match=r"--audio_column c: x.parquet has no such column; it has a, b"):
        scan(tmp_path / "d", audio_column="c")
    with pytest.raises(ConfigError, match=r"--audio_column a: in x.parquet it is of type int64"):
        scan(tmp_path / "d", audio_column="a")
    two = rows_of(range(2), other=[{"bytes": b"", "path": ""}] * 2, tags=[["x"], ["y"]])
    write_parquet(tmp_path / "e/x.parquet", two)
    with pytest.raises(ConfigError, match="several columns of sounds: name one with --audio_column: audio, other"):
        scan(tmp_path / "e")
    with pytest.raises(ConfigError, match=r"--caption_column tags: .* type list<.*, and captions are texts"):
        scan(tmp_path / "e", audio_column="audio", caption_column="tags")
    with pytest.raises(ConfigError, match=r"--caption_column no: x.parquet has no such column"):
        scan(tmp_path / "e", audio_column="audio", caption_column="no")
    as_files(tmp_path / "f", range(1))
    for flags in ({"audio_column": "x"}, {"split": "test"}, {"config": "x"}):
        with pytest.raises(ConfigError, match="no effect"):
            scan(tmp_path / "f", **flags)


def test_the_column_that_is_named_is_used(tmp_path: Path) -> None:
    table = rows_of(range(2), mood=["calm", "wild"]).append_column("raw", pa.array([sound_bytes(8), sound_bytes(9)]))
    write_parquet(tmp_path / "d/x.parquet", table)
    found = scan(tmp_path / "d", audio_column="raw", caption_column="mood").columns
    assert {places.sound_at(reference) for reference in found["path_bytes"]} == {sound_bytes(8), sound_bytes(9)}
    assert set(found["caption"]) == {"calm", "wild"}


def test_a_second_scan_reads_no_sound_and_a_changed_table_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_parquet(tmp_path / "d/x.parquet", rows_of(range(9)))
    first = scan(path.parent)
    read: Counter[int] = Counter()
    column = table_file._Parquet.column

    def counted(self: Any, group: int, name: str) -> Any:
        read[group] += 1
        return column(self, group, name)

    monkeypatch.setattr(table_file._Parquet, "column", counted)
    with counted_opens(path.parent) as opens:
        assert scan(path.parent).columns == first.columns
    assert not read and opens["x.parquet"] <= 3
    scan(path.parent, rehash=True)
    # Each row group once, by four threads; once more for one that falls behind the two groups that are kept.
    assert set(read) == {0, 1, 2} and read.total() < 9
    write_parquet(path, rows_of(range(20, 29)))
    assert set(scan(path.parent).columns["content"]).isdisjoint(first.columns["content"])


def test_rows_are_read_by_group_and_forgotten(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "x.parquet", rows_of(range(30)))
    order = np.random.default_rng(0).permutation(30)
    for row in order:
        assert places.sound_at(places.row_reference(str(path), int(row), "audio")) == sound_bytes(int(row))
        assert len(places._GROUPS) <= places.GROUPS_KEPT
    assert max(len(group) for group in places._GROUPS.values()) == 3
    places.forget_tables()
    assert not places._GROUPS
    with pytest.raises(AudioFault, match=r"row 30 of x.parquet cannot be read"):
        places.sound_at(places.row_reference(str(path), 30, "audio"))
    path.unlink()
    with pytest.raises(AudioFault, match="cannot be opened or read"):
        places.sound_at(places.row_reference(str(path), 0, "audio"))


def test_threads_that_want_rows_of_a_group_decode_it_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_parquet(tmp_path / "x.parquet", rows_of(range(8)), group_rows=8)
    calls = []
    column = table_file._Parquet.column
    monkeypatch.setattr(table_file._Parquet, "column", lambda *given: (calls.append(1), column(*given))[1])
    found: dict[int, Any] = {}

    def read(row: int) -> None:
        found[row] = places.sound_at(places.row_reference(str(path), row, "audio"))

    threads = [threading.Thread(target=read, args=(row,)) for row in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {row: sound_bytes(row) for row in range(8)} and len(calls) == 1


def test_same_paths_in_two_tables_get_names_of_their_own(tmp_path: Path) -> None:
    write_parquet(tmp_path / "d/a.parquet", rows_of([1, 2]))
    write_parquet(tmp_path / "d/b.parquet", rows_of([2, 3]))
    assert fates(scan(tmp_path / "d")) == {
        "1.wav": "used", "3.wav": "used", "a.parquet row 1": "used", "b.parquet row 0": "duplicate",
    }  # fmt: skip


@pytest.mark.full
def test_20_000_rows_are_inspected_in_flat_memory(tmp_path: Path) -> None:
    sound = [sound_bytes(seed, seconds=6.0) for seed in range(50)]  # 96 kB each, 1.9 GB in all
    (tmp_path / "d").mkdir()
    schema = pa.schema([("audio", AUDIO), ("text", pa.string())])
    peaks = []
    for count in (2_000, 20_000):
        path = tmp_path / "d/x.parquet"
        with parquet.ParquetWriter(path, schema, compression="none", use_dictionary=False) as writer:
            for start in range(0, count, 100):
                audio = [{"bytes": sound[row % 50], "path": f"{row}.wav"} for row in range(start, start + 100)]
                texts = [f"text {row}" for row in range(start, start + 100)]
                writer.write_table(pa.table({"audio": pa.array(audio, AUDIO), "text": texts}, schema))
        before = pa.default_memory_pool().max_memory()
        scan(path.parent, tmp_path / str(count))
        peaks.append(pa.default_memory_pool().max_memory() - before)
    assert peaks[1] < 50 << 20, peaks


VALUES = st.one_of(st.none(), st.binary(max_size=40), st.just(sound_bytes(1, 0.2)), st.text(max_size=20))
CELLS = {
    "struct": (AUDIO, lambda value: {"bytes": value if isinstance(value, bytes) else None,
                                     "path": value if isinstance(value, str) else None}),
    "bytes": (pa.binary(), lambda value: value if isinstance(value, bytes) else None),
    "text": (pa.string(), lambda value: value if isinstance(value, str) else None),
    "list": (pa.list_(pa.string()), lambda value: [value] if isinstance(value, str) else None),
    "number": (pa.int32(), lambda value: 3),
    "map": (pa.struct([("bytes", pa.list_(pa.int8())), ("path", pa.int8())]), lambda value: None),
}  # fmt: skip
NAMES = st.sampled_from(["genre", "bpm", "audio", "text", "caption", "x.y", "", "audio.bytes", "a\nb", "ü"])


def odd_tables(given_data: Any, folder: Path) -> None:
    """Any table is read, refused in words, or has a fate; a good table beside it is read."""
    names = given_data.draw(st.lists(NAMES, max_size=4, unique=given_data.draw(st.booleans())))
    rows = given_data.draw(st.integers(0, 3))
    columns = []
    for _ in names:
        kind, cell = CELLS[given_data.draw(st.sampled_from(sorted(CELLS)))]
        values = given_data.draw(st.lists(VALUES, min_size=rows, max_size=rows))
        columns.append(pa.array([None if value is None else cell(value) for value in values], kind))
    suffix = given_data.draw(st.sampled_from([".parquet", ".arrow"]))
    path = folder / f"odd{suffix}"
    table = pa.Table.from_arrays(columns, names=names)
    if suffix == ".parquet":
        parquet.write_table(table, path)
    else:
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(table)
    content = bytearray(path.read_bytes())
    for _ in range(given_data.draw(st.integers(0, 3))):
        content[given_data.draw(st.integers(0, len(content) - 1))] = given_data.draw(st.integers(0, 255))
    if given_data.draw(st.booleans()):
        content = content[: given_data.draw(st.integers(0, len(content)))]
    path.write_bytes(content)
    try:
        found = scan(folder, folder.parent / "facts", rehash=True, merge=given_data.draw(st.sampled_from([0.0, 0.5])))
    except ConfigError as error:
        assert "odd" in str(error)
    else:
        assert fates(found)["good.wav"] == "used"
    path.unlink()


def good_folder(tmp_path: Path) -> Path:
    (tmp_path / "d").mkdir(exist_ok=True)
    soundfile.write(tmp_path / "d/good.wav", noise(0.5), 8_000)
    (tmp_path / "d/good.txt").write_text("good")
    return tmp_path / "d"


QUIETLY = (HealthCheck.function_scoped_fixture, HealthCheck.too_slow)


@settings(max_examples=40, derandomize=True, deadline=None, suppress_health_check=QUIETLY)
@given(st.data())
def test_odd_tables_end_nothing(tmp_path: Path, given_data: Any) -> None:
    odd_tables(given_data, good_folder(tmp_path))


@pytest.mark.full
@pytest.mark.timeout(600)
@settings(max_examples=1_500, deadline=None, suppress_health_check=QUIETLY)
@given(st.data())
def test_many_odd_tables_end_nothing(tmp_path: Path, given_data: Any) -> None:
    odd_tables(given_data, good_folder(tmp_path))


def test_rows_have_captions_of_the_sources_that_are_asked(tmp_path: Path) -> None:
    tagged = id3(text_frame(b"TCON", "Dub")) + sound_bytes(0, form="MP3")
    audio = [{"bytes": tagged, "path": "Slow/01 river.mp3"}, {"bytes": sound_bytes(1), "path": None},
             {"bytes": sound_bytes(2), "path": "lyrics.wav"}]  # fmt: skip
    texts = [None, "its own", "[Verse]\nla la la\n[Chorus]\nla la la"]
    write_parquet(tmp_path / "d/x.parquet", pa.table({"audio": pa.array(audio, AUDIO), "text": texts}))

    def captions(**how: Any) -> dict[str, tuple[str | None, str]]:
        found = manifest.scan(
            tmp_path / "d", min_seconds=0.1, facts_folder=tmp_path, show_progress=False, captions=CaptionSettings(**how)
        )
        columns = (found.columns[name] for name in ("path", "caption", "caption_source"))
        return {path: (caption, source) for path, caption, source in zip(*columns, strict=True)}

    assert captions() == {"x.parquet row 1": ("its own", "x.parquet row 1")}  # lyrics are never trained on
    assert captions(template="{genre}, {name}", default="music") == {
        "Slow/01 river.mp3": ("Dub, river", "--caption_template"), "x.parquet row 1": ("its own", "x.parquet row 1"),
    }  # fmt: skip
    assert captions(sources=("text",), default="music") == dict.fromkeys(
        ("Slow/01 river.mp3", "x.parquet row 1", "lyrics.wav"), ("music", "--default_caption")
    )
    assert set(captions(instead="one for all").values()) == {("one for all", "--caption")}


def test_metadata_parquet_is_captions_of_files_and_no_table(tmp_path: Path) -> None:
    folder = as_files(tmp_path / "d", range(2))
    for text in folder.glob("*.txt"):
        text.unlink()
    table = pa.table({"file_name": ["0.wav", "1.wav"], "text": ["zero", "one"]})
    write_parquet(folder / "metadata.parquet", table)
    found = scan(folder)
    assert fates(found) == {"0.wav": "used", "1.wav": "used"}
    assert sorted(found.columns["caption_source"]) == ["metadata.parquet row 0", "metadata.parquet row 1"]


def test_a_sound_file_that_a_row_names_is_one_clip(tmp_path: Path) -> None:
    folder = as_files(tmp_path / "d", range(1))
    (folder / "0.txt").unlink()
    audio = pa.array([{"bytes": None, "path": "0.wav"}], AUDIO)
    write_parquet(folder / "x.parquet", pa.table({"audio": audio, "text": ["from the row"]}))
    plain = CaptionSettings(default="for all others")
    found = manifest.scan(folder, min_seconds=0.1, facts_folder=tmp_path, show_progress=False, captions=plain)
    assert found.columns["caption"] == ["from the row"] and len(found.fates) == 1


def test_a_row_group_is_opened_once_for_several_rows_by_position(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "d/x.parquet", rows_of(range(6)))
    references = [places.row_reference(str(path), row, "audio") for row in (5, 0, 3)]
    assert sorted([os.fsencode("/a.wav"), *references], key=places.reading_order) == [
        b"/a.wav", *(references[at] for at in (1, 2, 0))
    ]  # fmt: skip
