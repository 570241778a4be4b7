"""Captions out of files of any content: a caption, or a fate; never an exception, and never a good file lost."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.data.caption_settings import CaptionSettings
from trainer.data.caption_sources import Caption, CaptionReader
from trainer.data.fates import FATE_KINDS
from trainer.data.folder_walk import MetadataFile, Sound, walk
from trainer.data.music_fields import MergeRates, of_text
from trainer.spec.caption_sources import SOURCES

NAMES = ["a.wav", "sub/b.wav", "B.WAV", "caf\u00e9.wav", "x\\y.wav", "\udcff.wav", "good.wav"]
NOTES = ["file_name", "file", "text", "caption", "prompt", "description", "bpm", "lyrics:", "[Verse]\n[Chorus]\n"]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6) | st.sampled_from(NAMES[:5] + NOTES),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from(NOTES) | st.text(max_size=3), inner, max_size=4),
    max_leaves=8,
)
PIECES = st.sampled_from([
    *NAMES[:5], *NOTES, "\n", "\r", ",", ";", "\t", '"', '""', "\0", "\ufeff", "..", "/", "sep=;\n",
])  # fmt: skip
TEXTS = st.lists(PIECES | st.text(max_size=4), max_size=25).map(lambda parts: "".join(parts).encode("utf-8", "replace"))
HEADED = TEXTS.map(lambda rest: b"file_name,text\ngood.wav,no\n" + rest)
LINES = st.lists(JSON.map(lambda value: json.dumps(value).encode()) | TEXTS, max_size=5).map(b"\n".join)
CONTENT = st.binary(max_size=40) | TEXTS | HEADED | LINES
FILES = st.dictionaries(
    st.sampled_from([
        "metadata.csv", "metadata.jsonl", "metadata.parquet", "sub/metadata.csv", "METADATA.CSV", "t.csv", "a.json",
        "sub/b.json", "a.txt", "a.caption.txt", "a.lyrics.txt", "caf\u00e9.json", "b.wav.json", ".metadata.csv.icloud",
    ]),
    CONTENT,
    max_size=6,
)  # fmt: skip
CAPTIONS = st.builds(
    CaptionSettings,
    sources=st.permutations(SOURCES).map(tuple),
    column=st.none() | st.sampled_from(["text", "bpm", "none"]),
    template=st.none() | st.just("{name} in {folder}"),
    default=st.none() | st.just("default"),
    lines=st.booleans(),
    merge=st.builds(MergeRates, merge=st.sampled_from([0.0, 0.5])),
)


def any_folder(files: dict[str, bytes], captions: CaptionSettings) -> None:
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        (root / "sub").mkdir()
        for name in NAMES:
            (root / name).write_bytes(b"")
        (root / "good.txt").write_text("good")
        for name, content in files.items():
            (root / name).write_bytes(content)
        found = list(walk(place))
        sounds = [item for item in found if isinstance(item, Sound)]
        assert sorted(sound.name for sound in sounds) == sorted(NAMES)
        reader = CaptionReader(place, found, captions)
        outcomes = {sound.name: reader.caption_of(sound) for sound in sounds}
        for outcome in outcomes.values():
            if isinstance(outcome, Caption):
                assert outcome.text is None or outcome.text.encode()
                of_text(outcome.fields)
            assert (outcome.remark if isinstance(outcome, Caption) else outcome.detail).isprintable()
        if captions.sources[0] == "text":
            good = outcomes["good.wav"]
            assert isinstance(good, Caption) and (good.text, good.remark) == ("good", "")
        for fate in reader.fates():
            assert fate.fate in FATE_KINDS and fate.path.isprintable() and fate.detail.isprintable()
        told = {fate.path.split(" ")[0] for fate in reader.fates()}
        used = {os.path.basename(one.source.split(" ")[0]) for one in outcomes.values() if isinstance(one, Caption)}
        for item in found:
            if isinstance(item, MetadataFile) and item.name not in told:
                assert item.is_metadata or os.path.basename(item.name) in used or b"file" in files[item.name].lower()


@settings(max_examples=120, derandomize=True, deadline=None)
@given(FILES, CAPTIONS)
def test_folders_of_any_metadata_json_and_text(files: dict[str, bytes], captions: CaptionSettings) -> None:
    any_folder(files, captions)


@pytest.mark.full
@settings(max_examples=5_000, deadline=None)
@given(FILES, CAPTIONS)
def test_very_many_folders_of_any_metadata_json_and_text(files: dict[str, bytes], captions: CaptionSettings) -> None:
    any_folder(files, captions)


@pytest.mark.parametrize(
    "columns",
    [
        {"file_name": [b"a.wav"], "text": ["x"]}, {"file_name": [1], "text": ["x"]},
        {"file_name": [None], "text": ["x"]},
        {"file_name": [["a.wav", "sub/b.wav"]], "text": [["x", "y"]]}, {"file_name": [{"a": 1}], "text": ["x"]},
        {"file_name": ["a.wav"], "text": [{"a": 1}]}, {"file_name": ["a.wav"], "text": [7]},
        {"file_name": ["a.wav"], "text": ["x"], "bpm": [float("nan")], "genre": [["x", None]]},
        {"file_name": ["a\0.wav"], "text": ["x"]}, {"file_name": ["a" * 5_000], "text": ["x"]},
        {"audio": [{"bytes": b"x", "path": "a.wav"}], "text": ["x"]},
    ],
)  # fmt: skip
def test_parquet_of_any_types(columns: dict[str, Any]) -> None:
    memory = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), memory)
    any_folder({"metadata.parquet": memory.getvalue().to_pybytes()}, CaptionSettings(merge=MergeRates(merge=0.5)))
    cut = memory.getvalue().to_pybytes()
    for at in range(0, len(cut), 97):
        any_folder({"metadata.parquet": cut[:at] + b"\xff" * 8 + cut[at + 8 :]}, CaptionSettings())
