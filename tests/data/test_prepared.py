"""A prepared folder: what it takes to train on, wherever it lies, and what a run is told that asks it for more."""

from __future__ import annotations

import functools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import prepare_dataset
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import soundfile
import torch
from hypothesis import HealthCheck, example, given, strategies
from hypothesis import settings as hypothesis_settings

from tests.audio_files import write_clip
from trainer.data import cache, dataset, prepared, prepared_writing, prompts
from trainer.data.order import Row
from trainer.errors import ConfigError, DataError, TrainerError
from trainer.flags.config import Config, parse
from trainer.model.source import Source, open_model
from trainer.preflight import check_folders
from trainer.wiring import data_settings

CPU = torch.device("cpu")


def music(folder: Path, clips: int = 5) -> Path:
    """Short clips, two of one sound with different captions, and one with an empty caption."""
    for seed in range(clips):
        write_clip(folder / f"{seed}.wav", f"slow rock number {seed}\nfast piano", seed=seed, seconds=0.6)
    write_clip(folder / "again.wav", "another caption", seed=0, seconds=0.6)
    write_clip(folder / "blank.wav", "", seed=clips, seconds=1.2)
    return folder


def make(folder: Path, output: Path, *flags: str) -> None:
    """prepare_dataset.py on `folder`, with two views and a cache beside the output."""
    given = [str(folder), "--output", str(output), "--model_id", "debug", "--code_views", "2"]
    assert prepare_dataset.main([*given, "--cache_dir", str(output.parent / "cache"), *flags]) == 0


@functools.cache
def source() -> Source:
    return open_model("debug")


def settings_of(folder: Path, cache_dir: Path, **flags) -> dataset.DataSettings:
    flags = {"code_views": 2, "model_id": "debug"} | flags
    return data_settings(Config(dataset_path=str(folder), cache_dir=str(cache_dir), **flags))


def opened(folder: Path, cache_dir: Path, **flags) -> dataset.Dataset:
    return dataset.prepare(settings_of(folder, cache_dir, **flags), source(), CPU)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data/, from which prepared/ was made: not to be changed."""
    root = tmp_path_factory.mktemp("made")
    music(root / "data")
    make(root / "data", root / "prepared", "--word_dropout", "0.3")
    return root


@pytest.fixture
def moved(made: Path, tmp_path: Path) -> Path:
    """The prepared folder in another place, as a copy."""
    return shutil.copytree(made / "prepared", tmp_path / "elsewhere" / "moved")


@pytest.fixture
def no_models_after(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From its call on no model may be loaded."""

    def never(*_: object) -> None:
        raise AssertionError("nothing is missing, and yet a model is loaded")

    def begin() -> None:
        monkeypatch.setattr(dataset, "load_codec", never)
        monkeypatch.setattr(prompts, "load_text_encoder", never)

    return begin


@pytest.fixture
def no_models(no_models_after: Callable[[], None]) -> None:
    no_models_after()


def batches(data: dataset.Dataset) -> list[torch.Tensor]:
    """All that is trained on of every clip, with each of its texts."""
    found = []
    for clip in range(data.clips):
        for text in range(1 if data.train.texts is None else len(data.train.texts[clip])):
            for view in range(2):
                frames = int(data.train.codes.frames[clip, view])
                row = Row(clip=clip, epoch=0, view=view, start=0, frames=frames, drop_caption=False, text=text)
                batch = data.train.batch([row])
                found += [batch.inputs_BKT, batch.labels_BKT, batch.text_BSD, batch.text_mask_BS]
    return found


@pytest.mark.parametrize(
    "flags", [{}, {"word_dropout": 0.3}, {"no_label": True}, {"min_seconds": 1.0}, {"validation": "0.4"}]
)
def test_a_moved_folder_gives_the_clips_order_and_tensors_of_the_music_itself(made, moved, tmp_path, no_models, flags):
    first = opened(made / "data", made / "cache", **flags)
    second = opened(moved, tmp_path / "no cache", **flags)
    assert (first.digest, first.seconds, first.train.texts) == (second.digest, second.seconds, second.train.texts)
    assert first.train.captions == second.train.captions and first.train.names == second.train.names
    assert (first.validation is None) == (second.validation is None)
    if first.validation is not None and second.validation is not None:
        assert first.validation.names == second.validation.names != []
    for one, other in zip(batches(first), batches(second), strict=True):
        assert torch.equal(one, other)
    assert not (tmp_path / "no cache").exists()


@pytest.mark.parametrize(
    "flags",
    [
        {"trim_silence": True, "loudness": -30.0},
        {"trigger": "in my-style", "word_dropout": 0.2},
        {"caption": "one for all"},
        {"captions": "json,text", "merge_metadata": 0.5, "merge_drop_field": 0.3},
    ],
)
def test_flags_of_sounds_and_captions_hold_for_the_folder_that_was_made_with_them(tmp_path, no_models_after, flags):
    """The tensors of the music itself, without its sounds and caption files, and without EnCodec and T5."""
    write_clip(tmp_path / "data/0.wav", "slow rock", seed=0, seconds=1.2)
    write_clip(tmp_path / "data/1.wav", "fast piano", seed=1, seconds=0.6)
    sound, rate = soundfile.read(tmp_path / "data/0.wav")
    sound[: rate // 4] = 0
    soundfile.write(tmp_path / "data/0.wav", sound, rate)
    (tmp_path / "data/1.json").write_text('{"description": "piano alone", "genre": "jazz", "bpm": 120}')
    typed = [f"--{name}={int(value) if value is True else value}" for name, value in flags.items()]
    make(tmp_path / "data", tmp_path / "prepared", *typed)
    no_models_after()
    first = opened(tmp_path / "data", tmp_path / "cache", **flags)
    shutil.rmtree(tmp_path / "data")
    second = opened(tmp_path / "prepared", tmp_path / "none", **flags)
    assert (first.digest, first.seconds, first.train.texts) == (second.digest, second.seconds, second.train.texts)
    for one, other in zip(batches(first), batches(second), strict=True):
        assert torch.equal(one, other)
    assert not (tmp_path / "none").exists()


def test_nothing_is_written_into_the_folder_and_read_only_files_do(moved, tmp_path, no_models):
    for path in [*moved.rglob("*"), moved]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in [moved, *moved.rglob("*")]}
    batches(opened(moved, tmp_path / "cache"))
    assert before == {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in [moved, *moved.rglob("*")]}


def test_codes_are_looks_into_the_mapped_files_of_the_folder(moved, tmp_path):
    crop = opened(moved, tmp_path / "cache").train.codes.crop(0, 1, 3, 5)
    address = crop.__array_interface__["data"][0]
    spans = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if str(moved / "codes") in line:
            spans.append([int(end, 16) for end in line.split()[0].split("-")])
    assert any(start <= address < end for start, end in spans)


def test_texts_that_are_not_in_the_folder_are_made_by_t5_into_the_cache(moved, tmp_path):
    cache_dir = tmp_path / "cache"
    first = opened(moved, cache_dir, word_dropout=0.5)
    known = {key for path in (moved / "text").iterdir() for key in keys_of(path)}
    new = {key for path in cache_dir.glob("text/*/*.arrow") for key in keys_of(path)}
    assert new and known.isdisjoint(new) and not (cache_dir / "codes").exists()
    assert set(cache.text_keys(first.train.all_texts())) <= known | new
    batches(first)


def keys_of(part: Path) -> list[str]:
    return pa.ipc.open_stream(part.read_bytes()).read_all()["key"].to_pylist()


def test_it_validates_a_folder_of_music_and_the_other_way_round(made, moved, tmp_path):
    write_clip(tmp_path / "held/a.wav", "held", seed=50, seconds=0.6)
    one = opened(moved, tmp_path / "cache", validation=str(tmp_path / "held"))
    other = opened(tmp_path / "held", tmp_path / "cache", validation=str(moved))
    assert one.validation is not None and other.validation is not None
    assert list(one.validation.names) == ["a.wav"] == list(other.train.names)
    assert other.validation.names == one.train.names and len(other.fates) == 8
    assert other.validation.codes.crop(0, 0, 0, 9).shape == (4, 9)


@pytest.mark.parametrize(
    "flags,words",
    [
        ({"code_views": 4}, "--code_views 4: .* lacks it, .* made with --code_views 2"),
        ({"caption_lines": True}, "--caption_lines 1: .* lacks it, .* made with --caption_lines 0"),
        ({"trim_silence": True}, "--trim_silence 1: .* lacks it, .* made with --trim_silence 0"),
        ({"loudness": -14.0}, "--loudness -14.0: .* lacks it, .* made with --loudness none"),
        ({"caption": "a b"}, "--caption 'a b': .* lacks it, .* made with --caption none"),
        ({"captions": "text"}, "--captions text: .* lacks it, .* made with --captions text,metadata,json,template"),
        ({"merge_metadata": 0.25}, "--merge_metadata 0.25: .* lacks it, .* made with --merge_metadata 0.0"),
        ({"min_seconds": 0.2}, "--min_seconds 0.2: .* lacks clips that short, .* --min_seconds 0.5"),
        ({"rehash": True}, "--rehash 1 has no effect with a prepared folder"),
        ({"min_seconds": 20.0}, "holds no clip of 20 s or more"),
    ],
)
def test_what_the_folder_lacks_is_refused_by_name(moved, tmp_path, no_models, flags, words):
    with pytest.raises((ConfigError, DataError), match=words):
        opened(moved, tmp_path / "cache", **flags)


MADE = ("--model_id", "debug", "--code_views", "2")


@pytest.mark.parametrize(
    "flags",
    [
        ("--audio_column", "audio"),
        ("--dataset_config", "clips"),
        ("--dataset_split", "test"),
        ("--validation", "other", "--validation_split", "test"),
        ("--validation", "tables", "--validation_split", "dev", "--dataset_split", "test"),
    ],
)
def test_flags_that_choose_among_tables_have_no_effect_on_a_prepared_folder_and_are_refused(
    moved, tmp_path, monkeypatch, flags
):
    monkeypatch.chdir(moved.parent)
    shutil.copytree("moved", "other")
    Path("tables").mkdir()
    named = "other" if flags[1] == "other" else "moved"
    with pytest.raises(ConfigError, match=f"{flags[-2]} {flags[-1]} has no effect on the prepared folder {named}, all"):
        check_folders(parse(["--dataset", "moved", *MADE, *flags])[0])


def test_flags_that_choose_among_tables_act_where_only_one_of_two_folders_is_prepared(moved, monkeypatch):
    monkeypatch.chdir(moved.parent)
    Path("tables").mkdir()
    chosen = ("--dataset_split", "test", "--dataset_config", "x", "--audio_column", "audio")
    for one, other in (("moved", "tables"), ("tables", "moved")):
        check_folders(parse(["--dataset", one, "--validation", other, *MADE, *chosen])[0])
    check_folders(parse(["--dataset", "moved", "--validation", "tables", *MADE, "--validation_split", "test"])[0])


def test_codes_of_another_codec_and_of_8_codebooks_are_refused_and_other_states_made_anew(moved, tmp_path):
    edit(moved, codec="0" * 32)
    with pytest.raises(ConfigError, match="lacks codes of the EnCodec of --model_id debug"):
        opened(moved, tmp_path / "cache")
    edit(moved, codebooks=8)
    with pytest.raises(ConfigError, match="holds codes of 8 codebooks, and --model_id debug reads 4"):
        opened(moved, tmp_path / "cache")
    edit(moved, channels=2)
    with pytest.raises(ConfigError, match=r"stereo sound, 8 codebooks, and this run .* trains a mono model of 4"):
        opened(moved, tmp_path / "cache")
    edit(moved, channels=1)
    edit(moved, codebooks=4, codec=source().codec_identity(), text_encoder="0" * 32)
    opened(moved, tmp_path / "cache")
    assert list((tmp_path / "cache/text").glob("*/*.arrow"))


@pytest.mark.parametrize("flags", [{}, {"validation": "0.5", "seed": 3}])
def test_without_captions_equal_samples_in_two_formats_are_the_one_clip_that_they_are_in_the_folder(tmp_path, flags):
    """Each pair has two captions, so that it is two clips until captions are left out."""
    for seed in range(6):
        write_clip(tmp_path / f"data/{seed}.wav", f"slow {seed}", seed=seed, seconds=0.6)
        sound, rate = soundfile.read(tmp_path / f"data/{seed}.wav", dtype="int16")
        soundfile.write(tmp_path / f"data/other {seed}.flac", sound, rate, subtype="PCM_16")
        (tmp_path / f"data/other {seed}.txt").write_text(f"fast {seed}")
    make(tmp_path / "data", tmp_path / "prepared")
    first = opened(tmp_path / "data", tmp_path / "cache", no_label=True, **flags)
    second = opened(tmp_path / "prepared", tmp_path / "none", no_label=True, **flags)
    assert opened(tmp_path / "prepared", tmp_path / "none").clips == 12
    assert first.clips + (0 if first.validation is None else len(first.validation.names)) == 6
    assert (first.digest, first.train.names, first.seconds) == (second.digest, second.train.names, second.seconds)
    assert sorted((fate.path, fate.fate) for fate in first.fates if fate.fate != "ignored") == sorted(
        (fate.path, fate.fate) for fate in second.fates
    )
    for one, other in zip(batches(first), batches(second), strict=True):
        assert torch.equal(one, other)


def test_a_folder_of_an_earlier_version_without_digests_of_samples_gives_the_clips_that_it_gave(moved, tmp_path):
    table = parquet.read_table(moved / "clips.parquet").drop_columns(["sound"])
    parquet.write_table(table, moved / "clips.parquet")
    edit(moved, files=sizes(moved))
    assert opened(moved, tmp_path / "cache").clips == 7
    assert opened(moved, tmp_path / "cache", no_label=True).clips == 6


def test_a_folder_without_captions_asks_for_no_label(tmp_path, capsys):
    make(music(tmp_path / "data", 1), tmp_path / "prepared", "--no_label")
    assert "launch.py --dataset" in (said := capsys.readouterr().out) and "--no_label 1" in said
    with pytest.raises(ConfigError, match="lacks captions, since it was made with --no_label 1"):
        opened(tmp_path / "prepared", tmp_path / "cache")
    assert opened(tmp_path / "prepared", tmp_path / "cache", no_label=True).train.captions == [None, None]


def edit(folder: Path, **changes) -> None:
    path = folder / "prepared.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def first_part(folder: Path, kind: str = "codes") -> Path:
    return folder / kind / "part-00000.arrow"


DAMAGES = {
    "no prepared.json": (lambda folder: (folder / "prepared.json").unlink(), "prepared.json is missing"),
    "empty prepared.json": (lambda folder: (folder / "prepared.json").write_text(""), "prepared.json cannot be read"),
    "another prepared.json": (lambda folder: (folder / "prepared.json").write_text("{}"), 'does not say "format"'),
    "no table": (lambda folder: (folder / "clips.parquet").unlink(), "clips.parquet cannot be opened"),
    "no codes": (lambda folder: shutil.rmtree(folder / "codes"), "codes/part-00000.arrow cannot be opened"),
    "a part is missing": (lambda folder: first_part(folder).unlink(), "part-00000.arrow cannot be opened"),
    "a part is cut": (lambda folder: os.truncate(first_part(folder, "text"), 900), "text/part-00000.arrow has 900 byt"),
    "a part holds zeros": (
        lambda folder: first_part(folder).write_bytes(bytes(first_part(folder).stat().st_size)),
        "codes/part-00000.arrow",
    ),
    "the table holds zeros": (
        lambda folder: (folder / "clips.parquet").write_bytes(bytes((folder / "clips.parquet").stat().st_size)),
        "clips.parquet cannot be read",
    ),
    "a later version": (lambda folder: edit(folder, version=2), "is of version 2, and this program reads 1"),
    "a path that leads out": (lambda folder: edit(folder, files={"../x": 1}), "prepared.json has .* as files"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_or_incomplete_folder_is_refused_with_what_is_wrong(moved, tmp_path, damage):
    spoil, words = DAMAGES[damage]
    spoil(moved)
    with pytest.raises(DataError, match=words):
        opened(moved, tmp_path / "cache")


def test_a_part_of_other_rows_is_noticed(moved, tmp_path):
    first_part(moved).write_bytes(first_part(moved, "text").read_bytes())
    edit(moved, files=json.loads((moved / "prepared.json").read_text())["files"] | sizes(moved))
    with pytest.raises(DataError, match=r"codes/part-00000.arrow has the columns \['key', 'tokens'"):
        opened(moved, tmp_path / "cache")


def test_digests_tell_a_changed_byte(moved):
    found = prepared.open_prepared(moved)
    found.check_digests()
    content = bytearray(first_part(moved).read_bytes())
    content[len(content) // 2] ^= 1
    first_part(moved).write_bytes(content)
    with pytest.raises(DataError, match="holds other bytes than were written"):
        found.check_digests()


def sizes(folder: Path) -> dict[str, int]:
    names = ["clips.parquet", *(f"{path.parent.name}/{path.name}" for path in folder.glob("*/part-*.arrow"))]
    return {name: (folder / name).stat().st_size for name in names}


def check_hostile(folder: Path, cache_dir: Path, name: str, value: object) -> None:
    """Whatever stands in prepared.json, the folder is read or refused."""
    path = folder / "prepared.json"
    good = path.read_text()
    try:
        edit(folder, **{name: value})
        found = prepared.open_prepared(folder)
        found.check_flags(settings_of(folder, cache_dir).fixed_flags)
        found.check_codec(4, 1, source().codec_identity(), "debug")
        clips, _ = found.clips(no_label=False, min_seconds=0.5)
        codes = found.codes(cache.code_store(cache_dir, source().codec_identity(), 2))
        found.check_contents(clips["content"], codes)
        assert len(clips["content"]) == 7
    except TrainerError:
        pass
    finally:
        path.write_text(good)


NAMES = strategies.sampled_from(
    [
        *("format", "version", "codec", "codebooks", "channels", "clips", "hours", "flags", "files", "digests"),
        *("frame_rate_hz", "x"),
    ]
)
VALUES = strategies.recursive(
    strategies.none() | strategies.booleans() | strategies.integers() | strategies.floats() | strategies.text(),
    lambda inner: strategies.lists(inner, max_size=3)
    | strategies.dictionaries(
        strategies.sampled_from(["code_views", "no_label", "min_seconds", "clips.parquet", "codes/part-00000.arrow"])
        | strategies.text(max_size=5),
        inner,
        max_size=4,
    ),
    max_leaves=6,
)


@hypothesis_settings(
    max_examples=40, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(NAMES, VALUES)
@example("flags", {"code_views": "2"})
@example("flags", {"code_views": 2, "caption_lines": None, "min_seconds": float("nan")})
@example("clips", 10**30)
def test_prepared_json_with_anything_in_it_is_read_or_refused(made, tmp_path, name, value):
    folder = tmp_path / "moved"
    if not folder.exists():
        shutil.copytree(made / "prepared", folder)
    check_hostile(folder, made / "cache", name, value)


@pytest.mark.full
@hypothesis_settings(
    max_examples=2000, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(NAMES, VALUES)
def test_prepared_json_with_anything_in_it_is_read_or_refused_at_length(made, tmp_path, name, value):
    folder = tmp_path / "moved"
    if not folder.exists():
        shutil.copytree(made / "prepared", folder)
    check_hostile(folder, made / "cache", name, value)


# Making it


def test_one_file_added_to_a_thousand_costs_one_encoding(tmp_path, monkeypatch, capsys):
    """With a stand-in for EnCodec's pass: what is counted is how often it is asked for."""
    encoded = []

    def encode_tracks(codec, next_track, *, offsets, size, channels):
        while (track := next_track()) is not None:
            key, blocks = track
            samples = sum(map(len, blocks))
            encoded.append(samples)
            yield key, [np.full((4, (samples - offset) // 640), len(encoded), np.int16) for offset in offsets]

    monkeypatch.setattr(cache, "encode_tracks", encode_tracks)
    for seed in range(1000):
        write_clip(tmp_path / f"data/{seed}.wav", f"rock {seed % 7}", seed=seed, seconds=0.1)
    make(tmp_path / "data", tmp_path / "prepared", "--min_seconds", "0.05")
    assert len(encoded) == 1000 and "sounds that were not there before: 1,000" in capsys.readouterr().out
    former = opened(tmp_path / "prepared", tmp_path / "none", min_seconds=0.05)
    write_clip(tmp_path / "data/new.wav", "rock 1", seed=5000, seconds=0.1)
    shutil.rmtree(tmp_path / "cache")  # what is in the folder itself need not be encoded again
    make(tmp_path / "data", tmp_path / "prepared", "--min_seconds", "0.05")
    assert len(encoded) == 1001 and "sounds that were not there before: 1\n" in capsys.readouterr().out
    now = opened(tmp_path / "prepared", tmp_path / "none", min_seconds=0.05)
    assert now.clips == 1001 and set(former.train.names) < set(now.train.names)
    for clip in (0, 400, 999):
        again = list(now.train.names).index(former.train.names[clip])
        np.testing.assert_array_equal(now.train.codes.crop(again, 1, 0, 4), former.train.codes.crop(clip, 1, 0, 4))


def test_a_removed_file_leaves_nothing_behind_and_your_own_files_stay(made, moved):
    shutil.copytree(made / "data", moved.parent / "data")
    shutil.copytree(made / "cache", moved.parent / "cache")
    content = opened(moved, made / "cache").table
    gone = content["content"][list(content["path"]).index("blank.wav")]
    (moved.parent / "data/blank.wav").unlink()
    (moved / "notes.md").write_text("mine")
    make(moved.parent / "data", moved)
    assert gone not in {key for path in (moved / "codes").iterdir() for key in keys_of(path)}
    assert (moved / "notes.md").read_text() == "mine"
    assert prepared.open_prepared(moved).about.clips == 6


def test_a_folder_that_cannot_be_finished_leaves_the_former_one(made, moved, monkeypatch, capsys):
    before = {path: path.read_bytes() for path in moved.rglob("*") if path.is_file()}
    shutil.copytree(made / "data", moved.parent / "data")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(prepared_writing, "_write_table", full)
    given = [str(moved.parent / "data"), "--output", str(moved), "--model_id", "debug", "--code_views", "2"]
    assert prepare_dataset.main([*given, "--cache_dir", str(made / "cache")]) == 4
    assert "No space left on device" in capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in moved.rglob("*") if path.is_file()}
    assert [path.name for path in moved.parent.iterdir() if "partial" in path.name] == []


def test_equal_music_gives_equal_files_in_parts_of_bounded_size(made, tmp_path, monkeypatch):
    monkeypatch.setattr(prepared_writing, "PART_BYTES", 2_000)
    shutil.copytree(made / "cache", tmp_path / "cache")
    for name in ("one", "two"):
        make(made / "data", tmp_path / name)
    files = [path.relative_to(tmp_path / "one") for path in sorted((tmp_path / "one").rglob("*")) if path.is_file()]
    assert len([file for file in files if file.parent.name == "codes"]) > 1
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes(), file
    assert opened(tmp_path / "one", tmp_path / "none").digest == opened(made / "data", made / "cache").digest


def test_names_of_files_can_be_left_out(made, moved, tmp_path):
    shutil.copytree(made / "cache", tmp_path / "cache")
    make(made / "data", tmp_path / "nameless", "--anonymous")
    for path in (tmp_path / "nameless").rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert b"blank" not in content and os.fsencode(made) not in content, path
    data = opened(tmp_path / "nameless", tmp_path / "cache")
    assert data.train.names[0] == "clip 00001" and data.digest == opened(moved, tmp_path / "cache").digest


def test_no_sound_and_no_path_of_this_machine_is_in_the_folder(made):
    for path in (made / "prepared").rglob("*"):
        assert path.is_dir() or os.fsencode(made) not in path.read_bytes(), path
    assert {path.suffix for path in (made / "prepared").rglob("*") if path.is_file()} == {
        ".json", ".md", ".parquet", ".arrow",
    }  # fmt: skip


def test_datasets_opens_the_table_and_the_parts(made, tmp_path):
    import datasets

    found = datasets.load_dataset(str(made / "prepared"), cache_dir=str(tmp_path), split="train")
    assert sorted(found["path"]) == sorted(opened(made / "prepared", tmp_path / "none").train.names)
    part = datasets.Dataset.from_file(str(first_part(made / "prepared")))
    assert set(part["key"]) == set(found["content"])


REFUSALS = {
    "is there already and is no prepared folder": ("data", "--output", "full"),
    "overlap: choose another place": ("data", "--output", "data/prepared"),
    "is a prepared folder already": ("prepared", "--output", "new"),
    "--lr has no effect on what is encoded": ("data", "--output", "new", "--lr", "1"),
    "--caption_variants 3 has no effect without --word_dropout": ("data", "--output", "n", "--caption_variants", "3"),
    "--public has no effect without --push_to_hub": ("data", "--output", "new", "--public"),
    "Did you mean --anonymous": ("data", "--output", "new", "--anonimous"),
    "cannot be opened": ("absent", "--output", "new"),
    "--stems mix has no effect with --model_id debug": ("data", "--output", "new", "--stems", "mix"),
    "has no effect: --dataset data is here": ("data", "--output", "new", "--dataset_revision", "v1"),
}


@pytest.mark.parametrize("words", REFUSALS)
def test_what_cannot_be_prepared_is_refused(made, tmp_path, monkeypatch, capsys, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").write_text("mine")
    (tmp_path / "data").symlink_to(made / "data")
    (tmp_path / "prepared").symlink_to(made / "prepared")
    assert prepare_dataset.main([*REFUSALS[words], "--model_id", "debug"]) in (2, 3)
    assert words in capsys.readouterr().err
    assert (tmp_path / "full/file").read_text() == "mine" and not (tmp_path / "new").exists()


def test_training_is_advised_without_the_flags_of_the_tables_that_were_read():
    typed = ["tables", "--output", "made", "--audio_column", "sound", "--dataset_split", "train", "--code_views", "2"]
    typed += ["--dataset_revision", "v1"]
    advice = prepare_dataset.command(prepare_dataset.read_flags(typed))
    assert advice == "python launch.py --dataset made --code_views 2"


def test_the_files_of_a_repository_tell_a_prepared_one():
    assert prepared.are_prepared(["README.md", "prepared.json", "clips.parquet", "codes/part-00000.arrow"])
    assert not prepared.are_prepared(["README.md", "train-00000.parquet"])
