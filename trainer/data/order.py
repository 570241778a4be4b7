"""Which clips form each optimizer step, and how each is cropped: a function of (seed, epoch, clip, crop) alone.

Every epoch has a permutation of its crops, of which each clip has one, or with `by_duration` as many as segments fit
into it. These stand end to end, and are cut into steps of `global_batch` crops.
Ranks, micro-batches and accumulation only decide who computes a row. No random number is drawn from a generator that
goes on from the one before, so that a resumed run has no random state to restore.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from trainer.data.crops import start_beside

# What a draw is for: each purpose has random numbers of its own. Other values would change every run's clips and crops.
PERMUTATION, CROP, TEXT, MELODY = 1, 2, 3, 4


@dataclass(frozen=True, kw_only=True)
class Order:
    """What the order of a whole run depends on.

    global_batch       crops per optimizer step
    segment_frames     the most codec frames of a crop
    codebooks          K
    channels           of the sound, on which the codebooks' delays depend
    caption_drop_rate  probability in [0, 1] that a row has no condition at all: no caption and no melody
    melody_drop_rate   probability in [0, 1] that a row that has a caption has no melody; 0 for text models
    frames             (clips, views) int64: the frames that each cached view of a clip has
    max_steps          the most steps of the run; None for no such limit
    by_duration        whether an epoch has as many crops of a clip as whole segments fit into it, and at least one
    texts              (clips,) int64: among how many texts a clip's text is drawn; None where each clip has one text
    """

    seed: int
    epochs: int
    global_batch: int
    segment_frames: int
    codebooks: int
    caption_drop_rate: float
    frames: np.ndarray
    max_steps: int | None = None
    texts: np.ndarray | None = None
    by_duration: bool = False
    channels: int = 1
    melody_drop_rate: float = 0.0

    @property
    def clips(self) -> int:
        return len(self.frames)

    @property
    def crops_per_epoch(self) -> int:
        """How many crops an epoch has of all clips together."""
        return int(self._crops_until[-1])

    @property
    def steps(self) -> int:
        """Optimizer steps of the run: epochs x crops / global batch, rounded up, or max_steps where that is less."""
        steps = math.ceil(self.epochs * self.crops_per_epoch / self.global_batch)
        return steps if self.max_steps is None else min(steps, self.max_steps)

    def epoch_of(self, step: int) -> float:
        """Epochs completed after `step` optimizer steps."""
        return min(step * self.global_batch / self.crops_per_epoch, float(self.epochs))

    def crops_of(self, clip: int) -> int:
        """How many crops an epoch has of a clip."""
        return max(1, self.least_frames(clip) // self.segment_frames) if self.by_duration else 1

    def least_frames(self, clip: int) -> int:
        """The frames that every view of a clip has: at most one fewer than some have."""
        return int(self.frames[clip].min())

    def clip_and_crop(self, place: int) -> tuple[int, int]:
        """The clip and the number of its crop at a place among `crops_per_epoch`, in the order of the clips."""
        clip = int(np.searchsorted(self._crops_until, place, side="right"))
        return clip, place - (int(self._crops_until[clip - 1]) if clip else 0)

    @property
    def crops_of_clips(self) -> np.ndarray:
        """(clips,) int64: how many crops an epoch has of each clip."""
        return np.diff(self._crops_until, prepend=0)

    @cached_property
    def _crops_until(self) -> np.ndarray:
        """(clips,) int64: how many crops an epoch has of the clips up to each, itself included."""
        if not self.by_duration:
            return np.arange(1, self.clips + 1)
        return np.cumsum(np.maximum(1, self.frames.min(axis=1) // self.segment_frames))



@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of a step: frames [start, start + frames) of one view of a clip, with a text or without.

    drop_caption  whether the row is trained without text, as a null condition
    drop_melody   whether it is trained without its melody, as a null condition too; always with `drop_caption`
    text          which of the clip's texts it is trained with, from 0
    crop          which of the clip's crops of this epoch it is, from 0
    weight        1; or 0 for a filler, which stands in a micro-batch that has no row, and adds nothing to loss and
                  gradient
    """

    clip: int
    epoch: int
    view: int
    start: int
    frames: int
    drop_caption: bool
    drop_melody: bool = False
    text: int = 0
    crop: int = 0
    weight: int = 1


def rows_of_step(order: Order, step: int) -> list[Row]:
    """Rows of optimizer step `step` (0-based), longest first, the same on every rank; fillers excluded.

    A step may span two epochs, and the last step may be short. Rows are sorted by length so that a micro-batch can
    have rows of similar length and little padding (trainer/data/cut.py); apart from rounding, the loss of a step does
    not depend on it.
    """
    first = step * order.global_batch
    crops = order.crops_per_epoch
    last = min(first + order.global_batch, order.epochs * crops)
    rows = []
    for epoch in range(first // crops, math.ceil(last / crops)):
        places = permutation(order.seed, epoch, crops)
        start, stop = max(first - epoch * crops, 0), min(last - epoch * crops, crops)
        rows += [draw(order, epoch, *order.clip_and_crop(int(place))) for place in places[start:stop]]
    return sorted(rows, key=lambda row: (-row.frames, row.epoch, row.clip, row.crop))


@lru_cache(maxsize=8)
def permutation(seed: int, epoch: int, crops: int) -> np.ndarray:
    """Order of the crops in an epoch: (crops,) int64, each once."""
    return np.argsort(_random_integers(seed, PERMUTATION, epoch, count=crops), kind="stable")


def draw(order: Order, epoch: int, clip: int, crop: int = 0) -> Row:
    """View, place and caption of one of a clip's crops in an epoch.

    Crop 0 of a clip longer than the segment is drawn uniformly. The others stand beside it (trainer/data/crops.py).
    """
    draws = _random_integers(order.seed, CROP, epoch, clip, *_number(crop), count=3)
    view_draw, start_draw, drop_draw = (int(one) for one in draws)
    # A draw is in [0, 2^64): n x draw / 2^64, rounded down, is one of 0 to n - 1, all equally probable.
    view = view_draw * order.frames.shape[1] >> 64
    available = int(order.frames[clip, view])
    frames = min(available, order.segment_frames)
    if crop == 0:
        start = start_draw * (available - frames + 1) >> 64
    else:
        start = start_beside(
            draw(order, epoch, clip).start, start_draw, crop,
            crops=order.crops_of(clip), segment=frames, available=order.least_frames(clip),
        )
    drop_caption = drop_draw < order.caption_drop_rate * 2**64
    return Row(
        clip=clip,
        epoch=epoch,
        view=view,
        start=start,
        frames=frames,
        drop_caption=drop_caption,
        # Guidance moves away from what the model makes without any condition: that is what both are dropped for, as in
        # audiocraft, whose draw for guidance is for all conditions.
        drop_melody=drop_caption or _draws_no_melody(order, epoch, clip, crop),
        text=_drawn_text(order, epoch, clip, crop),
        crop=crop,
    )


def _drawn_text(order: Order, epoch: int, clip: int, crop: int) -> int:
    if order.texts is None:
        return 0
    drawn = int(_random_integers(order.seed, TEXT, epoch, clip, *_number(crop), count=1)[0])
    return drawn * int(order.texts[clip]) >> 64


def _draws_no_melody(order: Order, epoch: int, clip: int, crop: int) -> bool:
    if order.melody_drop_rate == 0:
        return False
    drawn = int(_random_integers(order.seed, MELODY, epoch, clip, *_number(crop), count=1)[0])
    return drawn < order.melody_drop_rate * 2**64


def _number(crop: int) -> tuple[int, ...]:
    """What a crop's number adds to the entropy: nothing for crop 0, which is drawn as a clip's only one."""
    return (crop,) if crop else ()


def valid_cells(rows: Sequence[Row], codebooks: int, segment_frames: int, channels: int = 1) -> np.ndarray:
    """How many codes of these rows each codebook learns to predict: (K,) int64, fillers excluded.

    The delay pattern shifts codebook k right by d = k // channels steps. Of a clip of L frames it has
    min(L, segment_frames - d) codes: its last ones are pushed out only where the clip fills the segment.
    Source: audiocraft 1.3.0 with tokens.padding_with_special_token, which pads every clip to the segment.
    """
    frames = np.array([row.frames for row in rows if row.weight], dtype=np.int64)
    limits = segment_frames - np.arange(codebooks) // channels
    return np.minimum(frames[:, None], np.maximum(limits, 0)[None]).sum(axis=0)


def steps_of(frames: int, largest_delay: int, segment_frames: int) -> int:
    """Decoder steps that a clip of `frames` frames needs.

    The delays add a tail of `largest_delay` steps, as far as the segment has room. Without it the last codes of the
    later codebooks would not be trained, and a clip's ending with them.
    """
    return min(frames + largest_delay, segment_frames)


def _random_integers(*entropy: int, count: int) -> np.ndarray:
    """(count,) uint64, uniform in [0, 2^64), a function of `entropy` alone.

    Not a numpy Generator, whose methods may give other numbers in another version of numpy; SeedSequence's algorithm
    is fixed across versions.
    """
    return np.random.SeedSequence(entropy).generate_state(count, np.uint64)
