"""audiocraft's own melody models with our weights. Import only after `require_audiocraft()`.

They hear melodies through what tests/interop/melody_stand_ins.py has for torchaudio, librosa and demucs.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from audiocraft.models.lm import LMModel
from audiocraft.modules.conditioners import ConditioningAttributes, WavCondition
from torch import Tensor

from tests.interop.audiocraft_models import build_lm
from tests.interop.melody_stand_ins import stand_ins
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
