"""Silence left out and loudness made equal: as if the files had been cut and amplified beforehand."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pyloudnorm
import pytest
import soundfile
import torch

from tests.audio_files import noise
from trainer.data import audio, dataset
from trainer.data.cache import code_store
from trainer.data.fates import Fate
from trainer.data.manifest import scan
from trainer.data.treatment import Treatment
from trainer.flags.config import Config
from trainer.model.source import open_model
from trainer.wiring import data_settings, identity_of

RATE = 44_100
LEAD, TAIL = 30_001, 17_003  # frames of silence


def padded(channels: int = 2, seed: int = 0) -> np.ndarray:
    """1.5 s of noise with silence at both ends, (n, channels) float32; the silence is noise of -70 dBFS."""
    quiet = np.random.default_rng(seed).uniform(-3e-4, 3e-4, (LEAD + TAIL + RATE * 3 // 2, channels)).astype(np.float32)
    sound = noise(1.5, RATE, channels, seed).reshape(-1, channels)
    sound[0], sound[-1] = 0.01, -0.01  # which are not silence
    quiet[LEAD : LEAD + len(sound)] = sound
    return quiet


def write(folder: Path, sounds: dict[str, np.ndarray]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, sound in sounds.items():
        soundfile.write(folder / f"{name}.wav", sound, RATE, subtype="FLOAT")
        (folder / f"{name}.txt").write_text(name)
    return folder


def prepared(folder: Path, **flags) -> tuple[dataset.Dataset, dict[str, object]]:
    config = Config(dataset_path=str(folder), cache_dir=str(folder.parent / "cache"), code_views=2, **flags)
    source = open_model("debug")
    data = dataset.prepare(data_settings(config), source, torch.device("cpu"))
    return data, identity_of(config, source, data)


def fates(folder: Path, min_seconds: float = 0.5, **treatment) -> dict[str, Fate]:
    """The fate of each file, without encoding any."""
    found = scan(
        folder, min_seconds=min_seconds, facts_folder=folder.parent / "facts",
        treatment=Treatment(**treatment),
    )  # fmt: skip
    return {fate.path: fate for fate in found.fates}


def codes_by_caption(data: dataset.Dataset) -> dict[str, list[np.ndarray]]:
    codes = data.train.codes
    return {
        str(caption): [codes.crop(clip, view, 0, int(codes.frames[clip, view])) for view in range(2)]
        for clip, caption in enumerate(data.train.captions)
    }


def audio_loudness(sound: np.ndarray) -> float:
    return pyloudnorm.Meter(RATE, filter_class="DeMan").integrated_loudness(sound.astype(np.float64))


@pytest.mark.parametrize(("trim", "lufs"), [(True, None), (False, -30.0), (True, -30.0)])
def test_codes_equal_those_of_a_file_that_was_cut_and_amplified_beforehand(tmp_path, trim: bool, lufs: float | None):
    sounds = {"one": padded(), "two": padded(channels=1, seed=1)}
    flags = {"trim_silence": trim, "loudness": lufs}
    treated, _ = prepared(write(tmp_path / "data", sounds), **flags)
    rows = scan(
        tmp_path / "data", min_seconds=0.5, facts_folder=tmp_path / "facts",
        treatment=Treatment(trim_silence=trim, loudness_lufs=lufs),
    ).columns  # fmt: skip
    gains = {caption: np.float32(gain) for caption, gain in zip(rows["caption"], rows["gain"], strict=True)}
    hand_made = {name: (sound[LEAD:-TAIL] if trim else sound) * gains[name] for name, sound in sounds.items()}
    if lufs is not None:
        for name, sound in sounds.items():
            assert audio_loudness(sound * gains[name]) == pytest.approx(lufs, abs=0.1)
    expected, _ = prepared(write(tmp_path / "by_hand/data", hand_made))
    found, wanted = codes_by_caption(treated), codes_by_caption(expected)
    for name in sounds:
        for one, other in zip(found[name], wanted[name], strict=True):
            assert np.array_equal(one, other)
    assert treated.seconds == expected.seconds == sum(len(sound) for sound in hand_made.values()) / RATE


@pytest.mark.parametrize("block_seconds", [0.01, 0.7, 10.0])
def test_the_excerpt_does_not_depend_on_the_blocks(tmp_path, block_seconds: float):
    path = write(tmp_path, {"one": padded()}) / "one.wav"
    excerpt, _ = Treatment(trim_silence=True).excerpt_of(audio.inspect(path))
    joined = np.concatenate(list(audio.stream(path, RATE, block_seconds, excerpt)))
    assert np.array_equal(joined, padded()[LEAD:-TAIL].mean(axis=1, dtype=np.float32))


def test_a_gain_stops_where_the_peak_is_at_full_scale_and_the_report_says_so(tmp_path):
    loud = noise(1, RATE, 2)
    loud[100] = 0.9
    folder = write(tmp_path / "data", {"peak": loud, "beyond": loud * 3, "reaches": noise(1, RATE, 2, seed=5)})
    found = fates(folder, loudness_lufs=-6)
    for name, sound in (("peak", loud), ("beyond", loud * 3)):
        excerpt, remark = Treatment(loudness_lufs=-6).excerpt_of(audio.inspect(folder / f"{name}.wav"))
        loudest = np.abs(sound * np.float32(excerpt.gain)).max()
        assert 1 - 1e-6 < loudest <= 1
        reached = audio_loudness(sound * np.float32(excerpt.gain))
        said = re.fullmatch(r"brought to (\S+) LUFS, not -6: its peak is then at full scale", remark)
        assert said and float(said[1]) == pytest.approx(reached, abs=0.1) and remark in found[f"{name}.wav"].detail
    assert fates(folder, loudness_lufs=-25)["reaches.wav"].detail == ""


def test_a_file_without_a_loudness_stays_as_it_is_and_the_report_says_so(tmp_path):
    folder = write(tmp_path / "data", {"quiet": noise(1, RATE, seed=2) * 2e-3})
    data, _ = prepared(folder, loudness=-14)
    plain, _ = prepared(folder)
    assert all(map(np.array_equal, codes_by_caption(data)["quiet"], codes_by_caption(plain)["quiet"]))
    assert "used as loud as it is" in data.fates[0].detail


def test_min_seconds_holds_for_what_is_left_without_silence(tmp_path):
    dim = noise(3, RATE).clip(-0.4, 0.4) * 2e-3  # all of it below -60 dBFS
    folder = write(tmp_path / "data", {"long": padded(), "other": noise(3, RATE), "dim": dim})
    found = fates(folder, 2, trim_silence=True)
    assert found["other.wav"].fate == "used" and found["dim.wav"].fate == "too short"
    assert found["long.wav"].fate == "too short" and "1.50 s of 2.57 s are left" in found["long.wav"].detail
    found = fates(folder, 1, trim_silence=True)
    assert "0.68 s at the start, 0.39 s at the end" in found["long.wav"].detail
    assert fates(folder, 2)["long.wav"].detail == ""


def test_treated_codes_are_kept_apart_and_untreated_ones_where_they_were(tmp_path):
    treatments = [(False, None), (True, None), (False, -14.0), (True, -14.5)]
    folders = [
        code_store(tmp_path, "codec", 2, Treatment(trim_silence=trim, loudness_lufs=lufs)).folder
        for trim, lufs in treatments
    ]
    names = ["codec-2", "codec-2-trim", "codec-2-14LUFS", "codec-2-trim-14.5LUFS"]
    assert folders == [tmp_path / "codes" / name for name in names]
    assert code_store(tmp_path, "codec", 2).folder == folders[0]


def test_validation_data_is_treated_too(tmp_path):
    folder = write(tmp_path / "data", {"one": padded()})
    write(tmp_path / "held_out", {"two": padded(seed=3)})
    data, _ = prepared(folder, trim_silence=True, validation=str(tmp_path / "held_out"))
    plain, _ = prepared(folder, validation=str(tmp_path / "held_out"))
    assert data.validation and plain.validation
    lost = (LEAD + TAIL) * 32_000 / RATE / 640
    assert plain.validation.codes.frames[0, 0] - data.validation.codes.frames[0, 0] == pytest.approx(lost, abs=1)


def test_what_changes_samples_or_crops_is_part_of_the_identity_when_on_and_absent_when_off(tmp_path):
    data, off = prepared(write(tmp_path / "data", {"one": padded()}))
    # The entries that checkpoints have had since before these flags existed.
    assert set(off) == {
        "dataset", "codec", "text encoder", "decoder", "--seed", "--segment_seconds", "--code_views",
        "share of captions dropped (--use_cfg, --cfg_rate)",
    }  # fmt: skip
    for name, value in (("trim_silence", True), ("loudness", -14.0), ("sample_by", "duration")):
        config = Config(dataset_path=str(tmp_path / "data"), code_views=2, **{name: value})
        assert identity_of(config, open_model("debug"), data) == {**off, f"--{name}": value}
