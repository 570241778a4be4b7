"""The codes of a sound file's first seconds, for a model to go on from."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import EncodecModel

from trainer.data import audio
from trainer.data.audio_fault import AudioFault
from trainer.data.codec import encode
from trainer.data.codec_windows import LEAST_CONTEXT_FRAMES
from trainer.errors import DataError


def codes_of_beginning(codec: EncodecModel, path: Path, seconds: float, channels: int = 1) -> Tensor:
    """The codes of the first `seconds` of a sound file, rounded to whole frames, (K, P) int64 in [0, V) on the CPU.

    channels  1 for a mono model, 2 for a stereo one, whose K codebooks are those of left and right in turn

    They are those that a run caches of the file's beginning, but for rounding: the codec hears what follows too.
    Raises DataError for a file that cannot be decoded, is shorter, or has samples there that are not numbers.
    """
    hop, rate = codec.config.hop_length, codec.config.sampling_rate
    frames = max(1, round(seconds * rate / hop))
    # The last convolution hears so many frames ahead, and what it hears of each reaches less than two frames further.
    heard = frames + codec.config.last_kernel_size // 2 + LEAST_CONTEXT_FRAMES
    try:
        [codes] = encode(codec, _first(heard * hop, path, rate, channels), offsets=[0], channels=channels)
    except AudioFault as fault:
        raise DataError(f"{path} cannot be continued: {fault}") from fault
    if codes.shape[1] < frames:
        raise DataError(
            f"{path} cannot be continued after {seconds:g} s: it has {codes.shape[1] * hop / rate:.2f} s. Take fewer"
            " seconds, or a longer sound"
        )
    return torch.from_numpy(codes[:, :frames].astype(np.int64))


def _first(samples: int, path: Path, rate: int, channels: int) -> Iterator[np.ndarray]:
    """The file's first samples at this rate, as blocks (n,), or (n, 2) for two channels. Raises AudioFault."""
    for block in audio.stream(path, rate, block_seconds=1.0, channels=channels):
        if not np.isfinite(block).all():
            raise AudioFault("not finite", "NaN or infinite samples at its beginning: repair or export it again")
        yield block[:samples]
        samples -= len(block)
        if samples <= 0:
            return
