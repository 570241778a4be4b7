"""Codes and sound from a MusicGen and a prompt, by transformers' own `generate`."""

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

# For fewer frames transformers leaves the delay pattern out (build_delay_pattern_mask, version 5.23).
LEAST_FRAMES = 4


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next code is chosen.

    guidance     scale of classifier-free guidance; 1 is none
    greedy       the likeliest code, always; temperature, top_k and seed have no effect then
    temperature  by which logits are divided, above 0
    top_k        draw from that many likeliest codes; 0 is all codes
    seed         of the draws
    """

    guidance: float = 3.0
    greedy: bool = False
    temperature: float = 1.0
    top_k: int = 250
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Generated:
    """What was generated for one prompt.

    codes_KT  (K, T) int64 in [0, V), on the CPU
    audio     (T x samples per frame,) float32, about -1 to 1
    """

    codes_KT: Tensor
    audio: np.ndarray


def load_for_generation(source: Source, device: torch.device) -> MusicgenForConditionalGeneration:
    """The whole model in float32 and eval mode, on `device`.

    Raises ModelError where weights do not fit the configuration.
    """
    # The parts are put in afterwards: given to the constructor, they would be initialised anew (post_init, transformers
    # 5.23), and their weights lost.
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
    """Music for one prompt.

    The result depends on the arguments alone: the global random state is neither read nor changed. On the CPU of one
    machine it is the same bit for bit.

    prompt  a text; an empty one, or spaces alone, is the null condition
    frames  of the codec, LEAST_FRAMES or more

    Raises ModelError where the sound is not finite.
    """
    if frames < LEAST_FRAMES:
        raise ValueError(f"{frames} frames are fewer than {LEAST_FRAMES}")
    conditioned = bool(prompt.strip())
    inputs: dict[str, Any] = dict(tokenizer([prompt], return_tensors="pt").to(model.device))
    if not conditioned:
        inputs = dict(model.get_unconditional_inputs(num_samples=1))
        del inputs["guidance_scale"]
    tokens = _KeptTokens()
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(sampling.seed)
        audio_B1S = model.generate(
            **inputs,
            generation_config=_generation_config(model, frames, sampling, conditioned),
            stopping_criteria=StoppingCriteriaList([tokens]),
        )
    codes_KT = _undelayed(tokens.latest, frames)
    audio = audio_B1S[0, 0].float().cpu().numpy()
    assert len(audio) == frames * model.config.audio_encoder.hop_length
    if not np.isfinite(audio).all():
        raise ModelError("the model generates sound that is NaN or infinite: its weights are not usable")
    return Generated(codes_KT=codes_KT, audio=audio)


@torch.no_grad()
def decode(model: MusicgenForConditionalGeneration, codes_KT: Tensor) -> np.ndarray:
    """The sound of codes (K, T) in [0, V): (T x samples per frame,) float32, about -1 to 1."""
    codes = codes_KT.to(model.device, torch.int64)[None, None]
    return model.audio_encoder.decode(codes, audio_scales=[None]).audio_values[0, 0].float().cpu().numpy()


def device_of(name: str) -> torch.device:
    """The device that --device names; `auto` is the GPU where there is one.

    Raises ConfigError where it cannot be used on this machine.
    """
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
    """Write mono sound as a 16-bit WAV, complete or not at all.

    audio  (samples,) float32; where a sample exceeds 1, all of it is turned down until none does

    Raises StorageError.
    """
    peak = float(abs(audio).max(initial=0.0))
    try:
        with replacing(path) as partial, partial.open("wb") as file:
            soundfile.write(file, audio / max(peak, 1.0), sample_rate_hz, "PCM_16", format="WAV")
    except (OSError, soundfile.LibsndfileError) as error:
        raise StorageError(f"{path} cannot be written ({error}): choose another --output") from error


class _KeptTokens(StoppingCriteria):
    """Stops nothing and keeps the tokens made so far, because MusicGen's `generate` returns sound only.

    latest  (K, 1 + steps) int64
    """

    def __init__(self) -> None:
        self.latest = torch.empty(0, 0, dtype=torch.int64)

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: object) -> Tensor:
        self.latest = input_ids
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def _undelayed(tokens: Tensor, frames: int) -> Tensor:
    """Codes (K, frames) on the CPU, from tokens (K, 1 + steps) that start with the special one and are delayed."""
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
        # Guidance moves from the null condition to the prompt's; without a prompt they are the same.
        guidance_scale=sampling.guidance if conditioned else 1.0,
        # The last codebook ends K - 1 steps after the first.
        max_new_tokens=frames + model.config.decoder.num_codebooks - 1,
        **chosen,
    )
