"""The whole road learns: from sound files to a loaded export that plays its clips back, code by code."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import soundfile
import soxr
import torch
from torch import Tensor
from transformers import AutoTokenizer, MusicgenForConditionalGeneration

from scripts import recall
from tests.report.browser import CHROMIUM, open_page
from tests.report.test_run_page_browser import HEARD
from tests.runs import few_clips
from trainer.data import dataset, manifest
from trainer.evaluation import samples
from trainer.evaluation.generation import Sampling, generate_codes, text_states
from trainer.evaluation.memorisation import clip_of
from trainer.evaluation.recall import Settings, snr_db
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


def cut(data: Path, names: Sequence[str], seconds: int) -> None:
    """Write the first seconds of these examples, with their captions, into a new folder."""
    data.mkdir()
    for name in names:
        file, caption = examples()[name]
        (data / f"{name}.txt").write_text(caption)
        audio, rate = soundfile.read(file, dtype="int16")
        soundfile.write(data / f"{name}.wav", audio[: seconds * rate], rate)


def learn(
    folder: Path, names: Sequence[str], *, seconds: int, steps: int, lr: str, batch: int = 1, flags: Sequence[str] = ()
) -> Path:
    """Train debug by launch.py on the first seconds of these examples, all in each step; the output_dir."""
    data = folder / "data"
    cut(data, names, seconds)
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
    data = dataset.prepare(data_settings(config), open_model(config.model_id), torch.device("cpu"))
    return {str(data.train.captions[clip]): clip_of(data.train, clip).codes_KT for clip in range(data.clips)}


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
    cut(tmp_path / "others", ("arcade_meadow", "rock_feelings"), 3)
    check_by_heart(run, tmp_path / "others")


def check_by_heart(run: Path, others: Path) -> None:
    """After a second of a clip, each is continued exactly, and a clip of another folder no more than by chance."""
    settings = Settings(prompt_seconds=(1,), sampled=1)
    found = recall.measure(run, settings, wav=None, device_name="cpu", held_out=str(others), base_name=None)
    assert [row.after for row in found.played_back] == [600] * 4 and found.remarks == ()
    rows = {(row.group, row.model): row for row in found.rows}
    assert [row.clips for row in rows.values()] == [4, 4, 2, 2]
    for key, row in rows.items():
        for shares in (row.first_codebook, row.all_codebooks):
            assert shares.exact == shares.partial == (key == ("training", "after"))
            # The random codec gives loud frames of any clip some codes in common.
            assert shares.chance is not None and shares.chance < 0.3
            assert shares.exact or shares.equal < shares.chance + 0.1
    before, after = found.nearest
    assert after.clip == found.played_back[0].clip and after.equal > after.chance + 0.2 > before.equal


def demo_command(folder: Path, seed: int) -> list[str]:
    """launch.py with the flags by which scripts/demo.sh trains into `folder`, where its clips are put."""
    script = (ROOT / "scripts/demo.sh").read_text(encoding="utf-8")
    starts = (r"clips=\$folder.*?^parting=\(", r"training=\(", r"if \[\[ ! -d \$clips \]\]")
    found = [re.search(rf"^{start}.*?(\)|^fi)$", script, re.MULTILINE | re.DOTALL) for start in starts]
    lines = "\n".join(part[0] for part in found if part is not None)
    assert None not in found
    names = f"folder={folder} model={folder}/model run={folder}/run seed={seed}"
    shown = ["bash", "-euc", f'{names}\n{lines}\nprintf "%s\\n" "${{training[@]}}"']
    done = subprocess.run(shown, capture_output=True, text=True, check=True, cwd=ROOT)
    return [sys.executable, "launch.py", *done.stdout.split()]


def run_demo_step(command: Sequence[str], seconds: int = 900) -> str:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, env=env, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def make_demo_model(clips: Path, folder: Path) -> None:
    flags = ["--dataset", str(clips), "--output", str(folder / "model")]
    run_demo_step([sys.executable, "scripts/demo_model.py", *flags])


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model of scripts/demo.sh in a folder of its own; that folder."""
    folder = tmp_path_factory.mktemp("demo")
    make_demo_model(ROOT / "examples", folder)
    return folder


@pytest.mark.full
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("seed", [0, 1])
def test_the_demo_plays_the_examples_back_so_that_they_are_heard(demo: Path, seed: int, tmp_path: Path) -> None:
    (tmp_path / "model").symlink_to(demo / "model")
    run_demo_step(demo_command(tmp_path, seed))
    shown = run_demo_step([sys.executable, "scripts/recall.py", "--run", str(tmp_path / "run"), "--wav", str(tmp_path)])
    written = json.loads((tmp_path / "run" / "recall.json").read_text())
    rows = written["played_back"]
    assert len(rows) == 8 and re.search(r"^(7|8) of 8 clips cannot be told", shown, re.MULTILINE)
    codes, before, after = (sum(row[name] for row in rows) for name in ("codes", "before", "after"))
    assert after >= 0.999 * codes and before < 0.01 * codes
    # In the .wav files, which hold 16 bits: what differs by less than half a step of them (-96 dB) is lost there.
    heard = 0
    for row in rows:
        stem = Path(row["clip"]).stem
        true, base, made = (
            soundfile.read(next(tmp_path.glob(f"*_{stem}_{version}.wav")))[0]
            for version in ("0_true", "1_before", "2_after")
        )
        assert snr_db(true, base) < 3 and row["snr_before_db"] < 3
        heard += snr_db(true, made) > 60
        # What is called true is the clip. Files are turned down where their peak passes 1, and hold 16 bits, whose
        # rounding lies at -101 dB; the quietest clip is at -40 dB.
        clip, rate = soundfile.read(ROOT / "examples" / row["clip"], always_2d=True)
        clip = soxr.resample(clip.mean(axis=1), rate, 32_000)
        assert 0 <= len(clip) - len(true) < 640
        clip = clip[: len(true)] / max(abs(clip[: len(true)]).max(), 1)
        assert snr_db(clip, true) > 55
    assert heard >= 7
    check_memorisation(written["memorisation"])
    page = (tmp_path / "run/report.html").read_text(encoding="utf-8")  # made anew by recall.py, from what it wrote
    assert "By heart." in page and "The training clip that is nearest to what it plays" in page
    said = r"^By heart: .* the trained model continues ([78]) of 8 clips .* and 0 of 2 held-out ones"
    assert re.search(said, shown, re.MULTILINE)
    check_samples(tmp_path / "run")
    check_page(tmp_path / "run", tmp_path / "profile")


def check_memorisation(found: dict[str, Any]) -> None:
    """The trained model continues what it was trained on, before the training it does not; of held-out clips it knows
    what chance knows. A sampled output is a piece of the clip whose caption it was made of."""
    rows = {(row["group"], row["model"], row["prompt_seconds"]): row for row in found["rows"]}
    assert {key: row["clips"] for key, row in rows.items()} == {
        (group, model, seconds): clips
        for group, counts in (("training", (8, 8, 2)), ("held out", (2, 2, 1)))
        for seconds, clips in zip((0, 1, 5), counts, strict=True)
        for model in ("before", "after")
    }
    for (group, model, seconds), row in rows.items():
        for shares in (row["first_codebook"], row["all_codebooks"]):
            assert 0 <= shares["exact"] <= shares["partial"] <= 1
            if (group, model) == ("training", "after"):
                # One clip of eight may have a wrong code from its caption alone, as above.
                assert shares["exact"] >= (7 / 8 if seconds == 0 else 1) and shares["equal"] > 0.99
            else:
                assert shares["partial"] == 0
        # The last codebook of the fitted codec is mostly one code, which no model need know by heart: so the first one.
        first = row["first_codebook"]
        if (group, model) != ("training", "after"):
            assert first["equal"] < 0.05 and (first["chance"] is None or abs(first["equal"] - first["chance"]) < 0.05)
    assert len(found["nearest"]) == 6
    captions = {file.name: caption for file, caption in examples().values()}
    for near in found["nearest"]:
        if near["model"] == "after":
            assert captions[near["clip"]] == near["prompt"] and near["first_codebook"] > 0.5
            assert near["equal"] > near["chance"] + 0.2
        else:
            assert near["first_codebook"] < 0.1


def check_samples(run: Path) -> None:
    """Before step 1 no caption calls up its clip, and after the last step all but one do."""
    listed = {step: samples.read(run / "samples", step) for step in samples.finished_steps(run / "samples")}
    assert list(listed) == [0, 300, 600]
    ratios: dict[int, list[float]] = {}
    for step, made in listed.items():
        assert made is not None and len(made.samples) == 8
        for sample in made.samples:
            assert sample.file is not None and sample.clip_file is not None
            true = soundfile.read(run / "samples/clips" / sample.clip_file)[0]
            heard = soundfile.read(samples.step_folder(run / "samples", step) / sample.file)[0][: len(true)]
            ratios.setdefault(step, []).append(snr_db(true, heard))
    assert max(ratios[0]) < 3 and sum(ratio > 60 for ratio in ratios[600]) >= 7


def check_page(run: Path, profile: Path) -> None:
    """The page that the run left plays, draws its curves, asks for nothing and complains of nothing."""
    if CHROMIUM is None:
        return
    with open_page(run / "report.html", profile) as tab:
        assert tab.run("document.querySelectorAll('.sound .play').length") == 32, "before, clip, 300, 600 of eight"
        for at in (0, 1, 31):
            click = f"document.querySelectorAll('.sound .play')[{at}].click()"
            assert tab.run(HEARD % (0, click)) == pytest.approx(4, abs=0.2)
        assert tab.run("document.querySelectorAll('svg path').length") > 40, "waveforms, and curves"
        assert tab.errors == []
        assert all(url.startswith("data:") or url.endswith("/report.html") for url in tab.requests), tab.requests


@pytest.mark.full
def test_on_the_demo_model_a_short_run_learns_more_than_how_frequent_codes_are(tmp_path: Path) -> None:
    clips = few_clips(tmp_path / "data", ("metal_madness", "rock_feelings_guitar"))
    make_demo_model(clips, tmp_path)
    flags = ["--dataset", str(clips), "--model_id", str(tmp_path / "model"), "--code_views", "1", "--epochs", "150"]
    flags += ["--batch_size", "2", "--grad_acc", "1", "--lr", "3e-3", "--cache_dir", str(tmp_path / "cache")]
    run_demo_step([sys.executable, "launch.py", *flags, "--output_dir", str(tmp_path / "run")])
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    # Without looking at text or music no model does better than the entropy of each codebook's codes.
    codes_KT = torch.cat(list(true_codes(tmp_path / "run").values()), dim=1)
    shares = [codes.bincount().double() / len(codes) for codes in codes_KT]
    entropy = sum(float(torch.special.entr(share).sum()) for share in shares) / len(shares)
    assert losses[0] > entropy and min(losses[-5:]) < 0.9 * entropy


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
    settings = Settings(clips=2, prompt_seconds=(0, 1), sampled=0)
    found = recall.measure(run, settings, wav=None, device_name="cpu", held_out=None, base_name=None)
    rows = found.played_back
    assert all(row.all_codebooks.exact == (row.model == "after") for row in found.rows) and len(found.rows) == 4
    assert [row.after for row in rows] == [row.codes for row in rows] == [600, 600]
    assert sum(row.before for row in rows) < 60
    moved = torch.load(run / "lm_final.pt", weights_only=True)
    for name, value in lm_to_audiocraft({name: base[name] for name in names}).items():
        adapted = name.endswith(("in_proj_weight", "out_proj.weight", "linear1.weight", "linear2.weight"))
        assert torch.equal(moved[name], value) == (not adapted), name
