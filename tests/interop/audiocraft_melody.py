"""audiocraft's own melody models with our weights. Import only after `require_audiocraft()`.

audiocraft hears a melody through torchaudio, librosa and demucs, none of which is installed beside a current torch.
What stands in for them computes the same spectrogram (torch.stft) and the same filter bank (transformers'), and takes
the whole mix for what demucs would leave of it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch
from audiocraft.models.lm import LMModel
from audiocraft.modules import chroma
from audiocraft.modules.conditioners import ConditioningAttributes, WavCondition
from torch import Tensor, nn
from transformers.audio_utils import chroma_filter_bank

from tests.interop.audiocraft_models import build_lm
from trainer.model.source import Source

RATE = 32_000


def build(source: Source, state: Mapping[str, Tensor], folder: Path) -> LMModel:
    """`build_lm`, for melody models too.

    Of a melody model it is the form in which `MusicGen.get_pretrained` makes music, and in which this trainer trains:
    short melodies are repeated, absent ones are heard as silence, and none is masked.
    """
    with stand_ins():
        model = build_lm(source, state, folder)
    if not source.melody:
        return model
    conditioner: Any = model.condition_provider.conditioners["self_wav"]
    conditioner._get_stemmed_wav = lambda wav, sample_rate: wav
    conditioner.match_len_on_eval, conditioner._use_masking = True, False
    return model.eval()


def attributes(caption: str | None, sound: Tensor | None) -> ConditioningAttributes:
    """The conditions of one row; None is a null condition.

    sound  (1, 1, samples) float32, of which the melody is heard
    """
    silence = torch.zeros(1, 1, 1)  # what audiocraft makes of a sound that is dropped, of length 0
    wav = WavCondition(
        silence if sound is None else sound, torch.tensor([0 if sound is None else sound.shape[-1]]), [RATE], [None], []
    )
    return ConditioningAttributes(text={"description": caption}, wav={"self_wav": wav})


def notes_of(model: LMModel, sound: Tensor | None) -> Tensor:
    """audiocraft's own notes (C,) int64 in [0, 12) of a sound, before they are repeated or cut; none for None."""
    if sound is None:
        return torch.zeros(0, dtype=torch.int64)
    conditioner: Any = model.condition_provider.conditioners["self_wav"]
    return conditioner.chroma(sound)[0].argmax(dim=-1)


@contextmanager
def stand_ins() -> Iterator[None]:
    """What audiocraft's conditioner needs of torchaudio, librosa and demucs while it is built.

    Source: torchaudio 2, transforms.Spectrogram; librosa 0.11, filters.chroma.
    """
    transforms = SimpleNamespace(Spectrogram=_Spectrogram)
    names = ("demucs", "demucs.pretrained")
    demucs = {name: ModuleType(name) for name in names}
    demucs["demucs"].__dict__["pretrained"] = demucs["demucs.pretrained"]
    demucs["demucs.pretrained"].__dict__["get_model"] = lambda name: _NoDemucs()
    with (
        mock.patch.object(chroma, "torchaudio", SimpleNamespace(transforms=transforms)),
        mock.patch.object(chroma, "filters", SimpleNamespace(chroma=_filter_bank)),
        mock.patch.dict(sys.modules, demucs),
    ):
        yield


class _NoDemucs(nn.Module):
    sources: Sequence[str] = ("drums", "bass", "other", "vocals")


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


def _filter_bank(sr: int, n_fft: int, tuning: float, n_chroma: int) -> Any:
    # transformers calls the transform's length what it calls the number of bins elsewhere; librosa's bank has n_fft / 2
    # + 1 columns, and so has this one.
    bank = chroma_filter_bank(sampling_rate=sr, num_frequency_bins=n_fft, tuning=tuning, num_chroma=n_chroma)
    assert bank.shape == (n_chroma, n_fft // 2 + 1)
    return bank.astype("float32")

