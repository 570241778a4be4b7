"""What a model knows of its training clips by heart, before and after the training.

Three questions: does it play a clip back from its caption (`Recall`); does it continue a clip's beginning as the clip
does (trainer/evaluation/memorisation.py); and how near does what a listener would hear come to a training clip
(trainer/evaluation/nearest.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import EncodecModel

from trainer.data.batches import Examples
from trainer.data.dataset import Dataset
from trainer.data.held_out import trained_on_too
from trainer.errors import DataError
from trainer.evaluation.generation import Sampling, decode, write_wav
from trainer.evaluation.memorisation import (
    GREEDY,
    LEAST_COMPARED_FRAMES,
    Clip,
    Prompted,
    Row,
    chosen,
    clip_of,
    played,
    prompted,
    rows_of,
)
from trainer.evaluation.nearest import nearest
from trainer.model.source import Source, load_codec

SAMPLED = Sampling(guidance=3.0, top_k=250)  # as scripts/generate.py does without flags
SAMPLED_SECONDS = 10.0


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is measured.

    clips              at most so many of each group, drawn by `seed`
    prompt_seconds     how much of a clip is given, each length in turn
    continued_seconds  how much follows, and how long the places are that `Near` compares
    sampled            so many outputs as a listener would make them
    searched_clips     at most so many training clips are searched for what is like them, drawn by `seed`
    """

    clips: int = 10
    prompt_seconds: tuple[float, ...] = (0, 1, 5, 10)
    continued_seconds: float = 5.0
    sampled: int = 3
    searched_clips: int = 20_000
    seed: int = 0


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


@dataclass(frozen=True, kw_only=True)
class Near:
    """The training clip that a sampled output is most like, and where.

    model           "before" or "after" the training
    prompt          the caption that it was made of
    clip            the name
    output_seconds  where the place starts in the output
    clip_seconds    and in the clip
    seconds         of the place
    first_codebook  share of equal codes there, in [0, 1], in the first codebook of each channel, by which is searched
    equal           the same of all codebooks
    chance, first_codebook_chance  `equal` and `first_codebook` of the nearest place to the same output played
                    backwards, whose codes are the same and which is no copy
    """

    model: str
    prompt: str
    clip: str
    output_seconds: float
    clip_seconds: float
    seconds: float
    first_codebook: float
    equal: float
    chance: float
    first_codebook_chance: float


@dataclass(frozen=True, kw_only=True)
class Findings:
    """All that was measured.

    played_back     the chosen training clips that fit the segment
    rows            before and after, training and held-out clips, each length of prompt
    nearest         the sampled outputs of both models
    continued_seconds, searched_clips, training_clips  of how many clips `nearest` is, out of how many
    remarks         what a reader must know besides, a sentence each
    """

    played_back: tuple[Recall, ...]
    rows: tuple[Row, ...]
    nearest: tuple[Near, ...]
    continued_seconds: float
    searched_clips: int
    training_clips: int
    remarks: tuple[str, ...]


def measure(
    data: Dataset, base: Source, trained: Source, device: torch.device, settings: Settings, *, wav: Path | None
) -> Findings:
    """What the model before and after the training, `base` and `trained`, knows of the training clips.

    The control are the clips that validate, see `held_out_clips`.
    wav  a folder to write the sound of each clip's own codes and of the played ones to; None writes none

    Raises DataError where no training clip lasts a second.
    """
    clips = [clip_of(data.train, clip) for clip in chosen(data.train, settings.clips, settings.seed)]
    if not any(clip.codes_KT.shape[1] >= LEAST_COMPARED_FRAMES for clip in clips):
        raise DataError("no clip lasts a second, so that there is nothing to compare")
    held_out, remarks = held_out_clips(data, settings)
    whole = [clip for clip in clips if clip.whole]
    captions = [clip.caption for clip in (*clips, *held_out)]
    rate_hz = trained.frame_rate_hz
    rows: list[Row] = []
    played_by, sampled_by = {}, {}
    for model, source in (("before", base), ("after", trained)):
        asked = prompted(source, captions, device)
        played_by[model] = played(asked, whole, [clip.codes_KT.shape[1] for clip in whole], GREEDY)
        for group, of_group in (("training", clips), ("held out", held_out)):
            rows += rows_of(
                asked, of_group, group=group, model=model, prompt_seconds=settings.prompt_seconds,
                continued_frames=round(settings.continued_seconds * rate_hz), frame_rate_hz=rate_hz,
            )  # fmt: skip
        frames = min(round(SAMPLED_SECONDS * rate_hz), data.train.segment_frames)
        sampled_by[model] = sampled(asked, clips[: settings.sampled], frames, settings.seed)
        del asked  # the other model takes its place on the device
    searched = chosen(data.train, settings.searched_clips, settings.seed)
    near = nearest_clips(data.train, searched, clips, sampled_by, settings.continued_seconds, rate_hz)
    if len(whole) < len(clips):
        remarks.append(
            f"{len(clips) - len(whole)} of {len(clips)} clips are longer than --segment_seconds: they are learned in"
            " crops, and only their beginnings are asked for, not the whole of them"
        )
    return Findings(
        played_back=tuple(_played_back(whole, played_by, trained, device, wav)),
        rows=tuple(sorted(rows, key=lambda row: (row.group != "training", row.prompt_seconds, row.model == "after"))),
        nearest=tuple(near),
        continued_seconds=settings.continued_seconds,
        searched_clips=len(searched),
        training_clips=data.clips,
        remarks=tuple(remarks),
    )


def held_out_clips(data: Dataset, settings: Settings) -> tuple[list[Clip], list[str]]:
    """The clips of the control, at most `Settings.clips` of those that validate, and what is to be said of them. One
    whose codes are those of a training clip, under another name, is no control, and left out."""
    others, remarks, drawn = data.validation, [], []
    if others is not None:
        alike = trained_on_too(data.train, others)
        drawn = [clip_of(others, clip) for clip in chosen(others, settings.clips, settings.seed, alike)]
        if alike:
            names = ", ".join(others.names[clip] for clip in alike[:3]) + (" ..." if len(alike) > 3 else "")
            remarks.append(f"{len(alike)} held-out clips are left out, since their music is trained on: {names}")
    if not drawn:
        remarks.append(
            "no clips were held out (--validation of the run, or --held_out here): without them, what is known by heart"
            " and what anybody would guess look alike"
        )
    return drawn, remarks


def sampled(asked: Prompted, clips: Sequence[Clip], frames: int, seed: int) -> list[Tensor]:
    """What a listener hears who asks for the clips' captions, and of a melody model for their melodies: (K, frames)."""
    return played(asked, clips, [frames] * len(clips), replace(SAMPLED, seed=seed))


def nearest_clips(
    examples: Examples,
    searched: Sequence[int],
    clips: Sequence[Clip],
    sampled_by: Mapping[str, Sequence[Tensor]],
    seconds: float,
    frame_rate_hz: float,
) -> list[Near]:
    """Which of the searched training clips each model's outputs are nearest to.

    searched    by index
    clips       those whose captions were asked for; sampled_by has the codes (K, T) of each, by model
    seconds     of the places that are compared
    """
    window = round(seconds * frame_rate_hz)
    made = [(model, clip, codes.numpy()) for model, all_codes in sampled_by.items()
            for clip, codes in zip(clips, all_codes, strict=False)]  # fmt: skip
    lengths = examples.codes.frames[:, 0]
    found = nearest(
        [codes for _, _, codes in made] + [codes[:, ::-1] for _, _, codes in made],
        lambda at: examples.codes.crop(searched[at], 0, 0, int(lengths[searched[at]])),
        [int(lengths[clip]) for clip in searched],
        window_frames=window,
        least_frames=min(LEAST_COMPARED_FRAMES, window),
        channels=examples.shape.audio_channels,
    )
    rows = []
    for (model, clip, _), match, backwards in zip(made, found, found[len(made) :], strict=False):
        if match is not None and backwards is not None:
            rows.append(
                Near(
                    model=model, prompt=clip.caption, clip=examples.names[searched[match.clip]],
                    output_seconds=match.output_frame / frame_rate_hz, clip_seconds=match.clip_frame / frame_rate_hz,
                    seconds=match.frames / frame_rate_hz, first_codebook=match.first_codebook, equal=match.equal,
                    chance=backwards.equal, first_codebook_chance=backwards.first_codebook,
                )
            )  # fmt: skip
    return rows


def _played_back(
    clips: Sequence[Clip], played_by: Mapping[str, Sequence[Tensor]], trained: Source, device: torch.device,
    wav: Path | None,
) -> list[Recall]:
    true = [clip.codes_KT for clip in clips]
    versions = {"0_true": true, "1_before": played_by["before"], "2_after": played_by["after"]}
    sounds = decoded(load_codec(trained).to(device), versions)
    if wav is not None:
        write_sounds(wav, sounds, [clip.name for clip in clips], trained.sample_rate_hz)
    return [
        Recall(
            clip=clip.name,
            caption=clip.caption,
            codes=int(clip.trained_KT.sum()),
            before=equal_codes(played_by["before"][at], clip),
            after=equal_codes(played_by["after"][at], clip),
            snr_before_db=_or_none(snr_db(sounds["0_true"][at], sounds["1_before"][at])),
            snr_after_db=_or_none(snr_db(sounds["0_true"][at], sounds["2_after"][at])),
        )
        for at, clip in enumerate(clips)
    ]


def equal_codes(generated_KT: Tensor, clip: Clip) -> int:
    """How many of the clip's trained codes were generated; (K, T) int64."""
    return int(((generated_KT == clip.codes_KT) & clip.trained_KT).sum())


def decoded(codec: EncodecModel, versions: Mapping[str, Sequence[Tensor]]) -> dict[str, list[np.ndarray]]:
    """The sound of each clip in each version, (samples,) float32, or (samples, 2) in stereo.

    versions  by name: codes (K, T) of each clip
    """
    return {version: [decode(codec, codes_KT) for codes_KT in codes] for version, codes in versions.items()}


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
    folder: Path, sounds: Mapping[str, Sequence[np.ndarray]], names: Sequence[str], sample_rate_hz: int
) -> None:
    """Write each clip in each version as NUMBER_CLIP_VERSION.wav, so that a clip's versions sort together."""
    folder.mkdir(parents=True, exist_ok=True)
    for version, of_version in sounds.items():
        for number, (name, sound) in enumerate(zip(names, of_version, strict=True), start=1):
            write_wav(folder / f"{number:02d}_{Path(name).stem}_{version}.wav", sound, sample_rate_hz)


def _or_none(ratio_db: float) -> float | None:
    """None for an infinite ratio, which JSON does not have."""
    return ratio_db if math.isfinite(ratio_db) else None
