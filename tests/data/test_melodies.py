"""The melodies of clips: found once, kept beside the codes, cropped with them, and heard where they are to be heard."""

from __future__ import annotations

import functools
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import prepare_dataset
import pytest
import soundfile
import torch

from tests import chroma_sounds
from tests.chroma_sounds import noise, tune
from tests.data.hub_server import asked_by_this_process
from tests.data.test_shared_scan import on_each_rank
from trainer.data import audio, chroma, dataset, melodies, reading_in_parts
from trainer.data.arrow_store import KEY
from trainer.data.hub_dataset import find_dataset
from trainer.data.order import Row
from trainer.data.peers import Alone
from trainer.data.stems import Mix
from trainer.data.treatment import AS_IT_IS, Treatment
from trainer.errors import ConfigError, DataError
from trainer.flags.config import Config
from trainer.model.source import Source, open_model
from trainer.spec.shapes import MELODY_PLACES
from trainer.wiring import data_settings, melodies_in_words

CPU = torch.device("cpu")
RATE = chroma.SAMPLE_RATE_HZ


@functools.cache
def source(name: str = "debug-melody") -> Source:
    return open_model(name)


def write(path: Path, sound: np.ndarray, rate_hz: int = RATE, caption: str | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, sound, rate_hz, subtype="FLOAT")
    if caption is not None:
        path.with_suffix(".txt").write_text(caption)
    return path


def song(seed: int, seconds: float) -> np.ndarray:
    """Half-second tones, drawn, with a little noise."""
    samples = round(seconds * RATE)
    draw = np.random.default_rng(seed)
    semitones = [int(note) for note in draw.integers(0, 24, 1 + samples // (RATE // 2))]
    return tune(semitones, RATE // 2)[:samples] + 0.1 * noise(samples, seed)


def clips_of(paths: list[Path], melody_files: dict[Path, Path] | None = None) -> dict[str, list]:
    """The columns of the manifest that are used, of files; some of which have a melody file."""
    facts = [audio.inspect(path) for path in paths]
    others = [None if melody_files is None else melody_files.get(path) for path in paths]
    columns: dict[str, list] = {
        "path": [path.name for path in paths],
        "path_bytes": [os.fsencode(path) for path in paths],
        "content": [one.content for one in facts],
        "seconds": [one.seconds for one in facts],
        "sample_rate_hz": [one.sample_rate_hz for one in facts],
        "first_frame": [0] * len(paths),
        "melody_path_bytes": [b""] * len(paths),
        "melody_content": [""] * len(paths),
        "frames": [round(one.seconds * one.sample_rate_hz) for one in facts],
        "gain": [1.0] * len(paths),
    }
    if melody_files is not None:
        columns["melody_path_bytes"] = [b"" if path is None else os.fsencode(path) for path in others]
        columns["melody_content"] = ["" if path is None else audio.content_of(path) for path in others]
    return columns


def filled(store, clips, **ranks) -> list:
    return melodies.fill_melodies(store, clips, Mix(), device=CPU, show_progress=False, **ranks)


def stored(folder: Path, *notes: np.ndarray) -> melodies.CachedMelodies:
    """Melodies with these notes, of four views."""
    store = melodies.melody_store(folder, AS_IT_IS, "mix")
    store.append([{KEY: str(clip), "notes": bytes(of_clip.tolist())} for clip, of_clip in enumerate(notes)])
    clips = {"content": [str(clip) for clip in range(len(notes))], "melody_content": [""] * len(notes)}
    return melodies.open_melodies(store, clips, 4)


def test_a_crop_has_the_notes_nearest_in_time(tmp_path):
    draw = np.random.default_rng(0)
    samples = 400_000
    notes = draw.integers(0, 12, 1 + samples // 640, dtype=np.uint8)
    found = stored(tmp_path, notes[:5], notes)
    for _ in range(300):
        view = int(draw.integers(4))
        longest = (samples - 160 * view) // 640
        frames = int(draw.integers(1, longest + 1))
        start = int(draw.integers(longest - frames + 1))
        times = [start * 640 + 160 * view + 4096 * j for j in range(1 + frames * 640 // 4096)]
        crop = found.crop(1, view, start, frames)
        # Every note of a clip's own melody is there: a crop does not end behind its clip.
        assert crop.tolist() == [notes[min(round(time / 640), len(notes) - 1)] for time in times]


def test_a_melody_that_ends_before_the_crop_gives_fewer_notes_or_none(tmp_path):
    notes = np.arange(100, dtype=np.uint8) % 12  # of 64,000 samples, less one frame
    found = stored(tmp_path, notes, notes[:0])
    assert [len(found.crop(0, 0, start, 50)) for start in (0, 49, 80, 99, 100, 1000)] == [8, 8, 4, 1, 0, 0]
    assert found.crop(0, 0, 99, 1).tolist() == [99 % 12]
    assert len(found.crop(1, 3, 0, 50)) == 0


def test_crops_of_music_have_the_notes_that_are_heard_in_the_crop_alone(tmp_path):
    """.979 was measured over a dozen tracks, with crops of 10 s; the clips here last 4 to 8 s."""
    tracks = list(chroma_sounds.examples().values())
    found = stored(tmp_path, *(chroma.frame_notes([track]) for track in tracks))
    draw = np.random.default_rng(0)
    frames = 150
    equal: list[bool] = []
    for clip, track in enumerate(tracks):
        for _ in range(12):
            view = int(draw.integers(4))
            start = int(draw.integers((len(track) - 160 * view) // 640 - frames + 1))
            first = start * 640 + 160 * view
            alone = chroma.notes_of(track[first : first + frames * 640])
            equal += (alone == found.crop(clip, view, start, frames))[2:-2].tolist()
    assert len(equal) > 2000 and np.mean(equal) >= 0.97


def test_ranks_fill_the_store_together_and_each_melody_is_found_once(tmp_path):
    paths = [write(tmp_path / f"{seed}.wav", song(seed, 0.4 + 0.3 * seed)) for seed in range(5)]
    # The bytes themselves: a file of floats that is written again a second later has another time in it.
    paths.append(tmp_path / "again.wav")
    paths[-1].write_bytes(paths[2].read_bytes())
    clips = clips_of(paths)
    store = melodies.melody_store(tmp_path / "cache", AS_IT_IS, "mix")
    for rank in range(3):
        assert filled(store, clips, rank=rank, world_size=3) == []
    rows = store.open()
    assert rows.table.num_rows == len(rows.index) == len(set(clips["content"])) == 5
    found = melodies.open_melodies(store, clips, 1)
    for clip, path in enumerate(paths):
        heard = chroma.notes_of(np.concatenate(list(audio.stream(path, RATE))))
        frames = clips["frames"][clip] // 640
        assert np.array_equal(found.crop(clip, 0, 0, frames)[::5], heard[: 1 + frames * 640 // 4096][::5])


def test_a_melody_file_is_heard_in_the_seconds_of_its_clip_at_its_own_rate(tmp_path):
    clip = write(tmp_path / "clip.wav", noise(44_100 * 3, 1), 44_100)
    melody = song(7, 4)
    other = write(tmp_path / "clip.melody.wav", melody)
    short = write(tmp_path / "short.melody.wav", melody[: 2 * RATE])
    store = melodies.melody_store(tmp_path / "cache", AS_IT_IS, "mix")
    for file, seconds in ((other, 3.0), (short, 2.0)):
        clips = clips_of([clip], {clip: file})
        clips["first_frame"], clips["frames"] = [22_050], [44_100 * 5 // 2]  # from 0.5 to 3 s
        assert filled(store, clips) == []
        found = melodies.open_melodies(store, clips, 1).crop(0, 0, 0, 125)
        alone = chroma.frame_notes([melody[RATE // 2 : int(seconds * RATE)]])
        assert np.array_equal(found, alone[np.rint(np.arange(0, len(alone), 6.4)[: len(found)]).astype(int)])
        assert len(found) == (20 if file == other else 12)
    assert filled(store, clips_of([clip])) == [] and len(store.keys()) == 3  # its own melody is another one


def test_a_melody_file_that_ends_before_the_clip_begins_gives_no_notes(tmp_path):
    clip, other = write(tmp_path / "a.wav", song(1, 3)), write(tmp_path / "a.melody.wav", song(2, 1))
    clips = clips_of([clip], {clip: other})
    clips["first_frame"], clips["frames"] = [2 * RATE], [RATE]
    store = melodies.melody_store(tmp_path / "cache", AS_IT_IS, "mix")
    assert filled(store, clips) == []
    assert len(melodies.open_melodies(store, clips, 1).crop(0, 0, 0, 50)) == 0


def test_a_sound_that_cannot_be_read_leaves_out_its_clip_alone_and_is_named(tmp_path):
    paths = [write(tmp_path / f"{seed}.wav", song(seed, 1)) for seed in range(4)]
    others = {paths[0]: write(tmp_path / "0.melody.wav", song(8, 1)), paths[1]: write(tmp_path / "b.wav", song(9, 1))}
    clips = clips_of(paths, others)
    others[paths[0]].write_bytes(b"no sound any more")
    write(others[paths[1]], song(10, 1))  # another one by now
    paths[2].unlink()
    store = melodies.melody_store(tmp_path / "cache", AS_IT_IS, "mix")
    faults = dict(filled(store, clips))
    assert sorted(faults) == [0, 1, 2] and store.keys() == {clips["content"][3]}
    fates = [melodies.fate_of(faults[row], clips, row) for row in range(3)]
    assert [detail.startswith("its melody") for _, detail in fates] == [True, True, False]
    assert fates[0][1].startswith("its melody 0.melody.wav is ") and fates[1][1].startswith("its melody b.wav is ")
    assert "changed since it was inspected: run again with --rehash 1" in fates[1][1]


def test_of_equal_files_the_first_that_can_be_read_is_heard(tmp_path):
    paths = [write(tmp_path / name, song(1, 1)) for name in ("a.wav", "b.wav")]
    clips = clips_of(paths)
    paths[0].unlink()
    store = melodies.melody_store(tmp_path / "cache", AS_IT_IS, "mix")
    assert filled(store, clips) == [] and len(store.keys()) == 1


def test_loudness_shares_the_store_and_other_seconds_or_stems_do_not():
    folders = [
        melodies.melody_store(Path("cache"), Treatment(trim_silence=trim, loudness_lufs=lufs), stems).folder
        for trim in (False, True) for lufs in (None, -14.0) for stems in ("mix", "demucs-0123")
    ]  # fmt: skip
    assert len(set(folders)) == 4 and folders[0] == folders[2] != folders[1]


# Through dataset.prepare


def music(folder: Path) -> Path:
    """Clips of a folder, one of them with silence at both ends."""
    silence = np.zeros(RATE // 2, np.float32)
    for seed in range(5):
        write(folder / f"{seed}.wav", song(seed, 1 + 0.37 * seed), caption=f"slow rock number {seed}")
    write(folder / "silent.wav", np.concatenate([silence, song(9, 1.5), silence]), caption="silent ends")
    return folder


def opened(folder: Path, cache_dir: Path, model: str = "debug-melody", **flags) -> dataset.Dataset:
    flags = {"code_views": 2, "min_seconds": 0.2, "model_id": model} | flags
    settings = data_settings(Config(dataset_path=str(folder), cache_dir=str(cache_dir), **flags))
    return dataset.prepare(settings, source(model), CPU)


def read_melodies(data: dataset.Dataset) -> list[list[int]]:
    """What the model reads of each training clip, whole."""
    found = []
    for clip in range(data.clips):
        frames = int(data.train.codes.frames[clip, 1])
        row = Row(clip=clip, epoch=0, view=1, start=0, frames=frames, drop_caption=False)
        batch = data.train.batch([row, replace(row, drop_melody=True)])
        assert batch.melody_BC.shape == (2, MELODY_PLACES) and not batch.melody_BC[1].any()
        found.append(batch.melody_BC[0].tolist())
    return found


@pytest.mark.parametrize("flags", [{}, {"trim_silence": True, "loudness": -30.0}])
def test_a_run_reads_the_melody_of_each_clip_repeated_to_its_places(tmp_path, monkeypatch, flags):
    data = opened(music(tmp_path / "data"), tmp_path / "cache", validation="0.4", **flags)
    assert data.stems == "mix" and data.validation is not None
    assert len(data.train.names) + len(data.validation.names) == 6
    assert data.validation.melodies.crop(0, 0, 0, 20).shape == (4,)
    for clip, places in enumerate(read_melodies(data)):
        table = data.table
        sound = np.concatenate(list(audio.stream(Path(os.fsdecode(table["path_bytes"][clip])), RATE)))
        first = table["first_frame"][clip]
        alone = chroma.frame_notes([sound[first : first + table["frames"][clip]]])
        frames = int(data.train.codes.frames[clip, 1])
        # View 1 of 2 begins half a frame later; of a note in the middle of two frames the even one is taken.
        notes = [alone[min(round(0.5 + 6.4 * j), len(alone) - 1)] for j in range(1 + frames * 640 // 4096)]
        assert places == [notes[place % len(notes)] for place in range(MELODY_PLACES)]

    def never(*_: object) -> None:
        raise AssertionError("nothing is missing, and yet a sound is opened")

    monkeypatch.setattr(audio, "stream", never)
    again = opened(tmp_path / "data", tmp_path / "cache", validation="0.4", **flags)
    assert read_melodies(again) == read_melodies(data)


def test_the_console_says_where_the_melodies_are_from_and_how_many_are_dropped(tmp_path):
    folder = tmp_path / "data"
    for name in ("a", "b"):
        write(folder / f"{name}.wav", song(ord(name), 1.0), caption=name)
    of_itself = "each clip's is heard in its full mix"
    assert of_itself in melodies_in_words(0.5, opened(folder, tmp_path / "cache"))
    write(folder / "a.melody.wav", song(7, 1.0))
    said = melodies_in_words(0.0, opened(folder, tmp_path / "cache"))
    assert "that of 1 of 2 clips is a file of its own, that of each other is heard in its full mix; none is" in said
    write(folder / "b.melody.wav", song(8, 1.0))
    said = melodies_in_words(0.5, opened(folder, tmp_path / "cache"))
    assert said.startswith("melodies: each clip's is a file of its own; 50 % of the clips") and "mix" not in said


def test_a_text_model_has_no_melodies_and_keeps_none(tmp_path):
    data = opened(music(tmp_path / "data"), tmp_path / "cache", "debug")
    assert data.train.melodies is None and data.stems == "" and not (tmp_path / "cache/melody").exists()


@pytest.mark.full
def test_ranks_that_are_several_prepare_what_one_does(tmp_path):
    music(tmp_path / "data")
    alone = opened(tmp_path / "data", tmp_path / "one")
    flags = {"code_views": 2, "min_seconds": 0.2, "model_id": "debug-melody", "cache_dir": str(tmp_path / "two")}
    settings = data_settings(Config(dataset_path=str(tmp_path / "data"), **flags))
    source().codec_identity(), source().text_identity()
    each = on_each_rank(lambda rank, peers: dataset.prepare(settings, source(), CPU, peers), 2)
    assert [read_melodies(data) for data in each] == [read_melodies(alone)] * 2


def make(folder: Path, output: Path, *flags: str, model: str = "debug-melody") -> None:
    given = [str(folder), "--output", str(output), "--model_id", model, "--code_views", "2", "--min_seconds", "0.2"]
    assert prepare_dataset.main([*given, "--cache_dir", str(output.parent / "cache"), *flags]) == 0


def of_codec(folder: Path, model: Source) -> None:
    """Have a prepared folder say that this model's EnCodec made its codes."""
    said = json.loads((folder / "prepared.json").read_text())
    (folder / "prepared.json").write_text(json.dumps(said | {"codec": model.codec_identity()}))


def test_a_prepared_folder_has_the_melodies_and_needs_no_sound(tmp_path, monkeypatch, capsys):
    first = opened(music(tmp_path / "data"), tmp_path / "cache", trim_silence=True)
    make(tmp_path / "data", tmp_path / "prepared", "--trim_silence", "1", "--anonymous")
    monkeypatch.setattr(audio, "stream", None)
    second = opened(tmp_path / "prepared", tmp_path / "none", trim_silence=True)
    assert second.stems == "mix" and read_melodies(second) == read_melodies(first)
    assert not (tmp_path / "none").exists() and "melody/" in (tmp_path / "prepared/README.md").read_text()
    with pytest.raises(ConfigError, match=r"--stems demucs: the melodies of .* were heard with --stems mix"):
        opened(tmp_path / "prepared", tmp_path / "none", trim_silence=True, stems="demucs")
    # A text model of the same EnCodec passes over them, as the published models have the same.
    of_codec(tmp_path / "prepared", source("debug"))
    assert opened(tmp_path / "prepared", tmp_path / "none", "debug", trim_silence=True).train.melodies is None
    of_codec(tmp_path / "prepared", source())
    (tmp_path / "prepared/melody/part-00000.arrow").write_bytes(b"")
    with pytest.raises(DataError, match="damaged or incomplete"):
        opened(tmp_path / "prepared", tmp_path / "none", trim_silence=True)


@pytest.mark.full
def test_a_prepared_folder_gives_its_melodies_back_to_an_empty_cache(tmp_path, monkeypatch):
    make(music(tmp_path / "data"), tmp_path / "prepared")
    before = read_melodies(opened(tmp_path / "prepared", tmp_path / "none"))
    os.rename(tmp_path / "cache/melody", tmp_path / "away")
    monkeypatch.setattr(Mix, "blocks", None)
    make(tmp_path / "data", tmp_path / "prepared")
    assert read_melodies(opened(tmp_path / "prepared", tmp_path / "none")) == before


def test_a_folder_that_was_prepared_for_a_text_model_is_refused_with_what_to_do(tmp_path):
    make(music(tmp_path / "data"), tmp_path / "prepared", model="debug")
    assert '"stems"' not in (tmp_path / "prepared/prepared.json").read_text()
    of_codec(tmp_path / "prepared", source())
    with pytest.raises(ConfigError, match=r"lacks the melodies that --model_id debug-melody reads.*prepare the music"):
        opened(tmp_path / "prepared", tmp_path / "none")


def test_a_folder_beside_a_prepared_one_is_heard_as_that_was(tmp_path, capsys):
    make(music(tmp_path / "data"), tmp_path / "prepared", "--stems", "mix")
    capsys.readouterr()
    data = opened(tmp_path / "prepared", tmp_path / "cache", validation=str(tmp_path / "data"))
    assert data.stems == "mix" and data.validation is not None
    assert capsys.readouterr().out.count("--stems mix, as those of the prepared folder were") == 1
    path = tmp_path / "prepared/prepared.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"stems": "demucs-0123456789abcdef"}))
    with pytest.raises(ConfigError, match="the melodies of the prepared folder were heard in demucs' stems"):
        opened(tmp_path / "prepared", tmp_path / "cache", validation=str(tmp_path / "data"))


def test_nothing_is_said_of_stems_where_every_clip_has_a_melody_file(tmp_path, capsys):
    write(tmp_path / "data/a.wav", song(1, 1), caption="a")
    write(tmp_path / "data/a.melody.wav", song(2, 1))
    assert opened(tmp_path / "data", tmp_path / "cache").clips == 1
    assert "--stems" not in capsys.readouterr().out
    write(tmp_path / "data/b.wav", song(3, 1), caption="b")
    assert opened(tmp_path / "data", tmp_path / "cache").clips == 2
    assert capsys.readouterr().out.count("--stems auto") == 1


@pytest.mark.full
def test_a_data_set_that_is_read_in_parts_has_the_melodies_of_the_whole(tmp_path, monkeypatch, capsys):
    whole = opened(music(tmp_path / "data"), tmp_path / "whole")
    with asked_by_this_process(tmp_path / "hub_cache", monkeypatch) as hub:
        hub.add("user/music", tmp_path / "data", "a" * 40)
        found = replace(
            find_dataset("user/music", revision=None, config=None, split="train", flag="--dataset"), in_parts=True
        )
        flags = {"code_views": 2, "min_seconds": 0.2, "model_id": "debug-melody", "cache_dir": str(tmp_path / "cache")}
        settings = data_settings(Config(dataset_path="user/music", **flags), found)
        assert capsys.readouterr().out.count("--stems auto") == 1
        for _ in range(2):
            goes_on = reading_in_parts.read_all({"dataset": found}, settings, source(), CPU, Alone())
            assert read_melodies(dataset.prepare(goes_on, source(), CPU)) == read_melodies(whole)
            assert capsys.readouterr().out.count("--stems auto") == 1  # each run says it once
