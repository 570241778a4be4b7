"""Three epochs of a trainer without a cache: every clip goes through EnCodec and T5 again in every epoch.

python -m benchmarks.encode_each_epoch MODEL_FOLDER DATA_FOLDER MICRO_BATCH PRECISION
"""

from __future__ import annotations

import sys
from pathlib import Path

import soundfile
import torch
from transformers import AutoTokenizer, MusicgenForConditionalGeneration

from benchmarks.contestants import AUTOCAST, LEARNING_RATE
from benchmarks.work import CODES
from trainer.model.delay_pattern import inputs_and_labels

ACCUMULATION = 2  # the default


def main(model_folder: str, data: str, micro_batch: int, precision: str, epochs: int = 3) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = MusicgenForConditionalGeneration.from_pretrained(model_folder).to(device)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    trained = [*model.decoder.parameters(), *model.enc_to_dec_proj.parameters()]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, fused=True)
    files = sorted(Path(data).glob("*.wav"))
    for _ in range(epochs):
        for start in range(0, len(files), ACCUMULATION * micro_batch):
            end = min(start + ACCUMULATION * micro_batch, len(files))
            batches = [files[first : min(first + micro_batch, end)] for first in range(start, end, micro_batch)]
            for batch in batches:
                with torch.autocast(device.type, AUTOCAST.get(precision), enabled=precision != "no"):
                    loss = _loss(model, tokenizer, batch, device) / len(batches)
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            loss.item()


def _loss(model, tokenizer, batch: list[Path], device: torch.device) -> torch.Tensor:
    with torch.no_grad():
        codes = []
        for path in batch:  # one at a time, as musicgen-dreamboothing and audiocraft's data loader give them
            sound = torch.from_numpy(soundfile.read(path, dtype="float32")[0])[None, None].to(device)
            codes.append(model.audio_encoder.encode(sound).audio_codes[0])
        captions = [path.with_suffix(".txt").read_text().strip() for path in batch]
        tokens = tokenizer(captions, padding=True, return_tensors="pt").to(device)
        text = model.text_encoder(**tokens).last_hidden_state
    inputs, labels = inputs_and_labels(torch.cat(codes), CODES)
    logits = model.decoder(
        input_ids=inputs.flatten(0, 1), encoder_hidden_states=model.enc_to_dec_proj(text), use_cache=False
    ).logits.unflatten(0, inputs.shape[:2])
    losses = [
        torch.nn.functional.cross_entropy(logits[:, k].flatten(0, 1).float(), labels[:, k].flatten())
        for k in range(labels.shape[1])
    ]
    return torch.stack(losses).mean()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4])
