"""Which clips form each optimizer step, and how each is cropped: a function of (seed, epoch, clip) alone.

The stream of clips is the concatenation of the epochs' permutations, cut into steps of `global_batch`.
Ranks, micro-batches and accumulation only decide who computes a row. Nothing is drawn from a stream, so
there is no random state to save.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

# Separate the draws of one (seed, epoch, clip) by what they are for.
PERMUTATION, CROP, TEXT = 1, 2, 3


@dataclass(frozen=True, kw_only=True)
class Order:
    """The whole run's order.

    frames  (clips, views): the frames that each cached view of a clip has
    texts   (clips,): how many texts a clip's caption is drawn from; None where each has one
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
        """Optimizer steps of the run: ceil(epochs x clips / global batch), or max_steps where that is less."""
        steps = math.ceil(self.epochs * self.clips / self.global_batch)
        return steps if self.max_steps is None else min(steps, self.max_steps)

    def epoch_of(self, step: int) -> float:
        """Epochs completed after `step` optimizer steps."""
        return min(step * self.global_batch / self.clips, float(self.epochs))


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of a step: frames [start, start + frames) of one view of a clip, with its caption or without.

    `text` numbers the text that its caption is, of those that it is drawn from. A filler has weight 0 and only
    completes a micro-batch.
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

    A step may span two epochs; the last one may be short. Sorting by length lets rows of like length meet
    in a micro-batch; the loss of a step does not depend on it.
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
    return np.argsort(_words(seed, PERMUTATION, epoch, count=clips), kind="stable")


def draw(order: Order, epoch: int, clip: int) -> Row:
    """View, crop and caption of a clip in an epoch; a clip longer than the segment is cropped uniformly."""
    view_word, start_word, drop_word = (int(word) for word in _words(order.seed, CROP, epoch, clip, count=3))
    view = view_word * order.frames.shape[1] >> 64
    available = int(order.frames[clip, view])
    frames = min(available, order.segment_frames)
    return Row(
        clip=clip,
        epoch=epoch,
        view=view,
        start=start_word * (available - frames + 1) >> 64,
        frames=frames,
        drop_caption=drop_word < order.caption_drop_rate * 2**64,
        text=_drawn_text(order, epoch, clip),
    )


def _drawn_text(order: Order, epoch: int, clip: int) -> int:
    if order.texts is None:
        return 0
    return int(_words(order.seed, TEXT, epoch, clip, count=1)[0]) * int(order.texts[clip]) >> 64


def micro_batches(
    rows: Sequence[Row], *, micro_batch: int, accumulation: int, world_size: int, rank: int
) -> list[list[Row]]:
    """This rank's share of a step: at most `accumulation` micro-batches of `micro_batch` rows each.

    Micro-batch i of all ranks together is a run of neighbours in `rows`, so that ranks wait little for
    each other. What is missing is filled with repeats of weight 0; see `filled_micro_batches` for how many
    there are.
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
    """Micro-batches that every rank has in a step of so many rows: none of fillers alone on all ranks."""
    return math.ceil(rows / (micro_batch * world_size))


def valid_cells(rows: Sequence[Row], codebooks: int, segment_frames: int) -> np.ndarray:
    """Cells that rows contribute to each codebook's loss: (K,) int64, fillers excluded.

    Codebook k of a clip of L frames has min(L, segment_frames - k): its diagonal tail falls off only where
    the clip fills the segment (audiocraft with padding_with_special_token pads to the segment).
    """
    frames = np.array([row.frames for row in rows if row.weight], dtype=np.int64)
    limits = segment_frames - np.arange(codebooks)
    return np.minimum(frames[:, None], np.maximum(limits, 0)[None]).sum(axis=0)


def _words(*entropy: int, count: int) -> np.ndarray:
    """`count` uniform uint64 from integers; SeedSequence's algorithm is fixed across numpy versions."""
    return np.random.SeedSequence(entropy).generate_state(count, np.uint64)
