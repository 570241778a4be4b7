"""audiocraft's ChromaExtractor where torchaudio and librosa are not installed.

Import only after `require_audiocraft()`. Its two calls of them are answered by torch.stft and by transformers' filter
bank. What it finds with the real ones is recorded in tests/data/recorded_chroma.json, and compared in
test_audiocraft_chroma.py.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from transformers.audio_utils import chroma_filter_bank


class Spectrogram(nn.Module):
    """torchaudio.transforms.Spectrogram(power=2, center=True, normalized=True), by torch.stft."""

    def __init__(
        self, n_fft: int, win_length: int, hop_length: int, power: float, center: bool, pad: int, normalized: bool
    ):
        super().__init__()
        assert (power, center, pad, normalized) == (2, True, 0, True)
        self.sizes = (n_fft, hop_length, win_length)
        self.register_buffer("window", torch.hann_window(win_length))

    def forward(self, wav: Tensor) -> Tensor:
        """(..., samples) to power (..., frequencies, frames)."""
        rows = torch.stft(
            wav.reshape(-1, wav.shape[-1]), *self.sizes, window=self.window, pad_mode="reflect", return_complex=True
        )
        power = (rows / self.window.pow(2).sum().sqrt()).abs().pow(2)
        return power.reshape(*wav.shape[:-1], *power.shape[-2:])


def librosa_chroma(*, sr: int, n_fft: int, tuning: float, n_chroma: int):
    """librosa.filters.chroma, by transformers."""
    return chroma_filter_bank(n_fft, sampling_rate=sr, tuning=tuning, num_chroma=n_chroma).astype("float32")


def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have audiocraft's chroma module call these instead of torchaudio and librosa."""
    from audiocraft.modules import chroma

    monkeypatch.setattr(chroma, "torchaudio", SimpleNamespace(transforms=SimpleNamespace(Spectrogram=Spectrogram)))
    monkeypatch.setattr(chroma, "filters", SimpleNamespace(chroma=librosa_chroma))
