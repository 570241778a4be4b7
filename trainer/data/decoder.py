"""What every decoder of sound files is, whatever library stands behind it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import numpy as np


class Decoder(Protocol):
    """An open sound file, decoded front to back, once, in constant memory.

    format           container and coding as the library names them: "WAV PCM_16", "MP3", "AAC"
    rate_hz          samples per second and channel
    channels         at least 1
    declared_frames  how many samples per channel the file says it has; None where it says nothing
    spare_frames     of those may be missing
    is_exact         whether a file that lacks more is cut off; if not, it may as well be wrong about its length
    remark           what about the file is unusual and what was done; "" for nothing
    """

    format: str
    rate_hz: int
    channels: int
    declared_frames: int | None
    spare_frames: int
    is_exact: bool
    remark: str

    def blocks(self, block_frames: int) -> Iterator[np.ndarray]:
        """Blocks (n, channels) float32 of `block_frames` samples, the last one of fewer; full scale is 1.

        A block may be overwritten by the next one. Raises AudioFault where decoding fails.
        """


def mono(block: np.ndarray) -> np.ndarray:
    """(n, channels) float32 to (n,) float32, the mean over channels; a single channel passes bit for bit.

    Of two channels it is numpy's mean to the bit, but for the sign of zeros. That sums along the short axis, and took
    a third or more of an inspection; two columns are added 6 times as fast.
    """
    match block.shape[1]:
        case 1:
            return block[:, 0]
        case 2:
            total = block[:, 0] + block[:, 1]
            return np.true_divide(total, 2, out=total)
        case _:
            return block.mean(axis=1, dtype=np.float32)


def stereo(block: np.ndarray) -> np.ndarray:
    """(n, channels) float32 to (n, 2) float32: a single channel twice, and of more than two the first two.

    Source: audiocraft 1.3.0, data/audio_utils.py, convert_audio_channels.
    """
    return np.repeat(block, 2, axis=1) if block.shape[1] == 1 else np.ascontiguousarray(block[:, :2])
