"""The notes of a sound against audiocraft 1.3.0's ChromaExtractor, which its melody models were trained with."""

from __future__ import annotations

from tests.interop.audiocraft_modules import require_audiocraft

require_audiocraft()

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from audiocraft.modules import chroma as audiocraft_chroma

from tests import chroma_sounds
from tests.interop.melody_stand_ins import stand_ins
from trainer.data import chroma

ALL = {**chroma_sounds.made(), **chroma_sounds.examples()}
RECORDED = Path(__file__).parents[1] / "data" / "recorded_chroma.json"


@pytest.fixture
def extractor():
    with stand_ins():
        return audiocraft_chroma.ChromaExtractor(sample_rate=32_000, n_chroma=12, radix2_exp=14, argmax=True)


def found_by(extractor, sound) -> str:
    return chroma_sounds.as_text(extractor(torch.from_numpy(sound)[None, None])[0].argmax(-1).numpy())


def test_every_note_of_whole_sounds_is_the_one_that_audiocraft_finds(extractor):
    for name, sound in ALL.items():
        assert chroma_sounds.as_text(chroma.notes_of(sound)) == found_by(extractor, sound), name


def test_audiocraft_with_stand_ins_finds_the_notes_recorded_with_torchaudio_and_librosa(extractor):
    recorded = json.loads(RECORDED.read_text())["notes"]
    assert {name: found_by(extractor, sound) for name, sound in ALL.items()} == recorded


@pytest.mark.full
def test_every_note_is_the_one_that_audiocraft_finds_with_torchaudio_and_librosa(tmp_path):
    python = made_environment(tmp_path / "venv")
    chroma_sounds.save(tmp_path / "sounds.npz", ALL)
    module = importlib.util.find_spec("audiocraft.modules.chroma").origin
    script = Path(__file__).with_name("real_chroma.py")
    subprocess.run([python, script, module, tmp_path / "sounds.npz", tmp_path / "notes.json"], check=True)
    said = json.loads((tmp_path / "notes.json").read_text())
    assert said["notes"] == {name: chroma_sounds.as_text(chroma.notes_of(sound)) for name, sound in ALL.items()}
    assert said["notes"] == json.loads(RECORDED.read_text())["notes"]


def made_environment(folder: Path) -> Path:
    """The Python of a new environment with torchaudio and librosa, beside the torch that runs this; skips where they
    cannot be fetched."""
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python = folder / "bin/python"
    for packages in (["--no-deps", "torchaudio==2.11.0"], ["librosa==0.11.0"]):
        install = [python, "-m", "pip", "install", "--quiet", "--no-cache-dir", "--disable-pip-version-check"]
        done = subprocess.run([*install, *packages], capture_output=True, text=True)
        if done.returncode != 0:
            pytest.skip(f"NOTHING SHOWS the notes that torchaudio and librosa give: {done.stderr[-500:]}")
    site = next(folder.glob("lib/python*/site-packages"))
    (site / "torch_of_the_tests.pth").write_text(str(Path(torch.__file__).parents[1]))
    # Built for CUDA, which this torch may lack. The spectrogram is torchaudio's Python, and needs none of it.
    for library in (site / "torchaudio/lib").glob("*.so"):
        library.unlink()
    return python
