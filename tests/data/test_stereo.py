"""What a stereo model is given of a folder: codes of both channels, and the sounds that only mono cannot have."""

from __future__ import annotations

import functools
import json
import os
import shutil
from pathlib import Path

import check_dataset
import numpy as np
import prepare_dataset
import pyarrow as pa
import pytest
import soundfile
import soxr
import torch

from tests.audio_files import noise, write_clip
from tests.data.table_files import AUDIO, write_parquet
from trainer.data import audio_facts, cache, dataset, manifest, prepared
from trainer.data.audio import CANCELS
from trainer.data.audio_fault import AudioFault
from trainer.data.caption_settings import CaptionSettings
from trainer.data.stand_ins import StandIns
from trainer.errors import ConfigError, DataError
from trainer.flags.config import Config
from trainer.model.source import Source, open_model
from trainer.model.stereo import in_stereo
from trainer.wiring import data_settings

CPU = torch.device("cpu")
RATE = 32_000
# What versions before stereo models keep of a sound.
FIELDS = {
    *("seconds", "sample_rate_hz", "channels", "content", "format", "sound", "levels", "fingerprint", "remark"),
}


@functools.cache
def source(name: str) -> Source:
    return open_model(name)


def write_sound(path: Path, samples: np.ndarray, rate: int = RATE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, samples, rate, subtype="FLOAT")
    path.with_suffix(".txt").write_text(path.stem)
    return path


def music(folder: Path) -> Path:
    """A stereo file at another rate, one of six channels, a mono one, and one whose channels cancel each other."""
    write_sound(folder / "two.wav", noise(0.7, 44_100, 2, seed=1), 44_100)
    write_sound(folder / "six.wav", noise(0.6, RATE, 6, seed=2))
    write_sound(folder / "one.wav", noise(0.5, RATE, seed=3))
    write_sound(folder / "cancels.wav", noise(0.6, RATE, seed=4)[:, None] * np.array([1, -1], np.float32))
    return folder


def prepare(folder: Path, cache_dir: Path, model: Source | None = None, **flags) -> dataset.Dataset:
    config = Config(dataset_path=str(folder), cache_dir=str(cache_dir), **{"code_views": 2, **flags})
    return dataset.prepare(data_settings(config), model or source("debug-stereo"), CPU)


def codes_of(data: dataset.Dataset) -> dict[str, list[np.ndarray]]:
    """The cached codes of each view, by the name of the file."""
    codes = data.train.codes
    return {
        name: [codes.crop(clip, view, 0, int(codes.frames[clip, view])) for view in range(2)]
        for clip, name in enumerate(data.train.names)
    }


def sides(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Left and right at the codec's rate, each by itself."""
    samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    chosen = (samples[:, 0], samples[:, min(1, samples.shape[1] - 1)])
    left, right = (np.ascontiguousarray(side) for side in chosen)
    return (left, right) if rate == RATE else tuple(soxr.resample(x, rate, RATE, quality="HQ") for x in (left, right))


@pytest.mark.numbers
def test_cached_codes_equal_a_pass_over_each_channel_of_each_file(tmp_path: Path) -> None:
    folder, codec = music(tmp_path / "data"), source("debug-stereo")
    data = prepare(folder, tmp_path / "cache")
    encodec = dataset.load_codec(codec)
    found = codes_of(data)
    assert set(found) == {"two.wav", "six.wav", "one.wav", "cancels.wav"} and data.train.codes.codebooks == 8
    differing = []
    for name, views in found.items():
        for offset, codes in zip((0, 320), views, strict=True):
            for side, samples in enumerate(sides(folder / name)):
                with torch.inference_mode():
                    values = torch.from_numpy(samples[offset:].copy())[None, None]
                    expected = encodec.encode(values).audio_codes[0, 0, :, : (len(samples) - offset) // 640].numpy()
                assert codes[side::2].shape == expected.shape
                differing.append((codes[side::2] != expected).any(axis=0))
    # A tie between two codes may be decided by rounding, and with it the later codebooks of that frame.
    assert np.concatenate(differing).mean() <= 0.005
    assert (found["two.wav"][0][::2] != found["two.wav"][0][1::2]).any()
    np.testing.assert_array_equal(found["one.wav"][0][::2], found["one.wav"][0][1::2])


def test_mono_and_stereo_share_a_cache_folder_and_neither_reads_the_codes_of_the_other(tmp_path: Path) -> None:
    folder = music(tmp_path / "data")
    alone = codes_of(prepare(folder, tmp_path / "alone", source("debug")))
    shared = tmp_path / "cache"
    in_both = in_stereo(source("debug"))  # of the same EnCodec, as Meta's stereo models are
    stereo = codes_of(prepare(folder, shared, in_both))
    mono = codes_of(prepare(folder, shared, source("debug")))
    again = codes_of(prepare(folder, shared, in_both))
    assert set(stereo) - set(mono) == {"cancels.wav"}
    identity = source("debug").codec_identity()
    # What was cached of mono models before there were stereo ones stays where it is looked for.
    assert {path.name for path in (shared / "codes").iterdir()} == {f"{identity}-2", f"{identity}-2-stereo"}
    assert {path.name for path in (tmp_path / "alone" / "codes").iterdir()} == {f"{identity}-2"}
    for name, views in mono.items():
        for one, other in zip(views, alone[name], strict=True):
            assert one.shape[0] == 4 and np.array_equal(one, other)
    for name, views in stereo.items():
        for one, other in zip(views, again[name], strict=True):
            assert one.shape[0] == 8 and np.array_equal(one, other)


def fates(folder: Path, facts: Path, channels: int) -> dict[str, tuple[str, str]]:
    found = manifest.look(
        folder, min_seconds=0.1, facts_folder=facts, show_progress=False, channels=channels,
        captions=CaptionSettings(no_label=True),
    )
    return {fate.path: (fate.fate, fate.detail) for fate in found.fates if fate.fate != "ignored"}


@pytest.mark.parametrize("first", [1, 2])
def test_a_sound_that_is_silent_in_mono_alone_is_used_in_stereo_whoever_looked_at_it_first(
    tmp_path: Path, first: int
) -> None:
    write_sound(tmp_path / "data/x.wav", noise(0.5)[:, None] * np.array([1, -1], np.float32))
    front = np.concatenate([np.zeros((4_000, 2), np.float32), noise(0.5)[:, None]], axis=1)
    write_sound(tmp_path / "data/y.wav", front)
    for channels in (first, 3 - first, first):
        of_x, of_y = fates(tmp_path / "data", tmp_path / "facts", channels).values()
        silent, other = (of_x, of_y) if channels == 1 else (of_y, of_x)
        assert silent[0] == "silent" and other[0] == "used"
        assert ("cancel each other in mono" if channels == 1 else "first two channels are silent") in silent[1]
    kept = json.loads((tmp_path / "facts" / audio_facts.FILE_NAME).read_text())["files"]
    assert {Path(path).name: set(said) - FIELDS for path, (_, _, said) in kept.items()} == {
        "x.wav": {"cancels"}, "y.wav": {"silent_front"},
    }  # fmt: skip


def test_facts_that_an_earlier_version_kept_serve_mono_as_they_are_and_stereo_reads_what_they_lack(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It kept the fault of mono as that of the file, and did not say of six channels whether the first two are heard.
    Of every other sound it kept what is kept today."""
    folder, facts = tmp_path / "data", tmp_path / "facts"
    write_sound(folder / "x.wav", noise(0.5)[:, None] * np.array([1, -1], np.float32)).with_suffix(".txt").unlink()
    write_clip(folder / "y.wav")
    behind = np.concatenate([np.zeros((4_000, 2), np.float32), noise(0.5)[:, None]], axis=1)
    for name, samples in (("behind", behind), ("six", noise(0.5, channels=6, seed=7))):
        write_sound(folder / f"{name}.wav", samples).with_suffix(".txt").unlink()
    fates(folder, facts, 1)
    path = facts / audio_facts.FILE_NAME
    kept = json.loads(path.read_text())
    for name in ("behind", "six"):
        del kept["files"][str(folder / f"{name}.wav")][2]["silent_front"]
    assert set(kept["files"][str(folder / "y.wav")][2]) == FIELDS
    kept["files"][str(folder / "x.wav")][2] = {"fate": "silent", "detail": CANCELS}
    path.write_text(json.dumps(kept))
    before = path.read_bytes()
    read: list[str] = []
    inspect = audio_facts.inspect

    def noted(sound: Path | bytes):
        read.append(os.path.basename(os.fspath(sound)))
        return inspect(sound)

    monkeypatch.setattr(audio_facts, "inspect", noted)
    used = dict.fromkeys(("behind.wav", "six.wav", "y.wav"), ("used", ""))
    assert fates(folder, facts, 1) == {"x.wav": ("silent", CANCELS), **used}
    assert read == [] and path.read_bytes() == before
    for _ in range(2):
        in_stereo_now = fates(folder, facts, 2)
        assert in_stereo_now["x.wav"] == in_stereo_now["six.wav"] == ("used", "")
        assert "first two channels are silent" in in_stereo_now["behind.wav"][1]
    assert sorted(read) == ["behind.wav", "six.wav", "x.wav"]
    assert fates(folder, facts, 1)["x.wav"] == ("silent", CANCELS)


def test_a_sound_read_in_parts_by_an_earlier_version_is_missing_only_to_a_stereo_model(tmp_path: Path) -> None:
    stand_ins = StandIns(tmp_path)
    reference = os.fsencode(stand_ins.folder / "x.wav")
    assert stand_ins.lacks(reference, 1) and stand_ins.lacks(reference, 2)
    stand_ins.keep(["x.wav"], {reference: AudioFault("silent", CANCELS)})
    assert not stand_ins.lacks(reference, 1) and stand_ins.lacks(reference, 2)
    stand_ins.keep(["x.wav"], {reference: AudioFault("silent", "never louder than -80 dBFS")})
    assert not stand_ins.lacks(reference, 2)


def test_a_stereo_run_says_how_many_clips_are_mono(tmp_path: Path) -> None:
    folder = music(tmp_path / "data")
    assert "1 of 4 clips are mono: both channels" in prepare(folder, tmp_path / "cache").describe()
    assert "are mono" not in prepare(folder, tmp_path / "cache", source("debug")).describe()
    for name in ("two", "six", "cancels"):
        (folder / f"{name}.wav").unlink()
        (folder / f"{name}.txt").unlink()
    found = prepare(folder, tmp_path / "cache")
    assert "note: all clips are mono" in found.describe()
    [detail] = [fate.detail for fate in found.fates if fate.path == "one.wav"]
    assert detail == "mono: both channels of a stereo model get the same sound"


def test_a_table_gives_the_stereo_codes_of_the_files_that_it_holds(tmp_path: Path) -> None:
    folder = music(tmp_path / "data")
    files = prepare(folder, tmp_path / "cache")
    paths = sorted(folder.glob("*.wav"))
    sounds = [{"bytes": path.read_bytes(), "path": path.name} for path in paths]
    table = pa.table({"audio": pa.array(sounds, AUDIO), "text": [path.stem for path in paths]})
    write_parquet(tmp_path / "rows/x.parquet", table, group_rows=1)
    rows = prepare(tmp_path / "rows", tmp_path / "other")
    assert (rows.digest, rows.mono) == (files.digest, files.mono) == (rows.digest, 1)
    for one, other in zip(codes_of(files).values(), codes_of(rows).values(), strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_prepared_folder_of_a_stereo_model_has_its_codes_and_is_refused_for_a_mono_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Made with --stereo 1, and with --model_id of a stereo model."""
    folder, output, model = music(tmp_path / "data"), tmp_path / "prepared", in_stereo(source("debug"))
    given = [str(folder), "--output", str(output), "--cache_dir", str(tmp_path / "cache"), "--code_views", "2"]
    assert prepare_dataset.main([*given, "--model_id", "debug", "--stereo", "1"]) == 0
    said = capsys.readouterr().out
    assert "--stereo 1 --model_id debug\n" in said and "1 of 4 clips are mono" in said
    files, data = prepare(folder, tmp_path / "cache", model), prepare(output, tmp_path / "none", model)
    assert (data.digest, data.mono) == (files.digest, 1) and data.train.codes.codebooks == 8
    for one, other in zip(codes_of(files).values(), codes_of(data).values(), strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))
    assert not (tmp_path / "none").exists()
    about = prepared.read_about(output)
    assert (about.channels, about.codebooks) == (2, 8)
    assert "8 codebooks of stereo sound, left and right in turns" in (output / "README.md").read_text()
    with pytest.raises(ConfigError, match=r"of stereo sound, 8 codebooks, .* trains a mono model of 4: .* --stereo"):
        prepare(output, tmp_path / "none", source("debug"))
    mono = tmp_path / "mono"
    assert prepare_dataset.main([*given[:2], str(mono), *given[3:], "--model_id", "debug"]) == 0
    assert "channels" not in json.loads((mono / "prepared.json").read_text())
    with pytest.raises(ConfigError, match=r"of mono sound, 4 codebooks, .* trains a stereo model of 8"):
        prepare(mono, tmp_path / "none", model)
    # Made again in stereo at the same place, by the same EnCodec: none of the mono codes is taken for it.
    expected = codes_of(files)
    shutil.rmtree(tmp_path / "cache" / "codes")
    assert prepare_dataset.main([*given[:2], str(mono), *given[3:], "--model_id", "debug", "--stereo", "1"]) == 0
    again = prepare(mono, tmp_path / "none", model)
    assert again.digest == files.digest and codes_of(again).keys() == expected.keys()
    for name, views in codes_of(again).items():
        assert all(np.array_equal(a, b) for a, b in zip(views, expected[name], strict=True))


def test_an_edited_number_of_channels_is_damage(tmp_path: Path) -> None:
    about = {"format": prepared.FORMAT, "version": prepared.VERSION, "channels": 3}
    (tmp_path / prepared.MARKER).write_text(json.dumps(about))
    with pytest.raises(DataError, match="damaged"):
        prepared.read_about(tmp_path)


def test_the_room_that_stereo_codes_need_is_twice_that_of_mono(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, str]] = []
    monkeypatch.setattr(cache, "check_room", lambda _, needed, what, **__: asked.append((needed, what)))
    write_sound(tmp_path / "data/two.wav", noise(1, RATE, 2))
    for name in ("debug", "debug-stereo"):
        prepare(tmp_path / "data", tmp_path / "cache", source(name), no_label=True)
    mono, stereo = (needed - cache.ROW_BYTES for needed, what in asked if "audio" in what)
    assert mono == 2 * 2 * 4 * 50 and stereo == 2 * mono
    assert "in stereo" in asked[1][1] and "in stereo" not in asked[0][1]


def test_a_check_of_the_music_is_that_of_the_model_which_it_is_for(tmp_path: Path) -> None:
    folder = music(tmp_path / "data")
    given = [str(folder), "--report", str(tmp_path / "report"), "--cache_dir", str(tmp_path / "cache")]
    assert check_dataset.main([*given, "--model_id", "debug", "--stereo", "1"]) == 0
    figures = json.loads((tmp_path / "report/dataset.json").read_text())
    assert figures["figures"]["clips"] == 4 and figures["figures"]["channels"] == {"2": 2, "1": 1, "6": 1}
    assert [one["first"] for one in figures["mend_first"] if one["key"] == "mono"] == [["one.wav"]]
    names = ("small", "debug", "stereo-medium", "debug-stereo-melody", "somebody/model")
    channels = [check_dataset.channels_of(Config(dataset_path="x", model_id=name)) for name in names]
    assert channels == [1, 1, 2, 2, 1]
    with pytest.raises(ConfigError, match="stereo already"):
        check_dataset.channels_of(Config(dataset_path="x", model_id="debug-stereo", stereo=True))
