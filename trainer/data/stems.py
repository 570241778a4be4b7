"""What of a sound its melody is heard in: all of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from trainer.data import audio
from trainer.data.excerpt import Excerpt
from trainer.data.peers import Peers
from trainer.errors import ConfigError


class Mix:
    """The sound as it is, all instruments and voices together."""

    key = "mix"

    def blocks(
        self, sound: Path | bytes, sample_rate_hz: int, block_seconds: float, excerpt: Excerpt | None
    ) -> Iterator[np.ndarray]:
        """The sound as mono float32 blocks (n,), see `audio.stream`."""
        return audio.stream(sound, sample_rate_hz, block_seconds, excerpt)


def stems_of(flag: str, device: torch.device, peers: Peers | None = None) -> Mix:
    """What --stems comes to."""
    if flag == "demucs":
        raise ConfigError("--stems demucs: this version hears melodies in the full mix alone: give --stems mix")
    return Mix()
