"""--tune_text on real clips: it learns, resumes bit for bit, moves nothing else, and its files load elsewhere."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoProcessor, MusicgenForConditionalGeneration

from scripts import generate
from tests.rounding import LOSS
from tests.runs import ROOT, assert_bit_equal, environ, few_clips, final_state, launch_here, metrics
from tests.word_elsewhere import codes
from trainer.data import dataset
from trainer.exports.export import write_huggingface
from trainer.flags.config import Config
from trainer.model.language_model import load_language_model
from trainer.model.new_word import TABLE, extended_tokenizer, first_token, read_text_embedding
from trainer.model.new_word_model import TextTunedModel
from trainer.model.source import DECODER, PROJECTION, Source, load_text_encoder, open_model
from trainer.wiring import data_settings

STEPS = 12
# All clips whole in every step: with what is trained held still, every step has the same loss.
FLAGS = ("--code_views", "1", "--segment_seconds", "8", "--global_batch", "3", "--batch_size", "3", "--epochs", "1000")
FLAGS += ("--warmup_steps", "1", "--lr_schedule", "constant")
WORD = ("--tune_text", "1", "--placeholder", "<my-style>")


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run that learned a word, in models/."""
    folder = tmp_path_factory.mktemp("learned")
    launch_here(folder, *FLAGS, *WORD, "--lr", "0.5", "--max_steps", str(STEPS), "--save_step", "5")
    return folder


@pytest.fixture(scope="module")
def source() -> Source:
    return open_model("debug")


@pytest.fixture(scope="module")
def logits(learned: Path, source: Source) -> Tensor:
    """Those of the model as it was trained, for "slow <my-style> rock"."""
    embedding = read_text_embedding(learned / "models/text_embedding.safetensors")
    assert torch.equal(embedding.rows_ND.view(-1), final_state(learned)["weight/text_rows"])
    tokenizer = extended_tokenizer(source.load_tokenizer(), embedding.placeholder)
    first = first_token(tokenizer, embedding.placeholder)
    model = TextTunedModel(load_language_model(source), load_text_encoder(source), first, 4).eval()
    model.text_rows.data.copy_(embedding.rows_ND)
    tokens = tokenizer("slow <my-style> rock", return_tensors="pt")
    with torch.inference_mode():
        return model(codes(), tokens.input_ids, tokens.attention_mask.float())


@pytest.mark.numbers
def test_the_loss_ends_lower_than_with_everything_frozen(learned: Path) -> None:
    """5e-3 is 2500 times the rounding; the random model hardly heeds its text, so that there is little to gain."""
    losses = list(metrics(learned).values())
    launch_here(learned, *FLAGS, *WORD, "--lr", "1e-30", "--max_steps", "3", "--output_dir", "frozen")
    frozen = [json.loads(line)["loss"] for line in (learned / "frozen/metrics.jsonl").read_text().splitlines()]
    assert frozen == pytest.approx([losses[0]] * 3, abs=LOSS)
    assert losses[-1] < losses[0] - 5e-3


def test_a_checkpoint_holds_the_rows_and_their_moments_alone(learned: Path) -> None:
    shapes = {name: len(value) for name, value in final_state(learned).items()}
    assert shapes == {f"{kind}/text_rows": 4 * 512 for kind in ("weight", "exp_avg", "exp_avg_sq")}
    files = [path for path in (learned / "models").rglob("*") if path.is_file() and "huggingface" not in path.parts]
    assert sum(path.stat().st_size for path in files if path.suffix != ".html") < 150_000
    names = {path.name for path in (learned / "models").iterdir()}
    assert {"text_embedding.safetensors", "text_embedding_5.safetensors", "huggingface"} <= names
    assert not {"lm_final.pt", "lm_5.pt", "audiocraft"} & names
    assert (learned / "models/text_embedding.safetensors").stat().st_size < 10_000


def test_a_run_that_was_stopped_continues_bit_for_bit(learned: Path, tmp_path: Path) -> None:
    for name in ("data", "cache"):
        shutil.copytree(learned / name, tmp_path / name)
    launch_here(tmp_path, *FLAGS, *WORD, "--lr", "0.5", "--max_steps", "5")
    before = final_state(tmp_path)
    launch_here(tmp_path, *FLAGS, *WORD, "--lr", "0.5", "--max_steps", str(STEPS))
    assert_bit_equal(final_state(tmp_path), final_state(learned))
    assert metrics(tmp_path) == metrics(learned)
    assert not torch.equal(before["weight/text_rows"], final_state(tmp_path)["weight/text_rows"])


def test_every_other_tensor_of_the_model_is_the_bases_bit_for_bit(learned: Path, source: Source) -> None:
    exported = load_file(learned / "models/huggingface/model.safetensors")
    table = exported.pop(TABLE)
    exported.pop("text_encoder.encoder.embed_tokens.weight", None)
    assert exported.keys() == set(source.weights) - {TABLE}
    assert all(torch.equal(value, source.weights[name]) for name, value in exported.items())
    size = len(source.weights[TABLE])
    assert torch.equal(table[:size], source.weights[TABLE]) and len(table) == size + 4
    assert torch.equal(table[size:].reshape(-1), final_state(learned)["weight/text_rows"])


@pytest.mark.numbers
def test_the_file_gives_the_same_logits_in_transformers_in_a_fresh_process(
    learned: Path, source: Source, logits: Tensor, tmp_path: Path
) -> None:
    write_huggingface(source, source.weights.starting_with(DECODER, PROJECTION), tmp_path / "base", card="")
    script, file = str(ROOT / "tests/word_elsewhere.py"), str(learned / "models/text_embedding.safetensors")
    command = [sys.executable, script, "transformers", str(tmp_path / "base"), file, "slow {word} rock"]
    output = str(tmp_path / "logits.pt")
    done = subprocess.run([*command, output], capture_output=True, text=True, env=environ(), timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (torch.load(output) - logits).abs().max() < 1e-5


@pytest.mark.numbers
def test_the_folder_gives_the_same_logits_with_the_placeholder_in_the_prompt(learned: Path, logits: Tensor) -> None:
    processor = AutoProcessor.from_pretrained(learned / "models/huggingface")
    model = MusicgenForConditionalGeneration.from_pretrained(learned / "models/huggingface")
    prompted = []
    for prompt in ("slow <my-style> rock", "slow rock"):
        inputs = processor(text=[prompt], padding=True, return_tensors="pt")
        with torch.inference_mode():
            prompted.append(model(**inputs, decoder_input_ids=codes().flatten(0, 1)).logits.view_as(logits))
    assert (prompted[0] - logits).abs().max() < 1e-5 < 1e-3 < (prompted[1] - logits).abs().max()


def test_generate_makes_the_same_sound_from_the_file_and_from_the_folder(
    learned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, prompt = str(learned / "models/text_embedding.safetensors"), "<my-style> rock"
    rest = ["--prompt", prompt, "--seconds", "0.4", "--device", "cpu", "--output"]
    assert generate.main(["--model", str(learned / "models"), *rest, str(tmp_path / "a")]) == 0
    assert generate.main(["--model", "debug", "--text_embedding", file, *rest, str(tmp_path / "b")]) == 0
    assert "no prompt has" not in capsys.readouterr().out
    first, second = (soundfile.read(tmp_path / name / "01_my_style_rock.wav")[0] for name in "ab")
    assert (first == second).all()
    rest[1] = "rock"
    assert generate.main(["--model", "debug", "--text_embedding", file, *rest, str(tmp_path / "c")]) == 0
    assert "no prompt has <my-style> in it" in capsys.readouterr().out
    absent = ["--model", "debug", "--text_embedding", str(tmp_path / "absent"), *rest, str(tmp_path / "d")]
    assert generate.main(absent) == 1


@pytest.mark.parametrize(
    ("flags", "message", "code"),
    [
        (("--placeholder", "<pad>", "--output_dir", "new"), "--placeholder <pad>: the tokenizer knows <pad>", 2),
        (("--init_word", "音", "--output_dir", "new"), "--init_word 音: the tokenizer does not know it", 2),
        (("--init_from", "models", "--output_dir", "new"), "4 new row(s) of T5's embedding, which its run learned", 1),
        (("--placeholder", "<other>"), "<my-style> from music then, <other> from music now", 1),
        (("--placeholder_vectors", "2"), "4 new row(s) of T5's embedding then, 2 new row(s)", 1),
        (("--tune_text", "0"), "4 new row(s) of T5's embedding then, None now", 1),
    ],
)
def test_what_makes_no_sense_is_refused_and_changes_nothing(
    learned: Path, flags: tuple[str, ...], message: str, code: int
) -> None:
    before = final_state(learned)
    word = ("--tune_text", "1", "--placeholder", "<my-style>") if "--tune_text" not in flags else ()
    assert message in launch_here(learned, *FLAGS, "--max_steps", "99", *word, *flags, expect=code)
    assert_bit_equal(final_state(learned), before)


def test_clips_without_captions_are_the_placeholder_alone_and_others_get_it_in_front(tmp_path: Path) -> None:
    few_clips(tmp_path / "data")
    captions = ["slow <my-style> rock", "loud\nand fast", ""]
    for path, caption in zip(sorted((tmp_path / "data").glob("*.txt")), captions, strict=True):
        path.write_text(caption)
    read = {}
    for name, flags in {"plain": {}, "lines": {"caption_lines": True}, "alone": {"no_label": True}}.items():
        config = Config(
            dataset_path=str(tmp_path / "data"),
            cache_dir=str(tmp_path / "cache"),
            code_views=1,
            tune_text=True,
            placeholder="<my-style>",
            **flags,
        )
        train = dataset.prepare(data_settings(config), open_model("debug"), torch.device("cpu")).train
        read[name] = set(train.all_texts())
    assert read["plain"] == {"slow <my-style> rock", "<my-style> loud and fast", "<my-style>"}
    assert read["lines"] == {"slow <my-style> rock", "<my-style> loud", "<my-style> and fast", "<my-style>"}
    assert read["alone"] == {"<my-style>"}
    assert not (tmp_path / "cache/text").exists(), "T5's states were cached, which nothing reads"
