"""The whole road learns: from sound files to a loaded export that plays its clips back, code by code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import pytest
import soundfile
import torch
from torch import Tensor
from transformers import AutoTokenizer, MusicgenForConditionalGeneration

from scripts import recall
from trainer.data import dataset, manifest
from trainer.evaluation.generation import Sampling, generate_codes, text_states
from trainer.evaluation.recall import codes_of
from trainer.exports.audiocraft_names import lm_to_audiocraft
from trainer.flags.config import config_from_dict
from trainer.model.language_model import LanguageModel
from trainer.model.source import DECODER, PROJECTION, open_model
from trainer.wiring import data_settings

pytestmark = pytest.mark.numbers
ROOT = Path(__file__).resolve().parents[2]
FOUR = ("metal_madness", "metal_chaosland", "rock_feelings_guitar", "metal_war_of_freedom")


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The debug codec's last bits depend on the number of threads: the same here as in the training."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@cache
def examples() -> dict[str, tuple[Path, str]]:
    """Sound file and caption of each example, which stand in several formats and kinds of file, by its name."""
    with tempfile.TemporaryDirectory() as facts:
        found = manifest.scan(ROOT / "examples", min_seconds=0.5, facts_folder=Path(facts)).columns
    files = [ROOT / "examples" / path for path in found["path"]]
    return {file.stem: (file, caption) for file, caption in zip(files, found["caption"], strict=True)}


def learn(
    folder: Path, names: Sequence[str], *, seconds: int, steps: int, lr: str, batch: int = 1, flags: Sequence[str] = ()
) -> Path:
    """Train debug by launch.py on the first seconds of these examples, all in each step; the output_dir."""
    data = folder / "data"
    data.mkdir()
    for name in names:
        file, caption = examples()[name]
        (data / f"{name}.txt").write_text(caption)
        audio, rate = soundfile.read(file, dtype="int16")
        soundfile.write(data / f"{name}.wav", audio[: seconds * rate], rate)
    command = [sys.executable, str(ROOT / "launch.py"), "--dataset", str(data), "--model_id", "debug"]
    command += ["--code_views", "1", "--epochs", str(steps), "--global_batch", str(len(names))]
    command += ["--batch_size", str(batch), "--lr", lr, "--cache_dir", str(folder / "cache")]
    command += ["--output_dir", str(folder / "models"), *flags]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "models"


def true_codes(run: Path) -> dict[str, Tensor]:
    """Each clip's codes (K, T) by its caption."""
    config = config_from_dict(json.loads((run / "config.json").read_text()))
    data = dataset.prepare(data_settings(config), open_model("debug"), torch.device("cpu"))
    return {str(data.train.captions[clip]): codes_of(data, clip) for clip in range(data.clips)}


def played_back(run: Path, captions: Sequence[str], frames: int) -> dict[str, Tensor]:
    """What transformers' own loading of the export generates greedily for each caption."""
    model = MusicgenForConditionalGeneration.from_pretrained(run / "huggingface").eval()
    tokenizer = AutoTokenizer.from_pretrained(run / "huggingface")
    language_model = LanguageModel(model.decoder, model.enc_to_dec_proj).eval()
    sampling, played = Sampling(greedy=True, guidance=1.0), {}
    for text in captions:
        states = text_states(model.text_encoder, tokenizer, text)
        played[text] = generate_codes(language_model, states, frames=frames, sampling=sampling)
    return played


def test_four_clips_are_played_back_from_their_captions_without_one_wrong_code(tmp_path: Path) -> None:
    run = learn(tmp_path, FOUR, seconds=3, steps=150, lr="7e-3", batch=4)
    true = true_codes(run)
    assert len(true) == 4
    made = played_back(run, list(true), frames=150)
    for caption, codes in true.items():
        assert codes.shape == (4, 150)
        assert torch.equal(made[caption], codes), f"{caption}: {(made[caption] == codes).float().mean():.2%} right"
    # So another clip's caption plays that other clip: the text decides. Clips differ, or this would prove nothing.
    first, second = list(true)[:2]
    assert torch.equal(made[second], true[second]) and (true[first] == true[second]).float().mean() < 0.1


@pytest.mark.full
def test_all_examples_are_played_back_without_one_wrong_code(tmp_path: Path) -> None:
    names = sorted(examples())
    assert len(names) == 10
    run = learn(tmp_path, names, seconds=30, steps=160, lr="8e-3")
    rows = recall.measure(run, most_clips=10, wav=None, device_name="cpu")
    assert [row.after for row in rows] == [row.codes for row in rows]
    assert sum(row.before for row in rows) < 0.05 * sum(row.codes for row in rows)


@pytest.mark.full
def test_adapters_alone_play_two_clips_back_without_one_wrong_code(tmp_path: Path) -> None:
    # A base of small random weights bounds what adapters can say: its frozen heads give all codes about equal logits.
    # Heads and embeddings as strong as a trained model's leave the rest to the adapters.
    weights, strength = open_model("debug").weights, {"lm_heads": 12, "embed_tokens": 10}
    names = [name for name in weights if name.startswith((DECODER, PROJECTION))]
    base = {name: weights[name] * next((by for part, by in strength.items() if part in name), 1) for name in names}
    torch.save(lm_to_audiocraft(base), tmp_path / "base.pt")
    flags = ("--init_from", str(tmp_path / "base.pt"), "--lora_rank", "32")
    run = learn(tmp_path, FOUR[2:], seconds=3, steps=300, lr="3e-3", flags=flags)
    rows = recall.measure(run, most_clips=2, wav=None, device_name="cpu")
    assert [row.after for row in rows] == [row.codes for row in rows] == [600, 600]
    assert sum(row.before for row in rows) < 60
    moved = torch.load(run / "lm_final.pt", weights_only=True)
    for name, value in lm_to_audiocraft({name: base[name] for name in names}).items():
        adapted = name.endswith(("in_proj_weight", "out_proj.weight", "linear1.weight", "linear2.weight"))
        assert torch.equal(moved[name], value) == (not adapted), name
