"""The sounds that a score judges: what base and tuned model make of the captions of held-out clips, kept to be heard.

score_sounds/base/0001_slow_rock.flac   16 bit, at the model's rate; the number is the prompt's
score_sounds/base/sounds.json           all that the sounds depend on; where it says something else, they are made anew

A call that was stopped goes on behind the last sound that is complete.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import soundfile
import torch
from tqdm import tqdm

from trainer.atomic import names_in, write_whole
from trainer.data.batches import Examples
from trainer.data.melody_places import melody_places
from trainer.data.text_states import text_states
from trainer.errors import StorageError
from trainer.evaluation.generation import Request, Sampling, decode, generate_all
from trainer.evaluation.samples import file_name, write_sound
from trainer.model.language_model import load_language_model
from trainer.model.source import Source, free_unused, load_codec, load_text_encoder

FOLDER, ABOUT = "score_sounds", "sounds.json"
AT_ONCE = 32  # sounds that are given to `generate_all` together, and then written
_SOUND = re.compile(r"\d{4,}_.*\.flac(\.partial)?")


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One sound to make: clip `clip` of the examples, whose caption, and for a melody model melody, it is made of."""

    number: int
    clip: int
    caption: str


def prompts_of(examples: Examples, clips: Sequence[int], count: int, seed: int) -> list[Prompt]:
    """`count` of the clips, or all, in an order drawn by the seed: a larger count begins with what a smaller one is."""
    order = np.random.default_rng(seed).permutation(np.array(clips, np.int64))[:count]
    return [
        Prompt(number=number, clip=int(clip), caption=examples.captions[clip] or "")
        for number, clip in enumerate(order, start=1)
    ]


def make_sounds(
    source: Source,
    examples: Examples,
    clips: Sequence[int],
    prompts: Sequence[Prompt],
    folder: Path,
    device: torch.device,
    *,
    frames: int,
    sampling: Sampling,
) -> list[Path]:
    """The sound file of each prompt, of so many frames; those that `folder` has already are not made again.

    clips     from which the prompts were drawn, by index
    sampling  the prompt with number n draws from the seed `sampling.seed` + n, whatever the model: base and tuned
              model have the same draws

    Raises StorageError where they cannot be written, ModelError for weights that are not usable.
    """
    about = {
        "format": "musicgen-trainer score sounds", "version": 1, "model": source.probe(),
        "codec": source.codec_identity(), "text": source.text_identity(), "frames": frames, **asdict(sampling),
        "clips": [[examples.names[clip], examples.captions[clip]] for clip in clips],
    }  # fmt: skip
    if source.melody:
        about["melodies"] = _melodies_digest(examples, clips)
    paths = [folder / f"{prompt.number:04d}_{file_name(1, prompt.caption, 'flac')[3:]}" for prompt in prompts]
    try:
        _begin(folder, about)
        missing = [(prompt, path) for prompt, path in zip(prompts, paths, strict=True) if not path.is_file()]
        if missing:
            _make(source, examples, missing, device, frames=frames, sampling=sampling)
    except (OSError, soundfile.LibsndfileError) as error:
        raise StorageError(f"the sounds in {folder} cannot be written ({error}): make room there") from error
    return paths


def _begin(folder: Path, about: dict[str, object]) -> None:
    """Make the folder; sounds that were made of something else go, files of other names stay."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(about, indent=1)
    try:
        is_the_same = (folder / ABOUT).read_text(encoding="utf-8") == text
    except (OSError, ValueError):
        is_the_same = False
    if not is_the_same:
        for name in names_in(folder):
            if _SOUND.fullmatch(name):
                (folder / name).unlink()
        write_whole(folder / ABOUT, text.encode())


def _make(
    source: Source,
    examples: Examples,
    missing: Sequence[tuple[Prompt, Path]],
    device: torch.device,
    *,
    frames: int,
    sampling: Sampling,
) -> None:
    encoder, tokenizer = load_text_encoder(source).to(device), source.load_tokenizer()
    states = [text_states(encoder, tokenizer, prompt.caption) for prompt, _ in missing]
    del encoder  # it leaves the device before the decoder comes
    free_unused(device)
    model, codec = load_language_model(source).to(device).eval(), load_codec(source).to(device)
    requests = [
        Request(
            text_SD=text_SD,
            generator=torch.Generator().manual_seed(sampling.seed + prompt.number),
            melody_C=_melody(examples, prompt.clip),
        )
        for (prompt, _), text_SD in zip(missing, states, strict=True)
    ]
    for start in tqdm(range(0, len(missing), AT_ONCE), desc=f"generating with {source.name}", leave=False):
        made = generate_all(model, requests[start : start + AT_ONCE], frames=frames, sampling=sampling)
        assert made is not None, "nothing stops it"
        for (_, path), codes_KT in zip(missing[start:], made, strict=False):
            write_sound(path, decode(codec, codes_KT), source.sample_rate_hz)
    del model, codec
    free_unused(device)


def _melodies_digest(examples: Examples, clips: Sequence[int]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for clip in clips:
        notes = _melody(examples, clip)
        digest.update(b"none" if notes is None else notes.numpy().tobytes())
    return digest.hexdigest()


def _melody(examples: Examples, clip: int) -> torch.Tensor | None:
    """The notes of the clip's beginning, of a whole segment as in training; None for a text model."""
    if examples.melodies is None:
        return None
    frames = min(int(examples.codes.frames[clip, 0]), examples.segment_frames)
    return melody_places(examples.melodies.crop(clip, 0, 0, frames))
