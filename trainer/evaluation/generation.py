"""Codes and sound from a MusicGen and a text, by transformers' own `generate`."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    MusicgenForConditionalGeneration,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from trainer.atomic import replacing
from trainer.errors import ConfigError, ModelError, StorageError
from trainer.model.language_model import load_language_model
from trainer.model.source import Source, load_codec, load_text_encoder

# Below it transformers does not apply the delay pattern (build_delay_pattern_mask, version 5.23).
LEAST_FRAMES = 4


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next code is chosen. guidance 1 is none; top_k 0 is all codes; greedy ignores the last three."""

    guidance: float = 3.0
    greedy: bool = False
    temperature: float = 1.0
    top_k: int = 250
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Generated:
    """codes_KT (K, T) int64 in [0, V) on the CPU; audio (T x frame samples,) float32, about -1 to 1."""

    codes_KT: Tensor
    audio: np.ndarray


def load_for_generation(source: Source, device: torch.device) -> MusicgenForConditionalGeneration:
    """The whole model in float32 and eval mode. Raises ModelError where weights do not fit the configuration."""
    # Given to the constructor, the parts would be initialised anew (post_init, transformers 5.23).
    with torch.device("meta"):
        model = MusicgenForConditionalGeneration(copy.deepcopy(source.config))
    trained = load_language_model(source)
    model.decoder, model.enc_to_dec_proj = trained.decoder, trained.enc_to_dec_proj
    model.text_encoder, model.audio_encoder = load_text_encoder(source), load_codec(source)
    return model.to(device).eval().requires_grad_(False)


def generate(
    model: MusicgenForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    *,
    frames: int,
    sampling: Sampling,
) -> Generated:
    """`frames` frames of music for one prompt; an empty prompt is the null condition.

    The result depends on the arguments alone: the global random state is neither read nor changed. On one
    machine and CPU it is the same bit for bit.

    frames  LEAST_FRAMES or more

    Raises ModelError where the sound is not finite.
    """
    if frames < LEAST_FRAMES:
        raise ValueError(f"{frames} frames are fewer than {LEAST_FRAMES}")
    conditioned = bool(prompt.strip())
    inputs: dict[str, Any] = dict(tokenizer([prompt], return_tensors="pt").to(model.device))
    if not conditioned:
        inputs = dict(model.get_unconditional_inputs(num_samples=1))
        del inputs["guidance_scale"]
    seen = _Seen()
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(sampling.seed)
        audio_B1S = model.generate(
            **inputs,
            generation_config=_generation_config(model, frames, sampling, conditioned),
            stopping_criteria=StoppingCriteriaList([seen]),
        )
    codes_KT = _undelayed(seen.tokens, frames)
    audio = audio_B1S[0, 0].float().cpu().numpy()
    assert len(audio) == frames * model.config.audio_encoder.hop_length
    if not np.isfinite(audio).all():
        raise ModelError("the model generates sound that is NaN or infinite: its weights are not usable")
    return Generated(codes_KT=codes_KT, audio=audio)


@torch.no_grad()
def decode(model: MusicgenForConditionalGeneration, codes_KT: Tensor) -> np.ndarray:
    """The sound of codes (K, T) in [0, V): (T x frame samples,) float32."""
    codes = codes_KT.to(model.device, torch.int64)[None, None]
    return model.audio_encoder.decode(codes, audio_scales=[None]).audio_values[0, 0].float().cpu().numpy()


def device_of(name: str) -> torch.device:
    """The device by its name. Raises ConfigError where this machine has none such."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"--device {name} cannot be used here ({reason}): use auto, cpu or cuda") from error
    return device


def write_wav(path: Path, audio: np.ndarray, sample_rate_hz: int) -> None:
    """Write mono sound as 16 bit, complete or not at all; what exceeds full scale is turned down as a whole.

    Raises StorageError.
    """
    peak = float(abs(audio).max(initial=0.0))
    try:
        with replacing(path) as partial, partial.open("wb") as file:
            soundfile.write(file, audio / max(peak, 1.0), sample_rate_hz, "PCM_16", format="WAV")
    except (OSError, soundfile.LibsndfileError) as error:
        raise StorageError(f"{path} cannot be written ({error}): choose another --output") from error


class _Seen(StoppingCriteria):
    """Stops nothing and keeps the tokens so far, (K, 1 + steps): `generate` itself returns sound only."""

    def __init__(self) -> None:
        self.tokens = torch.empty(0, 0, dtype=torch.int64)

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: object) -> Tensor:
        self.tokens = input_ids
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def _undelayed(tokens: Tensor, frames: int) -> Tensor:
    """Codes (K, frames) on the CPU from tokens (K, 1 + steps): the first is the start, codebook k is k late."""
    return torch.stack([row[1 + k : 1 + k + frames] for k, row in enumerate(tokens)]).cpu()


def _generation_config(
    model: MusicgenForConditionalGeneration, frames: int, sampling: Sampling, conditioned: bool
) -> GenerationConfig:
    special = model.config.decoder.pad_token_id
    chosen: dict[str, Any] = {"do_sample": False}
    if not sampling.greedy:
        chosen = {"do_sample": True, "temperature": sampling.temperature, "top_k": sampling.top_k}
    return GenerationConfig(
        bos_token_id=special,
        pad_token_id=special,
        decoder_start_token_id=special,
        # Without a condition there is nothing that guidance could move away from.
        guidance_scale=sampling.guidance if conditioned else 1.0,
        # The last codebook ends K - 1 steps after the first.
        max_new_tokens=frames + model.config.decoder.num_codebooks - 1,
        **chosen,
    )
