"""Which prompts a run plays while it trains: those that were given, or some captions and one text that is new to it."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from trainer.errors import ConfigError, DataError

if TYPE_CHECKING:
    from torch import Tensor

Origin = Literal["caption", "unknown", "given", "continuation"]
ALL_CAPTIONS = "captions"  # the value of --sample_prompts that stands for all captions of the data set
CAPTIONS = 3  # of the data set, where no prompts are given
MOST_PROMPTS = 100
# Plain texts; one that no clip has shows what the run does to everything else that the model knows.
UNKNOWN = (
    "a calm piano piece with soft strings",
    "energetic rock with electric guitar and drums",
    "slow jazz with a warm saxophone",
    "electronic dance music with a deep bass",
    "acoustic folk song with guitar",
)
# What the draws are for, so that no two of them are the same numbers.
OF_CAPTIONS, OF_CONTINUATION = 1, 2


@dataclass(frozen=True, kw_only=True)
class SamplePrompt:
    """What one sound is made of.

    text       the prompt; "" is the null condition
    seed       of its draws: that of `generate.py --seed` which gives the same codes
    origin     a caption of the data set, a text that it does not have, one that was given, or a clip that is continued
    clip       the name of the clip that has this caption, or that is continued; None for neither
    prefix_KT  (K, P) int64 in [0, V), the codes that are continued; None for a sound from nothing
    clip_KT    (K, C) int64 in [0, V), the codes of that clip's beginning, to be heard beside; None without a clip
    melody_C   (C,) int64 in [0, 12), the notes of that clip's beginning for a melody model; None for the null melody
    """

    text: str
    seed: int
    origin: Origin
    clip: str | None = None
    prefix_KT: Tensor | None = field(default=None, compare=False)
    clip_KT: Tensor | None = field(default=None, compare=False)
    melody_C: Tensor | None = field(default=None, compare=False)


def read_prompts(text: str) -> list[str]:
    """The prompts of --sample_prompts: the lines of a text file, or what stands between the | of the text itself.

    Blank ones are left out. Raises ConfigError where a file cannot be read or is not there, or where a list is empty;
    DataError for an empty file.
    """
    is_file = "|" not in text and _names_a_file(text)
    if is_file:
        try:
            lines = Path(os.path.expanduser(text)).read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"--sample_prompts {text} cannot be read as a text file in UTF-8 ({error}): name a file with one prompt"
                " a line, or give the prompts themselves with | between them"
            ) from error
    else:
        lines = text.split("|")
    prompts = [" ".join(line.split()) for line in lines if line.strip()]
    if not prompts and is_file:
        raise DataError(f"--sample_prompts {text} is empty: write one prompt a line")
    if not prompts:
        raise ConfigError(f"--sample_prompts {text!r} holds no prompt: give some with | between them, or leave it out")
    if not is_file and any("\ud800" <= sign <= "\udfff" for sign in text):
        raise ConfigError(
            f"--sample_prompts {text!a} is no UTF-8, in which the terminal has to send it: write the prompts into"
            " a text file in UTF-8 and name that"
        )
    if len(prompts) > MOST_PROMPTS:
        raise too_many(text, len(prompts))
    return prompts


def too_many(given: str, prompts: int) -> ConfigError:
    """What is raised for more prompts than a run plays."""
    return ConfigError(
        f"--sample_prompts {given[:80]} has {prompts:,} prompts, each of which is played each time: give"
        f" {MOST_PROMPTS} at most"
    )


def all_captions(captions: Sequence[str | None]) -> list[str]:
    """The distinct captions of a data set, in its order. Raises ConfigError where there are none, or too many."""
    distinct = list(dict.fromkeys(caption for caption in captions if caption and caption.strip()))
    if not distinct:
        raise ConfigError(f"--sample_prompts {ALL_CAPTIONS}: no clip has a caption. Leave it out, or give prompts")
    if len(distinct) > MOST_PROMPTS:
        raise too_many(ALL_CAPTIONS, len(distinct))
    return distinct


def _names_a_file(text: str) -> bool:
    """Whether a text without | is the name of a file: one that is there, or one without spaces that looks like it."""
    looks_like_one = re.fullmatch(r"\S+\.(txt|text|md|csv|json)|~?\S*[/\\]\S*", text, re.IGNORECASE) is not None
    return looks_like_one or os.path.isfile(os.path.expanduser(text))


def chosen(
    given: Sequence[str] | None,
    captions: Sequence[str | None],
    names: Sequence[str],
    seed: int,
    *,
    put_into: Callable[[str], str | None] = str,
    continuation: SamplePrompt | None = None,
) -> list[SamplePrompt]:
    """The prompts that were given; or else some captions of the clips, drawn by the seed, and a text that none has.

    Of several with the same text the second has the next seed, the third the one after, and so on: the same seed would
    give the same sound.

    given         the texts; of one that is a clip's caption the clip is named
    captions      what each clip is trained with; None or "" for none. Where no clip has one, "" is played four times
    names         of the clips
    put_into      puts into a text what stands in every caption of the run: a --trigger or a --placeholder
    continuation  one more, which comes last
    """
    if given is not None:
        clip_of = {caption: name for caption, name in zip(reversed(captions), reversed(names), strict=True) if caption}
        texts = [put_into(text) or "" for text in given]
        prompts = [
            SamplePrompt(text=text, seed=seed, origin="caption" if text in clip_of else "given", clip=clip_of.get(text))
            for text in texts
        ]
    else:
        prompts = _of_captions(captions, names, seed, put_into)
    seen: dict[str, int] = {}
    for index, prompt in enumerate(prompts := [*prompts, *filter(None, [continuation])]):
        seen[prompt.text] = before = seen.get(prompt.text, -1) + 1
        prompts[index] = replace(prompt, seed=seed + before)
    return prompts


def _of_captions(
    captions: Sequence[str | None], names: Sequence[str], seed: int, put_into: Callable[[str], str | None]
) -> list[SamplePrompt]:
    found: dict[str, SamplePrompt] = {}
    for clip in _draws(seed, OF_CAPTIONS).permutation(len(captions)):
        text = captions[clip] or ""
        if text.strip() and len(found) < CAPTIONS:
            found.setdefault(text, SamplePrompt(text=text, seed=seed, origin="caption", clip=names[clip]))
    if not found:
        return [SamplePrompt(text="", seed=seed, origin="caption")] * (CAPTIONS + 1)
    known = {caption.casefold() for caption in captions if caption}
    first = seed % len(UNKNOWN)
    texts = [put_into(text) or "" for text in (*UNKNOWN[first:], *UNKNOWN[:first])]
    new = [SamplePrompt(text=text, seed=seed, origin="unknown") for text in texts if text.casefold() not in known]
    return [*found.values(), *new[:1]]


def clip_to_continue(frames: np.ndarray, least_frames: int, seed: int) -> int | None:
    """The index of a clip with more than `least_frames` frames, drawn by the seed; None where there is none.

    frames  (clips,) int64, of each clip
    """
    long_enough = np.flatnonzero(frames > least_frames)
    return int(_draws(seed, OF_CONTINUATION).choice(long_enough)) if len(long_enough) else None


def _draws(seed: int, purpose: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence((seed, purpose)))
