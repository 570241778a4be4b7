"""How close two models' sounds are to held-out music, in figures: RUN/score.json.

The held-out music is what EnCodec makes of its own codes: a model cannot give more than its codec does, and what the
codec loses is not counted against it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from transformers import EncodecModel

from trainer.data.batches import Examples
from trainer.errors import DataError, ModelError
from trainer.evaluation.comparison import LEAST_CLIPS, compare_distances, compare_means
from trainer.evaluation.embeddings import (
    Clap,
    latent_embedding,
    open_clap,
    sound_of_file,
    texts_are_alike,
)
from trainer.evaluation.generation import decode
from trainer.evaluation.score_sounds import Prompt

FORMAT, VERSION = "musicgen-trainer score", 1
CLAP_ADVICE = "laion/larger_clap_music is known for that: use laion/clap-htsat-unfused"
FEW = 50  # clips; below, intervals are wide, and Fréchet distances say more of the number than of the sound


@dataclass(frozen=True, kw_only=True)
class Sounds:
    """Sounds of base and tuned model, as files.

    seconds   how much of each is judged: those of prompt i are as long as the clip whose caption it is
    captions  of each, where both models have the same prompts; None where they are not known
    paired    whether base[i] and tuned[i] have the same prompt
    """

    base: Sequence[Path]
    tuned: Sequence[Path]
    seconds: Sequence[float]
    captions: Sequence[str] | None
    paired: bool


@dataclass
class Ears:
    """What hears the sounds: a codec, and CLAP where there is one."""

    codec: EncodecModel
    sample_rate_hz: int
    channels: int
    clap: Clap | None
    not_run: list[str] = field(default_factory=list)

    def embeddings(self, sounds: Iterable[np.ndarray]) -> dict[str, np.ndarray]:
        """By "encodec" and "clap": a row for each sound."""
        rows: dict[str, list[np.ndarray]] = {name: [] for name in ("encodec", *(["clap"] if self.clap else []))}
        for sound in sounds:
            rows["encodec"].append(latent_embedding(self.codec, sound))
            if self.clap is not None:
                rows["clap"].append(self.clap.sound_embedding(sound, self.sample_rate_hz))
        return {name: np.stack(vectors) for name, vectors in rows.items()}


def clap_or_reason(name: str, device: torch.device) -> tuple[Clap | None, list[str]]:
    """The CLAP model that --clap names, or why its figures are not there.

    Raises ModelError where a folder was named that cannot be used.
    """
    if name == "none":
        return None, ["clap: left out by --clap none"]
    try:
        return open_clap(name, device), []
    except ModelError as error:
        if Path(name).exists() or name.startswith(("/", ".")):
            raise ModelError(f"--clap {error}: give the folder of a CLAP model, a hub id, or none") from error
        return None, [f"clap: {error}. With a network, `hf download {name}`; or give a folder by --clap"]


def score(
    ears: Ears, examples: Examples, clips: Sequence[int], sounds: Sounds, *, seconds: float, frames: int, seed: int
) -> dict[str, Any]:
    """What score.json holds, see docs/score.md.

    clips   those of the examples that were held out, by index, of each of which the first `frames` are heard
    seed    of the resamples

    Raises DataError for too few clips or sounds, for clips that are all alike, and for a sound that cannot be read.
    """
    count, made = len(clips), len(sounds.base)
    if min(count, made) < LEAST_CLIPS:
        raise DataError(
            f"{count} held-out clips and {made} sounds of each model cannot be judged: at least {LEAST_CLIPS} of each"
            " are needed, and 50 to say much. Give a folder of other clips by --reference, or hold out more"
        )
    reference = ears.embeddings(_with_bar(_held_out(ears, examples, clips, frames), count, "hearing held-out clips"))
    base, tuned = (
        ears.embeddings(_with_bar(_read(ears, paths, sounds.seconds), made, f"hearing {whose}"))
        for whose, paths in (("the base model", sounds.base), ("the tuned model", sounds.tuned))
    )
    try:
        found: dict[str, dict[str, Any]] = {
            name: {
                "distances": compare_distances(
                    reference[name], base[name], tuned[name], paired=sounds.paired, seed=seed
                )
            }
            for name in reference
        }
    except ValueError as error:
        raise DataError(f"the held-out clips cannot be compared with ({error}): give clips that differ") from error
    not_run = list(ears.not_run)
    if ears.clap is not None:
        text, why_not = _text_score(ears.clap, sounds.captions, base["clap"], tuned["clap"], seed)
        found["clap"] |= {"model": ears.clap.name} | ({} if text is None else {"text": text})
        not_run += why_not
    return {
        "format": FORMAT, "version": VERSION, "clips": count, "generated": made, "few": min(count, made) < FEW,
        "seconds": seconds, "embeddings": found, "not_run": not_run,
    }  # fmt: skip


def seconds_of_prompts(examples: Examples, prompts: Sequence[Prompt], frames: int, rate_hz: float) -> list[float]:
    """How much of each prompt's sound is judged: as much as there is of its clip, at most so many frames."""
    return [min(frames, int(examples.codes.frames[prompt.clip, 0])) / rate_hz for prompt in prompts]


def _held_out(ears: Ears, examples: Examples, clips: Sequence[int], frames: int) -> Iterator[np.ndarray]:
    """The beginning of each clip, as the codec makes it of its codes, and as loud as it is written to a file."""
    for clip in clips:
        length = min(frames, int(examples.codes.frames[clip, 0]))
        codes_KT = torch.from_numpy(examples.codes.crop(clip, 0, 0, length).astype("int64"))
        sound = decode(ears.codec, codes_KT)
        yield sound / max(1.0, float(np.abs(sound).max()))


def _read(ears: Ears, paths: Sequence[Path], seconds: Sequence[float]) -> Iterator[np.ndarray]:
    for path, length in zip(paths, seconds, strict=True):
        sound = sound_of_file(path, ears.sample_rate_hz, ears.channels, length)
        if len(sound) < ears.codec.config.hop_length:
            raise DataError(f"{path} cannot be judged: its {len(sound)} samples are less than a frame of the codec")
        yield sound


def _with_bar(sounds: Iterable[np.ndarray], total: int, about: str) -> Iterator[np.ndarray]:
    yield from tqdm(sounds, total=total, desc=about, leave=False, delay=2.0)


def _text_score(
    clap: Clap, captions: Sequence[str] | None, base_MD: np.ndarray, tuned_MD: np.ndarray, seed: int
) -> tuple[Mapping[str, Any] | None, list[str]]:
    """Cosines of each sound and its caption, or why there are none."""
    if captions is None:
        return None, ["clap, text: sounds that were given have no captions"]
    distinct = sorted({caption for caption in captions if caption.strip()})
    if not distinct:
        return None, ["clap, text: no held-out clip has a caption"]
    vectors = clap.text_embeddings(distinct)
    if texts_are_alike(vectors):
        return None, [f"clap, text: {clap.name} gives different captions the same vector; {CLAP_ADVICE}"]
    rows = {caption: vector for caption, vector in zip(distinct, vectors, strict=True)}
    have = [index for index, caption in enumerate(captions) if caption in rows]
    if len(have) < LEAST_CLIPS:
        return None, [f"clap, text: {len(have)} of the clips have a caption"]
    texts = np.stack([rows[captions[index]] for index in have])
    cosines = [(texts * sounds_MD[have]).sum(axis=1) for sounds_MD in (base_MD, tuned_MD)]
    return compare_means(cosines[0], cosines[1], seed=seed), []
