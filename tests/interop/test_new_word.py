"""A learned word in the real audiocraft: docs/new_word.md's function gives our logits in a fresh process."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.interop.audiocraft_modules import MISSING
from tests.runs import environ
from tests.word_elsewhere import ROOT, codes
from trainer.exports.export import write_audiocraft
from trainer.model.language_model import load_language_model
from trainer.model.new_word import Placeholder, TextEmbedding, with_embedding, write_text_embedding
from trainer.model.source import DECODER, PROJECTION, load_text_encoder, open_model

if importlib.util.find_spec("audiocraft") is None:
    pytest.skip(MISSING, allow_module_level=True)


@pytest.mark.numbers
def test_audiocraft_gives_our_logits_for_the_word(tmp_path: Path) -> None:
    source = open_model("debug")
    rows = 3 * torch.randn(3, 512, generator=torch.Generator().manual_seed(3))
    embedding = TextEmbedding(
        placeholder=Placeholder(word="<my-style>", vectors=3),
        rows_ND=rows,
        base_model="debug",
        text_encoder=source.text_identity(),
    )
    write_text_embedding(embedding, tmp_path / "word.safetensors")
    weights = {name: source.weights[name].clone() for name in source.weights if name.startswith((DECODER, PROJECTION))}
    weights["enc_to_dec_proj.weight"] *= 8  # the random projection hardly lets text through
    write_audiocraft(source, weights, tmp_path / "base", segment_seconds=30.0, cfg_dropout=0.0)

    script, prompt, output = str(ROOT / "tests/word_elsewhere.py"), "slow {word} rock", str(tmp_path / "logits.pt")
    command = [sys.executable, script, "audiocraft", str(tmp_path / "base"), str(tmp_path / "word.safetensors")]
    done = subprocess.run([*command, prompt, output], capture_output=True, text=True, env=environ(), timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    theirs = torch.load(output)

    known = with_embedding(source, embedding)
    model = load_language_model(source).eval()
    model.enc_to_dec_proj.weight.data.mul_(8)
    tokens = known.load_tokenizer()("slow <my-style> rock", return_tensors="pt")
    with torch.inference_mode():
        ours = model(codes(), load_text_encoder(known)(**tokens).last_hidden_state, tokens.attention_mask.float())
        plain = load_text_encoder(source)(**source.load_tokenizer()("slow rock", return_tensors="pt")).last_hidden_state
        without = model(codes(), plain, torch.ones(plain.shape[:2]))
    assert (ours - theirs).abs().max() < 1e-4 < 1e-1 < (ours - without).abs().max()
