"""What audiocraft's melody conditioner needs of torchaudio, librosa and demucs while it is built.

None of them is installed beside a current torch. What stands in for them computes the same spectrogram (torch.stft) and
the same filter bank (transformers'), and takes the whole mix for what demucs would leave of it. What audiocraft finds
with the real ones is recorded in tests/data/recorded_chroma.json, and compared in test_audiocraft_chroma.py.
Source: torchaudio 2, transforms.Spectrogram; librosa 0.11, filters.chroma. Import only after `require_audiocraft()`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
from audiocraft.modules import chroma
from torch import Tensor, nn
from transformers.audio_utils import chroma_filter_bank


@contextmanager
def stand_ins() -> Iterator[None]:
    """Within it, audiocraft builds melody models; they hear melodies afterwards too, each in the whole mix."""
    demucs = {name: ModuleType(name) for name in ("demucs", "demucs.pretrained")}
    demucs["demucs"].__dict__["pretrained"] = demucs["demucs.pretrained"]
    demucs["demucs.pretrained"].__dict__["get_model"] = lambda name: _NoDemucs()
    with (
        mock.patch.object(chroma, "torchaudio", SimpleNamespace(transforms=SimpleNamespace(Spectrogram=_Spectrogram))),
        mock.patch.object(chroma, "filters", SimpleNamespace(chroma=_filter_bank)),
        mock.patch.dict(sys.modules, demucs),
    ):
        yield


class _NoDemucs(nn.Module):
    sources = ("drums", "bass", "other", "vocals")


class _Spectrogram(nn.Module):
    window: Tensor

    def __init__(self, n_fft: int, win_length: int, hop_length: int, **settings: Any):
        super().__init__()
        assert settings == {"power": 2, "center": True, "pad": 0, "normalized": True} and n_fft == win_length
        self.n_fft, self.hop_length = n_fft, hop_length
        self.register_buffer("window", torch.hann_window(win_length))

    def forward(self, wav: Tensor) -> Tensor:
        spectrum = torch.stft(
            wav.flatten(0, -2), self.n_fft, self.hop_length, window=self.window, center=True, pad_mode="reflect",
            return_complex=True,
        )  # fmt: skip
        power = spectrum.abs().square() / self.window.square().sum()
        return power.unflatten(0, tuple(wav.shape[:-1]))


def _filter_bank(sr: int, n_fft: int, tuning: float, n_chroma: int) -> np.ndarray:
    # transformers calls the transform's length what it calls the number of bins elsewhere; librosa's bank has n_fft / 2
    # + 1 columns, and so has this one.
    bank = chroma_filter_bank(sampling_rate=sr, num_frequency_bins=n_fft, tuning=tuning, num_chroma=n_chroma)
    assert bank.shape == (n_chroma, n_fft // 2 + 1)
    return bank.astype("float32")
