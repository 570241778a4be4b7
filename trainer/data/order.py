"""Which clips form each optimizer step, and how each is cropped: a function of (seed, epoch, clip) alone.

Every epoch has a permutation of the clips. These stand end to end, and are cut into steps of `global_batch` clips.
Ranks, micro-batches and accumulation only decide who computes a row. No random number is drawn from a generator that
goes on from the one before, so that a resumed run has no random state to restore.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

# What a draw is for: each purpose has random numbers of its own. Other values would change every run's clips and crops.
PERMUTATION, CROP, TEXT = 1, 2, 3


@dataclass(frozen=True, kw_only=True)
class Order:
    """What the order of a whole run depends on.

    global_batch       clips per optimizer step
    segment_frames     the most codec frames of a crop
    codebooks          K
    caption_drop_rate  probability in [0, 1] that a row has no caption
    frames             (clips, views) int64: the frames that each cached view of a clip has
    max_steps          the most steps of the run; None for no such limit
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

    @property
    def clips(self) -> int:
        return len(self.frames)

    @property
    def steps(self) -> int:
        """Optimizer steps of the run: epochs x clips / global batch, rounded up, or max_steps where that is less."""
        steps = math.ceil(self.epochs * self.clips / self.global_batch)
        return steps if self.max_steps is None else min(steps, self.max_steps)

    def epoch_of(self, step: int) -> float:
        """Epochs completed after `step` optimizer steps."""
        return min(step * self.global_batch / self.clips, float(self.epochs))


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of a step: frames [start, start + frames) of one view of a clip, with a text or without.

    drop_caption  whether the row is trained without text, as a null condition
    text          which of the clip's texts it is trained with, from 0
    weight        1; or 0 for a filler, which completes a micro-batch and adds nothing to loss and gradient
    """

    clip: int
    epoch: int
    view: int
    start: int
    frames: int
    drop_caption: bool
    text: int = 0
    weight: int = 1


def rows_of_step(order: Order, step: int) -> list[Row]:
    """Rows of optimizer step `step` (0-based), longest first, the same on every rank; fillers excluded.

    A step may span two epochs, and the last step may be short. Rows are sorted by length so that a micro-batch has
    rows of similar length and little padding; apart from rounding, the loss of a step does not depend on it.
    """
    first = step * order.global_batch
    last = min(first + order.global_batch, order.epochs * order.clips)
    rows = []
    for epoch in range(first // order.clips, math.ceil(last / order.clips)):
        clips = permutation(order.seed, epoch, order.clips)
        start, stop = max(first - epoch * order.clips, 0), min(last - epoch * order.clips, order.clips)
        rows += [draw(order, epoch, int(clip)) for clip in clips[start:stop]]
    return sorted(rows, key=lambda row: (-row.frames, row.epoch, row.clip))


@lru_cache(maxsize=8)
def permutation(seed: int, epoch: int, clips: int) -> np.ndarray:
    """Order of the clips in an epoch: (clips,) int64, each clip once."""
    return np.argsort(_random_integers(seed, PERMUTATION, epoch, count=clips), kind="stable")


def draw(order: Order, epoch: int, clip: int) -> Row:
    """View, crop and caption of a clip in an epoch; a clip longer than the segment is cropped uniformly."""
    draws = _random_integers(order.seed, CROP, epoch, clip, count=3)
    view_draw, start_draw, drop_draw = (int(one) for one in draws)
    # A draw is in [0, 2^64): n x draw / 2^64, rounded down, is one of 0 to n - 1, all equally probable.
    view = view_draw * order.frames.shape[1] >> 64
    available = int(order.frames[clip, view])
    frames = min(available, order.segment_frames)
    return Row(
        clip=clip,
        epoch=epoch,
        view=view,
        start=start_draw * (available - frames + 1) >> 64,
        frames=frames,
        drop_caption=drop_draw < order.caption_drop_rate * 2**64,
        text=_drawn_text(order, epoch, clip),
    )


def _drawn_text(order: Order, epoch: int, clip: int) -> int:
    if order.texts is None:
        return 0
    return int(_random_integers(order.seed, TEXT, epoch, clip, count=1)[0]) * int(order.texts[clip]) >> 64


def micro_batches(
    rows: Sequence[Row], *, micro_batch: int, accumulation: int, world_size: int, rank: int
) -> list[list[Row]]:
    """This rank's share of a step: at most `accumulation` micro-batches of `micro_batch` rows each.

    The micro-batches that all ranks compute at the same time are neighbours in `rows`, and so of similar length, so
    that ranks wait little for each other. Where rows are missing, the last row stands again with weight 0. All ranks
    have equally many micro-batches, see `filled_micro_batches`. Raises ValueError where the rows do not fit.
    """
    capacity = micro_batch * accumulation * world_size
    if not 0 < len(rows) <= capacity:
        raise ValueError(f"{len(rows)} rows do not fit {accumulation} x {world_size} micro-batches of {micro_batch}")
    used = filled_micro_batches(len(rows), micro_batch=micro_batch, world_size=world_size)
    filler = replace(rows[-1], weight=0)
    padded = [*rows, *[filler] * (used * micro_batch * world_size - len(rows))]
    starts = [(index * world_size + rank) * micro_batch for index in range(used)]
    return [padded[start : start + micro_batch] for start in starts]


def filled_micro_batches(rows: int, *, micro_batch: int, world_size: int) -> int:
    """How many micro-batches every rank has in a step of so many rows: no more than needed to hold them all."""
    return math.ceil(rows / (micro_batch * world_size))


def valid_cells(rows: Sequence[Row], codebooks: int, segment_frames: int) -> np.ndarray:
    """How many codes of these rows each codebook learns to predict: (K,) int64, fillers excluded.

    The delay pattern shifts codebook k right by k steps. Of a clip of L frames it has min(L, segment_frames - k)
    codes: its last ones are pushed out only where the clip fills the segment.
    Source: audiocraft 1.3.0 with tokens.padding_with_special_token, which pads every clip to the segment.
    """
    frames = np.array([row.frames for row in rows if row.weight], dtype=np.int64)
    limits = segment_frames - np.arange(codebooks)
    return np.minimum(frames[:, None], np.maximum(limits, 0)[None]).sum(axis=0)


def _random_integers(*entropy: int, count: int) -> np.ndarray:
    """(count,) uint64, uniform in [0, 2^64), a function of `entropy` alone.

    Not a numpy Generator, whose methods may give other numbers in another version of numpy; SeedSequence's algorithm
    is fixed across versions.
    """
    return np.random.SeedSequence(entropy).generate_state(count, np.uint64)
