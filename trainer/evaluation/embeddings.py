"""A vector for a sound: by EnCodec's latents, and by CLAP, which also gives one for a text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soxr
import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError
from torch import Tensor
from torch.nn.functional import normalize
from transformers import ClapModel, ClapProcessor, EncodecModel

from trainer.data import audio
from trainer.data.audio_fault import AudioFault
from trainer.data.codec_windows import reproducible
from trainer.errors import DataError, ModelError

CLAP = "laion/clap-htsat-unfused"
# CLAP's models were trained on 10 s at 48 kHz. Of a longer sound they would hear 10 s anywhere in it, drawn anew at
# each call, so that it is cut into pieces; a shorter last piece is not heard.
CLAP_RATE_HZ, CLAP_SECONDS = 48_000, 10.0
ALIKE = 0.99  # cosine of different texts, from which on a model does not tell them apart


@torch.no_grad()
def latent_embedding(codec: EncodecModel, sound: np.ndarray) -> np.ndarray:
    """Mean and standard deviation over time of each output of the encoder, before they are quantised: (2 W,) float64.

    sound  (n,) or (n, 2) float32 at the codec's rate, a frame or more; a last part of a frame is left out. Each channel
           goes through the codec by itself, and mean and deviation are those of the frames of both

    W is 128 in MusicGen's codec, at 50 frames a second. One vector for a sound, since frames of a sound are alike, and
    would count as if they were so many sounds.
    """
    hop = codec.config.hop_length
    channels_CN = np.atleast_2d(sound.T)[:, : len(sound) // hop * hop]
    frames = []
    with reproducible(codec.device):
        for channel_N in channels_CN:
            samples = torch.from_numpy(np.ascontiguousarray(channel_N, np.float32)).to(codec.device)
            frames.append(codec.encoder(samples[None, None])[0].double().cpu())
    values_WT = torch.cat(frames, dim=1)
    return torch.cat([values_WT.mean(dim=1), values_WT.std(dim=1, correction=0)]).numpy()


@dataclass(frozen=True, kw_only=True)
class Clap:
    """A CLAP model, on one device, in eval mode."""

    name: str
    model: ClapModel
    processor: ClapProcessor

    @torch.no_grad()
    def sound_embedding(self, sound: np.ndarray, sample_rate_hz: int) -> np.ndarray:
        """The mean of the vectors of its pieces of CLAP_SECONDS, of length 1: (D,) float64.

        sound  (n,) or (n, 2) float32; two channels are heard as their mean
        """
        mono = sound if sound.ndim == 1 else sound.mean(axis=1)
        samples = soxr.resample(mono, sample_rate_hz, CLAP_RATE_HZ, quality="HQ")
        size = round(CLAP_SECONDS * CLAP_RATE_HZ)
        vectors = []
        for start in range(0, max(1, len(samples) // size) * size, size):
            # One by one: transformers' extractor (5.23) draws one of several sounds to be treated as a long one.
            heard = self.processor.feature_extractor(
                samples[start : start + size], sampling_rate=CLAP_RATE_HZ, return_tensors="pt"
            )
            vectors.append(_vectors(self.model.get_audio_features(**heard.to(self.model.device))))
        return normalize(torch.cat(vectors).mean(dim=0), dim=0).cpu().numpy()

    @torch.no_grad()
    def text_embeddings(self, texts: Sequence[str]) -> np.ndarray:
        """A vector of length 1 for each text, (N, D) float64. Longer texts than the model has places for are cut."""
        made = []
        most = self.model.config.text_config.max_position_embeddings - 2  # RoBERTa's places begin behind the padding's
        for text in texts:
            words = self.processor.tokenizer(text, truncation=True, max_length=most, return_tensors="pt")
            ids, mask = words.input_ids.to(self.model.device), words.attention_mask.to(self.model.device)
            made.append(_vectors(self.model.get_text_features(input_ids=ids, attention_mask=mask)))
        return torch.cat(made).cpu().numpy()


def open_clap(name: str, device: torch.device) -> Clap:
    """The CLAP model of a hub id or folder. Raises ModelError where it cannot be had, or lacks weights."""
    try:
        folder = name if Path(name).is_dir() else _fetched(name)
        processor = ClapProcessor.from_pretrained(folder)
        model, loading = ClapModel.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(f"{name} cannot be loaded ({reason})") from error
    if loading["missing_keys"]:
        raise ModelError(f"{name} is no whole CLAP model: it lacks {', '.join(sorted(loading['missing_keys'])[:3])}")
    return Clap(name=name, model=model.to(device).eval().requires_grad_(False), processor=processor)


def _fetched(hub_id: str) -> str:
    """The folder of a model in the local cache, which asks no hub, or once fetched. Raises OSError or ValueError.

    Given the hub id itself, transformers asks for each file, and without a network waits half a minute for each.
    """
    try:
        return snapshot_download(hub_id, local_files_only=True)
    except LocalEntryNotFoundError:
        return snapshot_download(hub_id, allow_patterns=["*.json", "*.txt", "*.safetensors"])


def texts_are_alike(vectors_ND: np.ndarray) -> bool:
    """Whether a model gives different texts nearly one vector, as laion/larger_clap_music in transformers 5 does."""
    cosines = vectors_ND @ vectors_ND.T
    return len(vectors_ND) > 1 and float(cosines.min()) > ALIKE


def sound_of_file(path: Path, sample_rate_hz: int, channels: int, seconds: float) -> np.ndarray:
    """The first seconds of a sound file, (n,), or (n, 2) of two channels. Raises DataError where there is none."""
    held: list[np.ndarray] = []
    left = round(seconds * sample_rate_hz)
    try:
        for block in audio.stream(path, sample_rate_hz, block_seconds=5.0, channels=channels):
            held.append(block[:left])
            left -= len(held[-1])
            if left == 0:
                break
    except AudioFault as fault:
        raise DataError(f"{path} cannot be judged: {fault}") from fault
    sound = np.concatenate(held) if held else np.zeros(0, np.float32)
    if not len(sound) or not np.isfinite(sound).all():
        raise DataError(f"{path} cannot be judged: it holds no samples, or some that are not numbers")
    return sound


def _vectors(output: Tensor | object) -> Tensor:
    """Of length 1, (B, D) float64. Some versions of transformers return a tensor, from 5 on it is an output's part."""
    vectors = output if isinstance(output, Tensor) else output.pooler_output  # type: ignore[attr-defined]
    return normalize(vectors.double(), dim=-1)
