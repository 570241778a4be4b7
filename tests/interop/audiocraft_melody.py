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
import yaml
from audiocraft.models.lm import LMModel
from audiocraft.modules import chroma
from audiocraft.modules.conditioners import ConditioningAttributes, WavCondition
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from transformers.audio_utils import chroma_filter_bank

from tests.interop.audiocraft_models import build_from, build_lm
from trainer.exports.audiocraft_config import lm_config, text_encoder_name
from trainer.exports.audiocraft_names import _lm_table, _stacked
from trainer.model.source import Source, load_text_encoder

SELF_WAV = "condition_provider.conditioners.self_wav"
RATE = 32_000


def build(source: Source, state: Mapping[str, Tensor], folder: Path) -> LMModel:
    """`build_lm`, for melody models too.

    Of a melody model it is the form in which `MusicGen.get_pretrained` makes music, and in which this trainer trains:
    short melodies are repeated, absent ones are heard as silence, and none is masked.
    """
    if not source.melody:
        return build_lm(source, state, folder)
    name = text_encoder_name(source.config)
    if not (folder / name).exists():
        source.load_tokenizer().save_pretrained(folder / name)
        load_text_encoder(source).save_pretrained(folder / name)
    config = OmegaConf.create(melody_config(source, name))
    assert isinstance(config, DictConfig)
    with stand_ins():
        model = build_from(config, folder)
    model.load_state_dict(melody_to_audiocraft(state), strict=True)
    conditioner = model.condition_provider.conditioners["self_wav"]
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
    return model.condition_provider.conditioners["self_wav"].chroma(sound)[0].argmax(dim=-1)


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
        return power.unflatten(0, wav.shape[:-1])


def _filter_bank(sr: int, n_fft: int, tuning: float, n_chroma: int) -> Any:
    # transformers calls the transform's length what it calls the number of bins elsewhere; librosa's bank has n_fft / 2
    # + 1 columns, and so has this one.
    bank = chroma_filter_bank(sampling_rate=sr, num_frequency_bins=n_fft, tuning=tuning, num_chroma=n_chroma)
    assert bank.shape == (n_chroma, n_fft // 2 + 1)
    return bank.astype("float32")


# A melody model under audiocraft's names, as trainer/exports has the text models.


def melody_config(source: Source, text_encoder: str) -> str:
    """The xp.cfg, in YAML, from which audiocraft builds a melody model."""
    tree = yaml.safe_load(
        lm_config(source.config, text_encoder_name=text_encoder, segment_seconds=30.0, cfg_dropout=0.0)
    )
    tree["fuser"] |= {"prepend": ["self_wav", "description"], "cross": []}
    chroma_stem = {"sample_rate": RATE, "n_chroma": 12, "radix2_exp": 14, "argmax": True, "match_len_on_eval": False}
    chroma_stem |= {"eval_wavs": None, "n_eval_wavs": 100, "cache_path": None}
    tree["conditioners"] = {"self_wav": {"model": "chroma_stem", "chroma_stem": chroma_stem}, **tree["conditioners"]}
    return yaml.safe_dump(tree, sort_keys=False)


def _melody_table(source_codebooks: int, layers: int) -> dict[str, tuple[str, ...]]:
    table = {theirs: ours for theirs, ours in _lm_table(source_codebooks, layers).items() if "cross" not in theirs}
    for part in ("weight", "bias"):
        table[f"{SELF_WAV}.output_proj.{part}"] = (f"audio_enc_to_dec_proj.{part}",)
    return table


def melody_to_audiocraft(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The language model of a melody model under audiocraft's names, with the window that its strict loading needs."""
    table = _melody_table(*_sizes(state))
    assert {ours for parts in table.values() for ours in parts} == set(state)
    stacked = {theirs: _stacked([state[ours] for ours in parts]) for theirs, parts in table.items()}
    return stacked | {f"{SELF_WAV}.chroma.spec.window": torch.hann_window(16_384)}


def melody_from_audiocraft(state: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `melody_to_audiocraft`; `like` has our names."""
    result: dict[str, Tensor] = {}
    for theirs, parts in _melody_table(*_sizes(like)).items():
        result |= dict(zip(parts, state[theirs].chunk(len(parts)), strict=True))
    return result


def _sizes(state: Mapping[str, Tensor]) -> tuple[int, int]:
    heads = [name for name in state if name.startswith("decoder.lm_heads.")]
    layers = [int(name.split(".")[4]) for name in state if name.startswith("decoder.model.decoder.layers.")]
    return len(heads), 1 + max(layers)
