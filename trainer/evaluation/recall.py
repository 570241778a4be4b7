"""How many codes of its own training clips a model reproduces from their captions, before and after the training."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import MusicgenForConditionalGeneration

from trainer.data.dataset import Dataset
from trainer.errors import DataError
from trainer.evaluation.generation import Sampling, decode, generate, load_for_generation, write_wav
from trainer.model.source import Source


@dataclass(frozen=True, kw_only=True)
class Recall:
    """Codes of one clip that a model was trained on, and how many of them it reproduces, before and after."""

    clip: str
    caption: str
    codes: int
    before: int
    after: int


def measure(
    data: Dataset, base: Source, trained: Source, device: torch.device, *, most_clips: int, wav: Path | None
) -> list[Recall]:
    """The recall of the first clips by name that fit the segment, `most_clips` of them.

    base, trained  the model before and after the training
    wav            a folder for each clip's own codes and the generated ones as sound; None writes none

    Raises DataError where no clip fits the segment.
    """
    clips = whole_clips(data)[:most_clips]
    true = {clip: codes_of(data, clip) for clip in clips}
    after = generated(trained, data, true, device)
    before = generated(base, data, true, device)
    if wav is not None:
        model = load_for_generation(trained, device)
        write_sounds(wav, model, data, {"0_true": true, "1_before": before, "2_after": after})
    return [
        Recall(
            clip=data.train.names[clip],
            caption=data.train.captions[clip] or "",
            codes=int(trained_cells(true[clip], data.train.segment_frames).sum()),
            before=equal_codes(before[clip], true[clip], data.train.segment_frames),
            after=equal_codes(after[clip], true[clip], data.train.segment_frames),
        )
        for clip in clips
    ]


def whole_clips(data: Dataset) -> list[int]:
    """Indices, by name, of the clips that fit the segment: longer ones are learned in crops with any start."""
    fitting = [clip for clip in range(data.clips) if data.train.codes.frames[clip, 0] <= data.train.segment_frames]
    if not fitting:
        raise DataError("every clip is longer than --segment_seconds: there is no beginning that was always learned")
    return sorted(fitting, key=lambda clip: data.train.names[clip])


def codes_of(data: Dataset, clip: int) -> Tensor:
    """The clip's cached codes of view 0, (K, T) int64."""
    codes = data.train.codes.crop(clip, 0, 0, int(data.train.codes.frames[clip, 0]))
    return torch.from_numpy(codes.astype("int64"))


def trained_cells(codes_KT: Tensor, segment_frames: int) -> Tensor:
    """Bool (K, T): false for the diagonal tail that falls off where the clip fills the segment."""
    codebooks, frames = codes_KT.shape
    return torch.arange(frames)[None] < segment_frames - torch.arange(codebooks)[:, None]


def equal_codes(generated_KT: Tensor, true_KT: Tensor, segment_frames: int) -> int:
    """How many trained cells agree."""
    return int(((generated_KT == true_KT) & trained_cells(true_KT, segment_frames)).sum())


def generated(source: Source, data: Dataset, true: dict[int, Tensor], device: torch.device) -> dict[int, Tensor]:
    """Greedy codes for each clip's caption, as long as the clip."""
    model, tokenizer = load_for_generation(source, device), source.load_tokenizer()
    return {
        clip: generate(
            model,
            tokenizer,
            data.train.captions[clip] or "",
            frames=codes.shape[1],
            sampling=Sampling(guidance=1.0, greedy=True),
        ).codes_KT
        for clip, codes in tqdm(true.items(), desc=f"generating with {source.name}", leave=False)
    }


def write_sounds(
    folder: Path, model: MusicgenForConditionalGeneration, data: Dataset, versions: dict[str, dict[int, Tensor]]
) -> None:
    """Each clip's codes in each version as NUMBER_CLIP_VERSION.wav, which sort side by side."""
    folder.mkdir(parents=True, exist_ok=True)
    rate = model.config.audio_encoder.sampling_rate
    for version, codes in versions.items():
        for number, clip in enumerate(codes, start=1):
            stem = Path(data.train.names[clip]).stem
            write_wav(folder / f"{number:02d}_{stem}_{version}.wav", decode(model, codes[clip]), rate)
