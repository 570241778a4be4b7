"""scripts/demo_model.py: what it makes of the example clips, what transformers makes of that, and what it refuses."""

from __future__ import annotations

import shutil
from pathlib import Path

import demo_model
import numpy as np
import pytest
import soundfile
import torch
from transformers import AutoProcessor, EncodecFeatureExtractor, MusicgenForConditionalGeneration

from trainer.data import audio
from trainer.errors import EXIT_DATA, EXIT_DONE, EXIT_STORAGE, EXIT_USAGE
from trainer.evaluation.recall import snr_db
from trainer.model.fitted_codebooks import CODES, fit_codebooks
from trainer.model.passing_codec import latents_of, passing_codec
from trainer.model.source import load_codec, open_model

pytestmark = pytest.mark.numbers
EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
RATE = 32_000


def make(dataset: Path, output: Path, *flags: str) -> int:
    return demo_model.main(["--dataset", str(dataset), "--output", str(output), *flags])


def tone(path: Path, seconds: float, peak: float = 0.5, subtype: str = "PCM_16") -> Path:
    """A clip of noise and a gliding tone in a folder of its own; the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    time = np.arange(round(seconds * 8_000)) / 8_000
    noise = np.random.default_rng(0).uniform(-0.1, 0.1, len(time))
    sound = np.sin(2 * np.pi * (200 + 50 * time) * time) + noise
    soundfile.write(path, peak * sound / np.abs(sound).max(), 8_000, subtype)
    return path.parent


@pytest.mark.full
def test_the_codebooks_fitted_to_the_examples_give_every_clip_back() -> None:
    clips = demo_model.read_clips(EXAMPLES)
    assert len(clips) == 10 and {Path(clip.name).suffix for clip in clips} == {".wav", ".flac", ".ogg", ".mp3"}
    quantizer, latents = passing_codec(), [latents_of(clip.samples) for clip in clips]
    fit_codebooks(quantizer, torch.cat(latents), seed=0)
    for clip, latents_TD in zip(clips, latents, strict=True):
        codes = quantizer.quantizer.encode(latents_TD.T[None])
        assert codes.min() >= 0 and codes.max() < CODES
        made = quantizer.quantizer.decode(codes)[0].T.reshape(-1)
        # What is left is the rounding of latents: at most 2**-22 (-132 dB) a sample, of clips of about -20 dB.
        assert snr_db(clip.samples.numpy(), made.numpy()) > 100, clip.name


def test_transformers_loads_the_folder_and_its_codec_gives_the_clip_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset, folder = tone(tmp_path / "music" / "a.wav", 1.01), tmp_path / "model"
    folder.mkdir()
    (folder / "mine.txt").write_text("kept")
    assert make(dataset, folder) == EXIT_DONE
    said = capsys.readouterr().out.splitlines()
    assert any("fitted to 1 clip, 50 frames" in line for line in said) and float(said[-1].split()[-1]) > 100
    assert (folder / "mine.txt").read_text() == "kept" and "no other music" in (folder / "README.md").read_text()
    model = MusicgenForConditionalGeneration.from_pretrained(folder).eval()
    assert isinstance(AutoProcessor.from_pretrained(folder).feature_extractor, EncodecFeatureExtractor)
    samples = np.concatenate(list(audio.stream(dataset / "a.wav", RATE)))[: 50 * 640]
    codecs, codes = (model.audio_encoder, load_codec(open_model(str(folder)))), []
    for codec in codecs:  # transformers' loading of it, and the project's
        with torch.inference_mode():
            codes.append(codec.encode(torch.from_numpy(samples)[None, None]).audio_codes)
            made = codec.decode(codes[-1], [None]).audio_values[0, 0]
        assert snr_db(samples, made.numpy()) > 100
    assert all(codec.config.to_dict()["fitted_clips"] == 1 for codec in codecs)
    assert torch.equal(*codes) and codes[0].shape == (1, 1, 4, 50)


@pytest.mark.full
@pytest.mark.timeout(600)
def test_the_model_of_the_examples_is_the_same_whatever_the_threads_and_knows_all_of_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = torch.get_num_threads()
    files = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            assert make(EXAMPLES, tmp_path / str(threads)) == EXIT_DONE
            files.append((tmp_path / str(threads) / "model.safetensors").read_bytes())
            ratios = [float(line.split()[-1]) for line in capsys.readouterr().out.splitlines()[-10:]]
            assert min(ratios) > 100
    finally:
        torch.set_num_threads(before)
    assert files[0] == files[1]


def test_what_cannot_be_fitted_is_refused_in_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    shutil.copy(EXAMPLES / "README.md", tmp_path / "empty")
    # Its peak between the samples of 8 kHz is 5.2.
    loud = tone(tmp_path / "loud" / "a.wav", 1.0, peak=5.0, subtype="FLOAT")
    long = tone(tmp_path / "long" / "a.wav", 82.0)
    short = tone(tmp_path / "short" / "a.wav", 0.015)
    (tmp_path / "file").write_text("")
    good = tone(tmp_path / "good" / "a.wav", 0.1)
    cases = [
        ((tmp_path / "absent", "model"), EXIT_DATA, "absent"),
        ((tmp_path / "empty", "model"), EXIT_DATA, "no clip that can be used"),
        ((short, "model"), EXIT_DATA, "no clip that can be used"),
        ((loud, "model"), EXIT_DATA, "a.wav: its peak is 5.2 of full scale: turn it down below 4"),
        ((long, "model"), EXIT_DATA, "82.0 s of music, and the codebooks fit 4,094 frames of 20 ms, 81.9 s"),
        ((good, "good"), EXIT_USAGE, "is the folder of the clips"),
        ((good, "model", "--seed", "-1"), EXIT_USAGE, "--seed -1 is below 0"),
        ((good, "file"), EXIT_STORAGE, "could not be written"),
    ]
    for (dataset, output, *flags), code, message in cases:
        assert make(Path(dataset), tmp_path / output, *flags) == code, message
        assert message in capsys.readouterr().err
        assert not (tmp_path / "model").exists()
