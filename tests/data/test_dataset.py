"""Which clips a run gets from its folders, and what it says about the others."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import soundfile
import torch
from torch import nn

from tests.audio_files import pcm16, wav_header, write_clip
from tests.data.table_files import AUDIO, write_parquet
from tests.living import left_behind
from tests.runs import launch_here
from trainer.data import audio, audio_facts, dataset, places, sound_file
from trainer.data.wav_header import Sound
from trainer.errors import DataError
from trainer.flags.config import Config
from trainer.model.source import Source, load_codec, open_model
from trainer.wiring import data_settings

ONE_STEP = ("--max_steps", "1", "--segment_seconds", "1")


def fates(folder: Path) -> dict[str, str]:
    with open(folder / "models/dataset.csv", newline="", encoding="utf-8") as file:
        return {row["path"]: row["fate"] for row in csv.DictReader(file)}


def prepare(folder: Path, *, source: Source | None = None, **flags) -> dataset.Dataset:
    flags = {"code_views": 2} | flags
    config = Config(dataset_path=str(folder / "data"), cache_dir=str(folder / "cache"), **flags)
    return dataset.prepare(data_settings(config), source or open_model("debug"), torch.device("cpu"))


def test_a_clip_without_a_whole_frame_in_every_view_is_too_short_and_not_trained_on(tmp_path):
    for name, samples in [("none", 600), ("one_view", 700), ("both", 960), ("more", 32_000)]:
        (tmp_path / "data").mkdir(exist_ok=True)
        sound = 0.1 * np.random.default_rng(samples).standard_normal(samples)
        soundfile.write(tmp_path / "data" / f"{name}.wav", sound, 32_000)
        (tmp_path / "data" / f"{name}.txt").write_text(name)
    launch_here(tmp_path, *ONE_STEP, "--min_seconds", "0.001")
    assert fates(tmp_path) == {
        "none.wav": "too short", "one_view.wav": "too short", "both.wav": "used", "more.wav": "used",
    }  # fmt: skip
    assert prepare(tmp_path, min_seconds=0.001).clips == 2


def test_a_table_gives_the_codes_of_the_files_that_it_holds(tmp_path):
    for seed in range(3):
        write_clip(tmp_path / f"data/{seed}.wav", f"caption {seed}", seed=seed)
    files = prepare(tmp_path)
    audio = [{"bytes": (tmp_path / f"data/{seed}.wav").read_bytes(), "path": f"{seed}.wav"} for seed in range(3)]
    texts = [f"caption {seed}" for seed in range(3)]
    table = pa.table({"audio": pa.array(audio, AUDIO), "text": texts})
    write_parquet(tmp_path / "rows/data/x.parquet", table, group_rows=1)
    rows = prepare(tmp_path / "rows")
    assert (rows.digest, rows.seconds, rows.clips) == (files.digest, files.seconds, 3)
    for clip in range(3):
        for view, frames in enumerate(files.train.codes.frames[clip]):
            crops = (found.train.codes.crop(clip, view, 0, frames) for found in (files, rows))
            assert np.array_equal(*crops)
    assert not places._GROUPS  # what was decoded is not held while training


def test_codec_and_text_encoder_are_gone_when_the_data_are_there(tmp_path):
    write_clip(tmp_path / "data/0.wav", "a caption")
    source = open_model("debug")
    with left_behind(nn.Module) as found:
        data = prepare(tmp_path, source=source)
    assert (data.clips, found) == (1, [])
    with left_behind(nn.Module) as found:
        load_codec(source)
    assert "ParametrizedConv1d" in found, "else free_unused need not look for cycles any more"


def test_only_clips_without_a_frame_are_an_error(tmp_path):
    (tmp_path / "data").mkdir()
    soundfile.write(tmp_path / "data/x.wav", np.full(500, 0.1), 32_000)
    with pytest.raises(DataError, match=r"less than a frame"):
        prepare(tmp_path, min_seconds=0.001, no_label=True)


def test_min_seconds_leaves_out_what_is_shorter(tmp_path):
    for seconds in (0.6, 1.5):
        write_clip(tmp_path / "data" / f"{seconds}.wav", "x", seconds=seconds)
    launch_here(tmp_path, *ONE_STEP, "--min_seconds", "1")
    assert fates(tmp_path) == {"0.6.wav": "too short", "1.5.wav": "used"}


def test_a_validation_share_that_chooses_no_clip_is_refused_and_not_ignored(tmp_path):
    write_clip(tmp_path / "data/a.wav", "x")
    output = launch_here(tmp_path, *ONE_STEP, "--validation", "0.0001", expect=3)
    assert "chose none of the 1 clips" in output and "--seed" in output


def test_the_seed_chooses_what_is_held_out(tmp_path):
    for seed in range(12):
        write_clip(tmp_path / "data" / f"{seed}.wav", "x", seed=seed)
    held = [set(prepare(tmp_path, validation="0.5", seed=seed).validation.names) for seed in (0, 0, 1)]
    assert held[0] == held[1] != held[2]
    train = set(prepare(tmp_path, validation="0.5", seed=1).train.names)
    assert not train & held[2] and len(train | held[2]) == 12


def test_files_of_a_validation_folder_are_told_from_those_of_equal_name(tmp_path):
    write_clip(tmp_path / "data/a.wav", "x", seed=1)
    write_clip(tmp_path / "held/a.wav", "x", seed=2)
    write_clip(tmp_path / "held/b.wav", seed=3)
    launch_here(tmp_path, *ONE_STEP, "--validation", "held")
    assert fates(tmp_path) == {"a.wav": "used", "held/a.wav": "used", "held/b.wav": "no caption"}
    lines = (tmp_path / "models/metrics.jsonl").read_text().splitlines()
    assert any("validation_loss" in json.loads(line) for line in lines)


def test_words_that_t5_does_not_know_are_named_with_a_full_cache_too(tmp_path):
    # The debug tokenizer knows what ASCII can spell.
    captions = {"a": "slow 音楽", "b": "slow ロック 音楽", "c": "slow rock", "d": "", "e": "🎸 rock"}
    for seed, (name, caption) in enumerate(captions.items()):
        write_clip(tmp_path / "data" / f"{name}.wav", caption, seed=seed)
    write_clip(tmp_path / "held/a.wav", "тихо", seed=9)
    data = prepare(tmp_path, validation=str(tmp_path / "held"))
    details = {fate.path.removeprefix(f"{tmp_path}/"): fate.detail for fate in data.fates}
    assert data.unread == 4 and data.describe().count("4 captions hold words that T5 does not know") == 1
    assert [name for name in details if "does not know" in details[name]] == ["a.wav", "b.wav", "e.wav", "held/a.wav"]
    assert "T5 does not know ロック, 音楽 in its caption" in details["b.wav"]
    again = prepare(tmp_path, validation=str(tmp_path / "held"))
    assert again.fates == data.fates and again.describe() == data.describe()
    silent = prepare(tmp_path, no_label=True)
    assert silent.unread == 0 and "does not know" not in silent.describe()


def test_a_clip_of_which_an_older_version_read_less_is_encoded_anew_and_ends_its_run_with_its_name(
    tmp_path, monkeypatch
):
    write_clip(tmp_path / "data/good.wav", "good", seed=1)
    (tmp_path / "data/stale.wav").write_bytes(wav_header(16_000) + pcm16(3))
    (tmp_path / "data/stale.txt").write_text("stale")
    with monkeypatch.context() as older:
        for module in (audio, sound_file):  # the one hashes, the other one decodes
            older.setattr(module, "sound_of", lambda *given: Sound(end=44 + 16_000))
        older.setattr(audio_facts, "VERSION", 1)
        launch_here(tmp_path, *ONE_STEP)
        keys = cached_keys(tmp_path)
    assert len(keys) == 2
    output = launch_here(tmp_path, "--max_steps", "2", "--segment_seconds", "1", expect=1)
    assert "belongs to another run; dataset: 2 clips" in output
    assert "stale.wav (its header gives 1.00 s and was not updated: all 3.00 s are used" in output
    assert "good.wav" not in output.split("belongs to another run")[1]
    assert keys < cached_keys(tmp_path) and len(cached_keys(tmp_path)) == 3
    launch_here(tmp_path, *ONE_STEP, "--output_dir", "new")


def cached_keys(folder: Path) -> set[str]:
    parts = (folder / "cache/codes").glob("*/*.arrow")
    return {key for part in parts for key in pa.ipc.open_stream(part.read_bytes()).read_all()["key"].to_pylist()}


def test_codes_are_never_stored_under_the_content_of_another_file(tmp_path):
    path = write_clip(tmp_path / "data/a.wav", "x", seed=1)
    prepare(tmp_path, code_views=2)
    status = path.stat()
    write_clip(path, seed=2)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert path.stat().st_size == status.st_size
    prepare(tmp_path, code_views=2)  # size and date are trusted: nothing is read
    with pytest.raises(DataError, match="changed since it was inspected: run again with --rehash 1"):
        prepare(tmp_path, code_views=3)
    assert prepare(tmp_path, code_views=3, rehash=True).clips == 1
