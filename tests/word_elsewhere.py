"""python tests/word_elsewhere.py KIND BASE FILE PROMPT OUTPUT: logits with a learned word, without the trainer.

KIND is transformers or audiocraft, BASE the model's folder. The word is put in by the function that docs/new_word.md
shows; PROMPT has {word} where it stands. OUTPUT gets logits (1, K, T, V) of `codes()`, by torch.save.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]


def codes() -> Tensor:
    """(1, 4, 12) int64, the same at every call."""
    return torch.randint(0, 2049, (1, 4, 12), generator=torch.Generator().manual_seed(6))


def function_of_the_page() -> Callable[..., str]:
    """`add_word` as docs/new_word.md has it."""
    page = (ROOT / "docs/new_word.md").read_text(encoding="utf-8")
    (block,) = [code for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "def add_word" in code]
    names: dict[str, Any] = {}
    exec(block, names)
    return names["add_word"]


def in_transformers(base: str, file: str, prompt: str) -> Tensor:
    from transformers import AutoProcessor, MusicgenForConditionalGeneration

    processor = AutoProcessor.from_pretrained(base)
    model = MusicgenForConditionalGeneration.from_pretrained(base)
    word = function_of_the_page()(processor.tokenizer, model.text_encoder, file)
    inputs = processor(text=[prompt.format(word=word)], padding=True, return_tensors="pt")
    logits = model(**inputs, decoder_input_ids=codes().flatten(0, 1)).logits
    return logits.view(1, 4, *logits.shape[1:])


def in_audiocraft(base: str, file: str, prompt: str) -> Tensor:
    sys.path.insert(0, str(ROOT / "scripts"))
    from benchmarks.audiocraft_stub import import_audiocraft

    import_audiocraft()
    from audiocraft.models import MusicGen
    from audiocraft.modules.conditioners import ConditioningAttributes

    os.chdir(base)  # where its T5 is
    model = MusicGen.get_pretrained(".", device="cpu")
    text = model.lm.condition_provider.conditioners["description"]
    word = function_of_the_page()(text.t5_tokenizer, text.t5, file)
    return model.lm(codes(), [ConditioningAttributes(text={"description": prompt.format(word=word)})])


if __name__ == "__main__":
    kind, base, file, prompt, output = sys.argv[1:]
    with torch.inference_mode():
        torch.save({"transformers": in_transformers, "audiocraft": in_audiocraft}[kind](base, file, prompt), output)
