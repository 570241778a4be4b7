"""How many codes of its training clips a model reproduces from their captions, before and after the training.

It shows whether a run has learned its clips by heart.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import EncodecModel

from trainer.data.dataset import Dataset
from trainer.data.melody_places import melody_places
from trainer.data.text_states import text_states
from trainer.errors import DataError
from trainer.evaluation.generation import Sampling, decode, generate_codes, write_wav
from trainer.model.language_model import load_language_model
from trainer.model.source import Source, load_codec, load_text_encoder


@dataclass(frozen=True, kw_only=True)
class Recall:
    """One training clip.

    clip           its name
    caption        the prompt; "" where it has none
    codes          how many codes of it are trained
    before, after  how many of those codes each model generates at their places
    snr_before_db, snr_after_db  the sound of each model's codes against that of the clip's own, see `snr_db`; None
                   where they are the same sound
    """

    clip: str
    caption: str
    codes: int
    before: int
    after: int
    snr_before_db: float | None
    snr_after_db: float | None


def measure(
    data: Dataset, base: Source, trained: Source, device: torch.device, *, most_clips: int, wav: Path | None
) -> list[Recall]:
    """The recall of `most_clips` clips, the first by name among those that fit the segment.

    base, trained  the model before and after the training
    wav            a folder to write the sound of each clip's own codes and of the generated ones to; None writes none

    Raises DataError where no clip fits the segment.
    """
    clips = whole_clips(data)[:most_clips]
    clip_codes = {clip: codes_of(data, clip) for clip in clips}
    after = generated_codes(trained, data, clip_codes, device)
    before = generated_codes(base, data, clip_codes, device)
    versions = {"0_true": clip_codes, "1_before": before, "2_after": after}
    sounds = decoded(load_codec(trained).to(device), versions)
    if wav is not None:
        write_sounds(wav, sounds, data, trained.sample_rate_hz)
    return [
        Recall(
            clip=data.train.names[clip],
            caption=data.train.captions[clip] or "",
            codes=int(trained_cells(clip_codes[clip], data.train.segment_frames, trained.channels).sum()),
            before=equal_codes(before[clip], clip_codes[clip], data.train.segment_frames, trained.channels),
            after=equal_codes(after[clip], clip_codes[clip], data.train.segment_frames, trained.channels),
            snr_before_db=_or_none(snr_db(sounds["0_true"][clip], sounds["1_before"][clip])),
            snr_after_db=_or_none(snr_db(sounds["0_true"][clip], sounds["2_after"][clip])),
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


def trained_cells(codes_KT: Tensor, segment_frames: int, channels: int = 1) -> Tensor:
    """Which codes of a clip are trained, bool (K, T): all but the tail that the delays push out of a full segment.

    channels  of the sound: in stereo a pair of codebooks has one delay
    """
    codebooks, frames = codes_KT.shape
    return torch.arange(frames)[None] < segment_frames - torch.arange(codebooks)[:, None] // channels


def equal_codes(generated_KT: Tensor, clip_KT: Tensor, segment_frames: int, channels: int = 1) -> int:
    """How many of the clip's trained codes were generated; both (K, T) int64."""
    return int(((generated_KT == clip_KT) & trained_cells(clip_KT, segment_frames, channels)).sum())


def generated_codes(
    source: Source, data: Dataset, clip_codes: dict[int, Tensor], device: torch.device
) -> dict[int, Tensor]:
    """Codes (K, T) that the model generates greedily for each clip's caption, as long as the clip, by clip.

    A melody model follows the clip's melody too.

    clip_codes  the clips' own codes (K, T) by clip
    """
    encoder, tokenizer = load_text_encoder(source).to(device), source.load_tokenizer()
    states = {clip: text_states(encoder, tokenizer, data.train.captions[clip] or "") for clip in clip_codes}
    del encoder  # it leaves the device before the decoder comes
    model, sampling = load_language_model(source).to(device).eval(), Sampling(guidance=1.0, greedy=True)
    made = {}
    for clip, codes in tqdm(clip_codes.items(), desc=f"generating with {source.name}", leave=False):
        melody_C, frames = None, codes.shape[1]
        if data.train.melodies is not None:
            melody_C = melody_places(data.train.melodies.crop(clip, 0, 0, frames))
        made[clip] = generate_codes(model, states[clip], frames=frames, sampling=sampling, melody_C=melody_C)
    return {clip: codes for clip, codes in made.items() if codes is not None}  # nothing stops it: that is all of them


def decoded(codec: EncodecModel, versions: Mapping[str, Mapping[int, Tensor]]) -> dict[str, dict[int, np.ndarray]]:
    """The sound of each clip in each version, (samples,) float32, or (samples, 2) in stereo.

    versions  by name: codes (K, T) by clip
    """
    return {
        version: {clip: decode(codec, codes_KT) for clip, codes_KT in codes.items()}
        for version, codes in versions.items()
    }


def snr_db(true: np.ndarray, made: np.ndarray) -> float:
    """How much louder a sound is than what another one adds to it, in dB; infinite where they are the same.

    true, made  (samples,) or (samples, 2) float, equally long; of two channels one ratio, that of their sums

    0 where `made` is silence, about -3 where it is another sound as loud; above 60 the difference is not heard.
    """
    signal = float(np.square(true, dtype=np.float64).sum())
    noise = float(np.square(made.astype(np.float64) - true).sum())
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal else -math.inf


def write_sounds(
    folder: Path, sounds: Mapping[str, Mapping[int, np.ndarray]], data: Dataset, sample_rate_hz: int
) -> None:
    """Write each clip in each version as NUMBER_CLIP_VERSION.wav, so that a clip's versions sort together."""
    folder.mkdir(parents=True, exist_ok=True)
    for version, sound_of_clip in sounds.items():
        for number, (clip, sound) in enumerate(sound_of_clip.items(), start=1):
            stem = Path(data.train.names[clip]).stem
            write_wav(folder / f"{number:02d}_{stem}_{version}.wav", sound, sample_rate_hz)


def _or_none(ratio_db: float) -> float | None:
    """None for an infinite ratio, which JSON does not have."""
    return ratio_db if math.isfinite(ratio_db) else None
