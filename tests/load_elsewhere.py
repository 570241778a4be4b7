"""python tests/load_elsewhere.py MODELS OUTPUT: what an exported output_dir gives in another environment.

MODELS holds what a run exported: huggingface/, and perhaps adapter/ with its base/ and audiocraft/ with a T5 of its
own. The trainer is not imported; OUTPUT gets what was found, by name, by torch.save.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    AutoProcessor,
    AutoTokenizer,
    MusicgenForConditionalGeneration,
    MusicgenMelodyForConditionalGeneration,
    T5EncoderModel,
    T5Tokenizer,
    pipeline,
)

# Known words, unknown ones, the tokens of a learned word, punctuation, white space, signs that T5 does not have.
PROMPTS = ["slow rock", "epic <my-style> beat!", "a  tune, 120 bpm: <zither> ", "naïve 音楽 & <extra_id_0>"]


def main(models: Path, output: str) -> None:
    found: dict[str, Any] = {"transformers": transformers.__version__}
    folder = str(models / "huggingface")
    found |= of_melody_model(folder) if reads_melodies(folder) else of_huggingface(folder)
    if (models / "adapter").is_dir():
        found["adapter"] = logits(with_adapter(models), found["ids"][:1])
    for text_encoder in (models / "audiocraft").glob("t5-*"):
        found |= of_text_encoder(str(text_encoder))
    torch.save(found, output)


def of_huggingface(folder: str) -> dict[str, Any]:
    """Tokens, logits and sounds of a folder: by the classes, and by the pipeline of a user who knows nothing else."""
    processor = AutoProcessor.from_pretrained(folder)
    model = MusicgenForConditionalGeneration.from_pretrained(folder).eval()
    ids = [processor.tokenizer(prompt).input_ids for prompt in PROMPTS]
    assert [AutoTokenizer.from_pretrained(folder)(prompt).input_ids for prompt in PROMPTS] == ids
    inputs = processor(text=PROMPTS[:2], padding=True, return_tensors="pt")
    audio = model.generate(**inputs, do_sample=False, max_new_tokens=13)
    music = pipeline("text-to-audio", model=folder)
    greedy = {"do_sample": False, "max_new_tokens": 13}
    # As a user of each version gives it.
    keyword = "forward_params" if transformers.__version__.startswith("4.") else "generate_kwargs"
    piped = music(PROMPTS[0], **{keyword: greedy})
    return {
        "ids": ids,
        "logits": logits(model, ids[:1]),
        "audio": audio,
        "pipeline": torch.from_numpy(piped["audio"]).flatten(),
        "rate": piped["sampling_rate"],
        "sampling rate": processor.feature_extractor.sampling_rate,
    }


def of_melody_model(folder: str) -> dict[str, Any]:
    """Tokens and logits of a folder whose processor cannot be made, because torchaudio is not installed."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = MusicgenMelodyForConditionalGeneration.from_pretrained(folder).eval()
    ids = [tokenizer(prompt).input_ids for prompt in PROMPTS]
    return {"ids": ids, "logits": logits(model, ids[:1]), "rate": 32_000, "sampling rate": 32_000}


def reads_melodies(folder: str) -> bool:
    return json.loads(Path(folder, "config.json").read_text(encoding="utf-8"))["model_type"] == "musicgen_melody"


def with_adapter(models: Path) -> torch.nn.Module:
    from peft import PeftModel

    folder = str(models / "base")
    kind = MusicgenMelodyForConditionalGeneration if reads_melodies(folder) else MusicgenForConditionalGeneration
    base = kind.from_pretrained(folder)
    return PeftModel.from_pretrained(base, str(models / "adapter")).eval()


def logits(model: torch.nn.Module, ids: list[list[int]]) -> torch.Tensor:
    heads = sum(name.endswith("weight") and ".lm_heads." in name for name in model.state_dict())
    draw = torch.Generator().manual_seed(6)
    inputs = {"decoder_input_ids": torch.randint(0, 2049, (heads, 12), generator=draw)}
    if any("audio_enc_to_dec_proj" in name for name in model.state_dict()):
        notes = torch.randint(0, 12, (1, 235), generator=draw)
        inputs["input_features"] = torch.nn.functional.one_hot(notes, 12).float()
    with torch.inference_mode():
        return model(input_ids=torch.tensor(ids), **inputs).logits


def of_text_encoder(folder: str) -> dict[str, Any]:
    """What audiocraft's T5Conditioner loads from a folder with a T5: tokens and states."""
    tokenizer, encoder = T5Tokenizer.from_pretrained(folder), T5EncoderModel.from_pretrained(folder).eval()
    inputs = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    with torch.inference_mode():
        states = encoder(**inputs).last_hidden_state
    return {"T5's ids": inputs.input_ids, "T5's states": states * inputs.attention_mask[..., None]}


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
