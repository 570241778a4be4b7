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
    is_exact         whether a file with fewer than that is cut off; if not, it may as well be wrong about its length
    remark           what about the file is unusual and what was done; "" for nothing
    """

    format: str
    rate_hz: int
    channels: int
    declared_frames: int | None
    is_exact: bool
    remark: str

    def blocks(self, block_frames: int) -> Iterator[np.ndarray]:
        """Blocks (n, channels) float32 of `block_frames` samples, the last one of fewer; full scale is 1.

        A block may be overwritten by the next one. Raises AudioFault where decoding fails.
        """
