"""The part of a sound that is encoded, and what its samples are multiplied by."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Excerpt:
    """Samples [first_frame, first_frame + frames) of every channel, times `gain` (a float32), at the file's rate."""

    first_frame: int
    frames: int
    gain: float

    def of(self, blocks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """From blocks (n, channels) float32 of the whole sound those of the excerpt, none of them empty.

        All of `blocks` is read, also what comes behind the excerpt, because a file that is damaged there has failed.
        """
        begins, ends, done, gain = self.first_frame, self.first_frame + self.frames, 0, np.float32(self.gain)
        for block in blocks:
            part = block[max(0, begins - done) : max(0, ends - done)]
            done += len(block)
            if len(part):
                yield part if self.gain == 1 else part * gain
