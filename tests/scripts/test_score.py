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
import soundfile
import torch

from scripts.score import main
from tests.runs import EXAMPLES, few_clips
from tests.small_clap import write_small_clap
from trainer.errors import DataError
from trainer.evaluation.embeddings import sound_of_file
from trainer.evaluation.samples import write_sound
from trainer.exports.shared_card import figures_of
from trainer.model.source import load_codec, open_model
from trainer.report.held_out_score import score_of

OTHERS = ("metal_chaosland", "metal_war_of_freedom", "rock_feelings_guitar", "arcade_meadow")
SECONDS = 1.0


@pytest.fixture(scope="module")
def folder(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of a finished run with its clips and cache, and other/, 2 s of each of four clips that it was not trained
    on."""
    copy = tmp_path_factory.mktemp("scored") / "run"
    shutil.copytree(finished_run.parent, copy)
    for path in few_clips(copy / "other", OTHERS).glob("*.wav"):
        sound, rate_hz = soundfile.read(path, dtype="int16")
        soundfile.write(path, sound[: 2 * rate_hz], rate_hz)
    return copy


@pytest.fixture
def here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # read from the environment at import
    return folder


def score(*flags: str, expect: int = 0) -> dict[str, Any]:
    assert main(["models", "--seconds", str(SECONDS), *flags]) == expect
    if expect != 0:
        return {}
    written = json.loads(Path("models/score.json").read_text())
    assert not figures_of(written, None).unread and score_of(written) is not None  # the card's reader and the page's
    return written


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


def test_what_was_trained_on_is_no_reference_under_any_name(here: Path) -> None:
    """other/ and a renamed training clip beside it: three short sounds are generated, and judged against four clips."""
    shutil.copytree("other", "mixed", dirs_exist_ok=True)
    for suffix in (".wav", ".txt"):
        shutil.copy(f"data/metal_madness{suffix}", f"mixed/renamed{suffix}")
    found = score("--reference", "mixed", "--count", "3", "--clap", "none")
    assert (found["clips"], found["generated"]) == (4, 3)
    assert found["not_run"][1] == "1 of the held-out clips, whose music is trained on (renamed.wav)"
    assert not [path for path in stamps() if "aggressive" in path]  # its caption is no prompt


@pytest.mark.full
def test_without_the_dataset_it_is_said_that_nobody_knows_what_was_trained_on(here: Path) -> None:
    Path("data").rename("away")
    try:
        found = score("--reference", "other", "--count", "3", "--clap", "none")
    finally:
        Path("away").rename("data")
    assert found["clips"] == 4
    assert found["not_run"][1].startswith("whether held-out clips are trained on too: --dataset")


@pytest.mark.full
def test_music_is_better_than_noise_and_the_same_sounds_are_equal(here: Path) -> None:
    """Other seconds of the held-out clips, as the codec makes them of its codes, and noise as loud."""
    source = open_model("debug")
    codec, draws = load_codec(source), np.random.default_rng(0)
    for name in OTHERS:
        for start in (1, 3):
            sound = sound_of_file(EXAMPLES / f"{name}.wav", source.sample_rate_hz, 1, start + 1.0)[-32_000:]
            Path("played").mkdir(exist_ok=True)
            Path("noise").mkdir(exist_ok=True)
            sound = codec(torch.from_numpy(sound)[None, None]).audio_values[0, 0].detach().numpy()
            write_sound(Path("played") / f"{name}_{start}.flac", sound, source.sample_rate_hz)
            loud = np.float32(10 * np.abs(sound).max()) * draws.standard_normal(len(sound)).astype(np.float32)
            write_sound(Path("noise") / f"{name}_{start}.flac", loud, source.sample_rate_hz)
    sounds = ("--reference", "other", "--clap", "none")
    found = score(*sounds, "--base_sounds", "noise", "--tuned_sounds", "played")
    assert found["not_run"] == ["clap: left out by --clap none"] and found["generated"] == 8
    distances = found["embeddings"]["encodec"]["distances"]
    assert distances["frechet"]["verdict"] == "better" and distances["kad"]["verdict"] != "worse"
    assert distances["kad"]["difference"][0] < 0  # of four clips, its interval may hold zero
    equal = score(*sounds, "--base_sounds", "played", "--tuned_sounds", "played")
    for one in equal["embeddings"]["encodec"]["distances"].values():
        assert one["difference"] == [0, 0, 0] and one["verdict"] is None


@pytest.mark.full
def test_a_sound_that_is_shorter_than_a_frame_is_refused_and_named(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("short").mkdir()
    for number in range(3):
        write_sound(Path("short") / f"{number}.flac", np.full(639, 0.1, np.float32), 32_000)
    flags = ("--clap", "none", "--base_sounds", "short", "--tuned_sounds", "short")
    score("--reference", "other", *flags, expect=DataError.exit_code)
    assert "short/0.flac cannot be judged: its 639 samples" in capsys.readouterr().err


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
