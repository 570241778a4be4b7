"""Whether a model knows clips by heart: it is given the first seconds of a clip, and must go on as the clip does.

The protocol is that of MusicGen (arXiv 2306.05284, its part on memorisation), which follows MusicLM's (arXiv
2301.11325): a clip's caption and its first codes, then 5 s greedily, and the share of clips whose codes all come back
(exact) or to 80 % or more (partial), in the first codebook. Here all codebooks are counted as well, clips that were
never trained on stand beside as a control, and guidance is 1: what is asked is what the weights hold, which is what the
loss knows, and guidance moves the likeliest code away from it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from trainer.data.batches import Examples
from trainer.data.melody_places import melody_places
from trainer.data.text_states import text_states
from trainer.evaluation.generation import LEAST_FRAMES, Request, Sampling, generate_all
from trainer.model.language_model import LanguageModel, load_language_model
from trainer.model.source import Source, load_text_encoder

GREEDY = Sampling(guidance=1.0, greedy=True)
LEAST_COMPARED_FRAMES = 50  # a second: a clip of which less is left after the prompt is no test
REQUESTS_AT_ONCE = 16


@dataclass(frozen=True, kw_only=True)
class Clip:
    """The beginning of a clip, as training sees it where a crop starts with the clip: at most a segment.

    caption     "" where it has none
    codes_KT    int64, view 0
    trained_KT  bool: which of them are trained, see `trained_cells`
    melody_C    its notes as a melody model reads them; None where there are none
    whole       whether the clip ends here
    """

    name: str
    caption: str
    codes_KT: Tensor
    trained_KT: Tensor
    melody_C: Tensor | None
    whole: bool


@dataclass(frozen=True, kw_only=True)
class Shares:
    """How much of what was continued is as in the clips, in [0, 1].

    exact    of the clips: all codes equal
    partial  of the clips: 80 % of the codes or more
    equal    of the codes, the mean over the clips
    chance   the same between each output and the same places of the group's other clips, the mean over these pairs;
             None where there is no other clip that long
    """

    exact: float
    partial: float
    equal: float
    chance: float | None


@dataclass(frozen=True, kw_only=True)
class Row:
    """One group of clips, continued by one model after one length of prompt.

    group           "training" or "held out"
    model           "before" or "after" the training
    clips           how many are long enough for this prompt
    first_codebook  the first one of each channel
    """

    group: str
    model: str
    prompt_seconds: float
    clips: int
    first_codebook: Shares
    all_codebooks: Shares


@dataclass(frozen=True, kw_only=True)
class Prompted:
    """A language model, in eval mode, and what it reads of the captions it is asked with: (S, D), or None for none."""

    name: str
    model: LanguageModel
    texts: Mapping[str, Tensor | None]

    @property
    def channels(self) -> int:
        return int(self.model.decoder.config.audio_channels)


def prompted(source: Source, captions: Sequence[str], device: torch.device) -> Prompted:
    """The model on `device`, ready for these captions. Raises ModelError where weights do not fit."""
    encoder, tokenizer = load_text_encoder(source).to(device), source.load_tokenizer()
    texts = {caption: text_states(encoder, tokenizer, caption) for caption in dict.fromkeys(captions)}
    del encoder  # it leaves the device before the decoder comes
    return Prompted(name=source.name, model=load_language_model(source).to(device).eval(), texts=texts)


def chosen(examples: Examples, most: int, seed: int, without: Collection[int] = ()) -> list[int]:
    """`most` clips by index, drawn from all but those of `without`, and then in the order of their names."""
    long_enough = np.flatnonzero(examples.codes.frames[:, 0] >= LEAST_FRAMES).tolist()
    by_name = sorted(set(long_enough).difference(without), key=lambda clip: examples.names[clip])
    drawn = np.random.default_rng(seed).permutation(len(by_name))[:most]
    return [by_name[at] for at in sorted(drawn)]


def clip_of(examples: Examples, clip: int) -> Clip:
    """The clip of this index."""
    length = int(examples.codes.frames[clip, 0])
    frames = min(length, examples.segment_frames)
    codes_KT = torch.from_numpy(examples.codes.crop(clip, 0, 0, frames).astype(np.int64))
    melodies = examples.melodies
    return Clip(
        name=examples.names[clip],
        caption=examples.captions[clip] or "",
        codes_KT=codes_KT,
        trained_KT=trained_cells(codes_KT, examples.segment_frames, examples.shape.audio_channels),
        melody_C=None if melodies is None else melody_places(melodies.crop(clip, 0, 0, frames)),
        whole=frames == length,
    )


def trained_cells(codes_KT: Tensor, segment_frames: int, channels: int = 1) -> Tensor:
    """Which codes of a clip are trained, bool (K, T): all but the tail that the delays push out of a full segment.

    channels  of the sound: in stereo a pair of codebooks has one delay
    """
    codebooks, frames = codes_KT.shape
    return torch.arange(frames)[None] < segment_frames - torch.arange(codebooks)[:, None] // channels


def played(
    asked: Prompted, clips: Sequence[Clip], frames: Sequence[int], sampling: Sampling, *, given_frames: int = 0
) -> list[Tensor]:
    """What the model makes of each clip's caption, melody and first `given_frames` codes: (K, frames of that clip).

    frames  those that are given included
    """
    made: dict[int, Tensor] = {}
    at_of_frames: dict[int, list[int]] = defaultdict(list)
    for at, wanted in enumerate(frames):
        at_of_frames[wanted].append(at)
    with tqdm(total=len(clips), desc=f"generating with {asked.name}", leave=False) as bar:
        for wanted, places in at_of_frames.items():
            for first in range(0, len(places), REQUESTS_AT_ONCE):
                some = places[first : first + REQUESTS_AT_ONCE]
                requests = [_request(asked, clips[at], given_frames, sampling.seed + at) for at in some]
                codes = generate_all(asked.model, requests, frames=wanted, sampling=sampling)
                assert codes is not None, "nothing stops it"
                made |= zip(some, codes, strict=True)
                bar.update(len(some))
    return [made[at] for at in range(len(clips))]


def continued(
    asked: Prompted, clips: Sequence[Clip], *, given_frames: int, continued_frames: int
) -> tuple[Tensor, Tensor, Tensor]:
    """What the model continues clips with, what stands there in them, and which of these codes count.

    clips    long enough, see `compared_frames`
    returns  made, true (N, K, continued_frames) int64 and counted of that shape, bool; False behind a clip's end
    """
    delay = (len(clips[0].codes_KT) - 1) // asked.channels
    # Later codebooks of the last frames are predicted from what the first one has after them: in training the codes
    # that follow, and behind a clip's end none. So a few more are made where the clip goes on.
    wanted = [min(given_frames + continued_frames + delay, clip.codes_KT.shape[1]) for clip in clips]
    made = played(asked, clips, wanted, GREEDY, given_frames=given_frames)
    shape = len(clips), len(clips[0].codes_KT), continued_frames
    made_NKC, true_NKC = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
    counted_NKC = torch.zeros(shape, dtype=torch.bool)
    for row, (clip, codes_KT) in enumerate(zip(clips, made, strict=True)):
        frames = compared_frames(clip, given_frames, continued_frames)
        here = slice(given_frames, given_frames + frames)
        made_NKC[row, :, :frames] = codes_KT[:, here]
        true_NKC[row, :, :frames] = clip.codes_KT[:, here]
        counted_NKC[row, :, :frames] = clip.trained_KT[:, here]
    return made_NKC, true_NKC, counted_NKC


def compared_frames(clip: Clip, given_frames: int, continued_frames: int) -> int:
    """How many frames after the prompt are compared: as asked, or to the clip's end; 0 where that is under a second."""
    left = min(clip.codes_KT.shape[1] - given_frames, continued_frames)
    return left if left >= min(LEAST_COMPARED_FRAMES, continued_frames) else 0


def rows_of(
    asked: Prompted,
    clips: Sequence[Clip],
    *,
    group: str,
    model: str,
    prompt_seconds: Sequence[float],
    continued_frames: int,
    frame_rate_hz: float,
) -> list[Row]:
    """A row for each length of prompt for which there is a clip that is long enough."""
    rows = []
    for seconds in prompt_seconds:
        given_frames = round(seconds * frame_rate_hz)
        there = [clip for clip in clips if compared_frames(clip, given_frames, continued_frames)]
        if not there:
            continue
        made, true, counted = continued(asked, there, given_frames=given_frames, continued_frames=continued_frames)
        first = slice(asked.channels)
        rows.append(
            Row(
                group=group,
                model=model,
                prompt_seconds=seconds,
                clips=len(there),
                first_codebook=shares_of(made[:, first], true[:, first], counted[:, first]),
                all_codebooks=shares_of(made, true, counted),
            )
        )
    return rows


def shares_of(made_NKC: Tensor, true_NKC: Tensor, counted_NKC: Tensor) -> Shares:
    """The shares of N clips, whose codes are compared where they count; of each clip at least one does.

    made_NKC, true_NKC  int64
    counted_NKC         bool
    """
    # (clips, clips): how many codes of the output in the row are those of the clip in the column, and of how many.
    pairs = [
        ((made_KC == true_NKC) & counted_NKC & here_KC, counted_NKC & here_KC)
        for made_KC, here_KC in zip(made_NKC, counted_NKC, strict=True)
    ]
    equal_NN = torch.stack([equal.sum((1, 2)) for equal, _ in pairs])
    cells_NN = torch.stack([cells.sum((1, 2)) for _, cells in pairs])
    equal_N, cells_N = equal_NN.diagonal(), cells_NN.diagonal()
    others_NN = (cells_NN > 0) & ~torch.eye(len(made_NKC), dtype=torch.bool)
    return Shares(
        exact=float((equal_N == cells_N).double().mean()),
        partial=float((5 * equal_N >= 4 * cells_N).double().mean()),
        equal=float((equal_N.double() / cells_N).mean()),
        chance=float((equal_NN[others_NN].double() / cells_NN[others_NN]).mean()) if others_NN.any() else None,
    )


def _request(asked: Prompted, clip: Clip, given_frames: int, seed: int) -> Request:
    return Request(
        text_SD=asked.texts[clip.caption],
        generator=torch.Generator().manual_seed(seed),
        prefix_KT=clip.codes_KT[:, :given_frames] if given_frames else None,
        melody_C=clip.melody_C,
    )
