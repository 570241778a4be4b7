"""scripts/caption.py: captions are drafted beside sounds that have none, and nothing that a person wrote is touched."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
from captioning.tempo_and_key import RATE_HZ

from scripts.caption import main
from tests.audio_files import write_clip
from tests.scripts.test_tempo_and_key import loop
from tests.small_clap import write_small_clap

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of sounds: a loop of 120 bpm in E minor, a tagged one, one with a caption, and one that is damaged."""
    root = tmp_path_factory.mktemp("music")
    (root / "Dub Techno").mkdir()
    soundfile.write(root / "Dub Techno" / "02_deep-river.wav", loop(120, 4, True, 20), RATE_HZ)
    with soundfile.SoundFile(root / "x1.wav", "w", 8000, 1, format="WAV") as file:
        file.title, file.genre = "Slow River", "Folk"  # type: ignore[attr-defined]
        file.write(np.sin(np.arange(8000)))
    soundfile.write(root / "known.wav", np.sin(np.arange(8000)), 8000)
    (root / "known.txt").write_text("my own words")
    soundfile.write(root / "Pad_95bpm_Am.wav", np.sin(np.arange(8000)), 8000)
    soundfile.write(root / "123.wav", np.sin(np.arange(8000)), 8000)
    (root / "broken.wav").write_bytes((root / "known.wav").read_bytes()[:60])
    return root


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "music"))


DRAFTS = {
    "Dub Techno/02_deep-river.caption.txt": "Dub Techno, deep river, 120 bpm, E minor\n",
    "x1.caption.txt": "Folk, Slow River\n",
    "Pad_95bpm_Am.caption.txt": "Pad, 95 bpm, A minor\n",
}


def texts(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*.txt")}


def test_what_is_known_of_a_file_is_drafted_with_its_sources(folder: Path, capsys: pytest.CaptureFixture) -> None:
    assert main([str(folder)]) == 0
    said = capsys.readouterr().out
    assert texts(folder) == DRAFTED_AND_OWN
    assert 'folder "Dub Techno" (folder)' in said and 'bpm "120" (signal, confidence ' in said
    assert 'genre "Folk" (tag)' in said and 'name "Slow River" (title tag)' in said
    assert 'key "A minor" (file name)' in said and "too short to hear" in said
    assert "broken.wav\n    skipped: " in said and "nothing is known of it" in said
    assert "3 drafted, 1 with a caption already, 1 of which nothing is known, 1 not readable." in said
    assert "mend them before you train" in said


DRAFTED_AND_OWN = DRAFTS | {"known.txt": "my own words"}


def test_a_dry_run_shows_the_same_and_writes_nothing(folder: Path, capsys: pytest.CaptureFixture) -> None:
    before = sorted(folder.rglob("*"))
    assert main([str(folder), "--dry_run"]) == 0
    shown = capsys.readouterr().out
    assert sorted(folder.rglob("*")) == before and "Nothing was written" in shown
    assert main([str(folder)]) == 0
    assert capsys.readouterr().out.split("\n\n")[0] == shown.split("\n\n")[0]


def test_only_unchanged_drafts_are_overwritten_and_only_when_asked(folder: Path) -> None:
    assert main([str(folder)]) == 0
    mended = folder / "x1.caption.txt"
    mended.write_text("slow folk with fiddle\n")
    other = ["--template", "{genre}, {folder}, {name}"]
    assert main([str(folder), *other]) == 0
    expected = DRAFTED_AND_OWN | {"x1.caption.txt": "slow folk with fiddle\n"}
    assert texts(folder) == expected, "without --overwrite nothing is"
    assert main([str(folder), *other, "--overwrite"]) == 0
    deep = {"Dub Techno/02_deep-river.caption.txt": "Dub Techno, deep river\n", "Pad_95bpm_Am.caption.txt": "Pad\n"}
    assert texts(folder) == expected | deep
    (folder / ".caption_drafts.json").write_text("[1, damaged")
    assert main([str(folder), "--overwrite"]) == 0
    assert texts(folder) == expected | deep, "without a record no file is taken for a draft"


def test_what_cannot_be_done_is_refused_with_its_exit_code(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main([str(folder), "--template", "{gendre}"]) == 2
    assert main([str(tmp_path / "missing")]) == 3
    assert main([str(folder), "--clap", str(tmp_path / "no model")]) == 1
    said = capsys.readouterr().err
    assert "{gendre}" in said and "missing cannot be opened" in said and "laion/clap-htsat-unfused" in said
    assert texts(folder) == {"known.txt": "my own words"}


def test_a_sound_with_nothing_but_lyrics_beside_it_gets_a_draft(tmp_path: Path) -> None:
    write_clip(tmp_path / "slow river.wav").with_suffix(".txt").write_text("[Verse]\nla la\n[Chorus]\nlo lo\n")
    assert main([str(tmp_path)]) == 0
    assert texts(tmp_path)["slow river.caption.txt"].strip() == "slow river"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_is_said(folder: Path, capsys: pytest.CaptureFixture) -> None:
    folder.chmod(0o555)
    try:
        assert main([str(folder)]) == 4
    finally:
        folder.chmod(0o755)
    assert "cannot be written" in capsys.readouterr().err


def test_no_more_than_two_minutes_of_a_long_file_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "mix.wav"
    with soundfile.SoundFile(path, "w", 8000, 1, format="WAV", subtype="PCM_U8") as file:
        for _ in range(60):
            file.write(np.sin(np.arange(8000 * 60) / 3))
    from captioning.draft import start_of

    frames = 0
    read = soundfile.SoundFile.read

    def counted(self: soundfile.SoundFile, *arguments: object, **named: object) -> np.ndarray:
        nonlocal frames
        block = read(self, *arguments, **named)
        frames += len(block)
        return block

    monkeypatch.setattr(soundfile.SoundFile, "read", counted)
    assert len(start_of(path, RATE_HZ, 120.0)) == 120 * RATE_HZ
    assert frames <= 140 * 8000


@pytest.mark.full
def test_the_script_runs_by_itself_from_any_folder(folder: Path, tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}  # the trainer, as an installation gives it; not scripts/
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "caption.py"), str(folder)],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert texts(folder) == DRAFTED_AND_OWN


@pytest.fixture(scope="module")
def clap(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_clap(tmp_path_factory.mktemp("clap"))


def test_clap_s_words_are_those_whose_vectors_are_nearest(clap: Path, made: Path) -> None:
    """Against transformers' own logits, with every sentence and sound in one call."""
    import torch
    from captioning.draft import start_of
    from captioning.zero_shot import CHOICES, LEAST_SHARE, ZeroShot
    from transformers import ClapModel, ClapProcessor

    path = made / "Dub Techno" / "02_deep-river.wav"
    parts = {part.field: part for part in ZeroShot(str(clap)).parts_of(path)}
    assert set(parts) == set(CHOICES)
    model, processor = ClapModel.from_pretrained(clap).eval(), ClapProcessor.from_pretrained(clap)
    sound = start_of(path, 48_000, 60.0)
    windows = [sound[start : start + 480_000] for start in (0, (len(sound) - 480_000) // 2, len(sound) - 480_000)]
    for field, (sentence, most, choices) in CHOICES.items():
        words = processor.tokenizer([sentence.format(c) for c in choices], padding=True, return_tensors="pt")
        heard = processor.feature_extractor(windows, sampling_rate=48_000, return_tensors="pt")
        with torch.inference_mode():
            logits = model(input_ids=words.input_ids, attention_mask=words.attention_mask, **heard).logits_per_audio
        shares = logits.mean(dim=0).softmax(dim=0)
        best = [choices[i] for i in shares.argsort(descending=True)[:most].tolist() if shares[i] >= LEAST_SHARE]
        assert (parts[field].text if field in parts else "") == ", ".join(best)


def test_clap_fills_what_tags_leave_open(clap: Path, folder: Path, capsys: pytest.CaptureFixture) -> None:
    assert main([str(folder), "--clap", str(clap), "--least_confidence", "0", "--dry_run"]) == 0
    said = capsys.readouterr().out
    assert 'genre "Folk" (tag)' in said, "what is written counts more than what is heard"
    assert "(CLAP, confidence " in said
