"""scripts/score.py on a finished run: base and tuned model against clips that were not trained on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import pytest
import torch

from scripts.score import main
from tests.runs import few_clips
from tests.small_clap import write_small_clap
from trainer.evaluation.generation import decode
from trainer.evaluation.samples import write_sound
from trainer.model.source import load_codec
from trainer.wiring.finished_run import base_of_run, config_of_run, data_of_run

OTHERS = ("metal_chaosland", "metal_war_of_freedom", "rock_feelings_guitar", "arcade_meadow")
SECONDS = 1.0


@pytest.fixture(scope="module")
def folder(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of a finished run with its clips and cache, and other/, clips that it was not trained on."""
    copy = tmp_path_factory.mktemp("scored") / "run"
    shutil.copytree(finished_run.parent, copy)
    few_clips(copy / "other", OTHERS)
    return copy


@pytest.fixture
def here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # read from the environment at import
    return folder


def score(*flags: str, expect: int = 0) -> dict[str, Any]:
    assert main(["models", "--seconds", str(SECONDS), *flags]) == expect
    return json.loads(Path("models/score.json").read_text()) if expect == 0 else {}


def stamps() -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in Path("models/score_sounds").rglob("*.flac")}


@pytest.mark.full
def test_a_run_is_scored_and_a_second_call_says_the_same_and_makes_only_what_is_missing(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--reference", "other", "--count", "3")
    first = score(*flags)
    told = capsys.readouterr()
    assert first["format"] == "musicgen-trainer score" and first["version"] == 1
    assert (first["clips"], first["generated"], first["few"], first["seconds"]) == (4, 3, True, SECONDS)
    assert list(first["embeddings"]) == ["encodec"] and first["not_run"][0].startswith("clap: laion/clap-htsat")
    for found in first["embeddings"]["encodec"]["distances"].values():
        for value, low, high in (found[name] for name in ("base", "tuned", "difference")):
            assert low <= value <= high
    assert "4 held-out clips" in told.out and "warning: 3 clips are few" in told.out and "not run: clap" in told.out
    assert Path("models/report.html").is_file()
    made = stamps()
    assert len(made) == 6
    lost = Path(sorted(made)[-1])
    sound = lost.read_bytes()
    lost.unlink()
    assert score(*flags) == first  # what a call makes that was stopped behind the last sound but one
    assert lost.read_bytes() == sound and {**stamps(), str(lost): made[str(lost)]} == made
    score(*flags, "--guidance", "1")
    assert set(stamps()) == set(made) and lost.read_bytes() != sound


def test_sounds_of_the_clips_themselves_are_better_than_noise_and_the_same_sounds_are_equal(here: Path) -> None:
    config = config_of_run(Path("models"))
    source = base_of_run(config)
    data = data_of_run(Path("models"), config, source, torch.device("cpu"))
    codec, draws = load_codec(source), np.random.default_rng(0)
    for clip in range(data.clips):
        for start in (0, 2, 4):
            codes_KT = torch.from_numpy(data.train.codes.crop(clip, 0, start, 50).astype("int64"))
            sound = decode(codec, codes_KT)
            name = f"{clip}_{start}.flac"
            Path("played").mkdir(exist_ok=True)
            Path("noise").mkdir(exist_ok=True)
            write_sound(Path("played") / name, sound, source.sample_rate_hz)
            loud = np.float32(10 * np.abs(sound).max()) * draws.standard_normal(len(sound)).astype(np.float32)
            write_sound(Path("noise") / name, loud, source.sample_rate_hz)
    sounds = ("--reference", "data", "--clap", "none")
    found = score(*sounds, "--base_sounds", "noise", "--tuned_sounds", "played")
    assert found["not_run"] == ["clap: left out by --clap none"] and found["generated"] == 9
    distances = found["embeddings"]["encodec"]["distances"]
    assert distances["frechet"]["verdict"] == "better" and distances["kad"]["verdict"] != "worse"
    assert distances["kad"]["difference"][0] < 0  # of three clips, its interval may hold zero
    equal = score(*sounds, "--base_sounds", "played", "--tuned_sounds", "played")
    for one in equal["embeddings"]["encodec"]["distances"].values():
        assert one["difference"] == [0, 0, 0] and one["verdict"] is None


@pytest.mark.full
def test_clap_adds_distances_and_a_likeness_to_the_caption(
    here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clap = str(write_small_clap(tmp_path))
    found = score("--reference", "other", "--count", "3", "--clap", clap)
    assert found["not_run"] == [] and set(found["embeddings"]) == {"encodec", "clap"}
    of_clap = found["embeddings"]["clap"]
    assert set(of_clap) == {"distances", "model", "text"} and set(of_clap["distances"]) == {"kad", "frechet"}
    assert all(-1 <= of_clap["text"][name][0] <= 1 for name in ("base", "tuned"))
    assert "CLAP, likeness to the caption" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--clap", "none"), "RUN models held no clips out"),
        (("--reference", "other", "--base_sounds", "other"), "belong together"),
        (
            ("--reference", "other", "--base_sounds", "other", "--tuned_sounds", "other", "--count", "5"),
            "--count has no effect",
        ),
        (
            ("--clap", "none", "--reference", "other", "--base_sounds", "other", "--tuned_sounds", "data"),
            "has 4 sounds",
        ),
        (("--reference", "other", "--count", "2"), "--count 2 cannot be used"),
        (("--reference", "other", "--referense", "x"), "--referense is no flag. Did you mean --reference"),
    ],
)
def test_what_cannot_be_scored_is_refused_with_what_would_work(
    here: Path, capsys: pytest.CaptureFixture[str], flags: Sequence[str], says: str
) -> None:
    score(*flags, expect=2)
    assert says in capsys.readouterr().err


def test_a_clap_folder_that_is_not_there_ends_the_program_and_is_named(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    score("--reference", "other", "--clap", "./no_such_clap", expect=1)
    assert "--clap ./no_such_clap cannot be loaded" in capsys.readouterr().err
