"""Codes from a MusicGen's language model and a prompt, by transformers' own `generate`, and sound from codes."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import soundfile
import torch
from torch import Tensor
from transformers import (
    EncodecModel,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    T5EncoderModel,
)

from trainer.atomic import replacing
from trainer.data.codec_windows import reproducible
from trainer.data.text_states import text_states
from trainer.errors import ConfigError, ModelError, StorageError
from trainer.evaluation.conditions import read_conditions
from trainer.model.language_model import LanguageModel, load_language_model
from trainer.model.source import Source, load_codec, load_text_encoder
from trainer.spec.shapes import MELODY_PLACES

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
class Request:
    """What one sound is generated from. Several are generated at once by `generate_all`, each as if it were alone.

    text_SD    (S, D) float32, T5's last hidden states; None is the null condition
    generator  of its draws, on the CPU, which go on from its state; unused where Sampling is greedy
    prefix_KT  (K, P) integers in [0, V): codes to go on from, which the result begins with
    melody_C   (C,) integers in [0, 12), the notes of a melody model; None is the null melody
    """

    text_SD: Tensor | None
    generator: torch.Generator
    prefix_KT: Tensor | None = None
    melody_C: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Generated:
    """What was generated for one prompt.

    codes_KT  (K, T) int64 in [0, V), on the CPU
    audio     (T x samples per frame,) float32, about -1 to 1; (T x samples per frame, 2) of a stereo model
    """

    codes_KT: Tensor
    audio: np.ndarray


@dataclass(frozen=True, kw_only=True)
class WholeModel:
    """All parts of a MusicGen, in float32, frozen and in eval mode, on one device."""

    language_model: LanguageModel
    text_encoder: T5EncoderModel
    tokenizer: PreTrainedTokenizerBase
    codec: EncodecModel


def load_for_generation(source: Source, device: torch.device) -> WholeModel:
    """All parts on `device`, each loaded once. Raises ModelError where weights do not fit the configuration."""
    return WholeModel(
        language_model=load_language_model(source).to(device).eval().requires_grad_(False),
        text_encoder=load_text_encoder(source).to(device),
        tokenizer=source.load_tokenizer(),
        codec=load_codec(source).to(device),
    )


def generate(
    model: WholeModel,
    prompt: str,
    *,
    frames: int,
    sampling: Sampling,
    prefix_KT: Tensor | None = None,
    melody_C: Tensor | None = None,
) -> Generated:
    """Music for one prompt; an empty one, or spaces alone, is the null condition. See `generate_codes`.

    Raises ModelError where the sound is not finite.
    """
    text_SD = text_states(model.text_encoder, model.tokenizer, prompt)
    codes_KT = generate_codes(
        model.language_model, text_SD, frames=frames, sampling=sampling, prefix_KT=prefix_KT, melody_C=melody_C
    )
    assert codes_KT is not None, "nothing stops it"
    return Generated(codes_KT=codes_KT, audio=decode(model.codec, codes_KT))


def generate_all(
    model: LanguageModel,
    requests: Sequence[Request],
    *,
    frames: int,
    sampling: Sampling,
    should_stop: Callable[[], bool] | None = None,
) -> list[Tensor] | None:
    """The codes (K, frames) of each request, in their order; None where it was stopped. See `generate_codes`.

    sampling  without its seed: each request brings its own generator
    """
    made = []
    for request in requests:
        codes_KT = generate_codes(
            model,
            request.text_SD,
            frames=frames,
            sampling=replace(sampling, seed=int(torch.randint(2**62, (), generator=request.generator))),
            prefix_KT=request.prefix_KT,
            should_stop=should_stop,
            melody_C=request.melody_C,
        )
        if codes_KT is None:
            return None
        made.append(codes_KT)
    return made


@torch.no_grad()
def generate_codes(
    model: LanguageModel,
    text_SD: Tensor | None,
    *,
    frames: int,
    sampling: Sampling,
    prefix_KT: Tensor | None = None,
    should_stop: Callable[[], bool] | None = None,
    melody_C: Tensor | None = None,
) -> Tensor | None:
    """The codes (K, frames) int64 in [0, V), on the CPU, that the model makes of a text; None where it was stopped.

    The result depends on the arguments alone: the random states of torch and Python are neither read nor changed. On
    the CPU of one machine it is the same bit for bit. A model whose linear layers are bf16 is called under autocast.

    model        in eval mode
    text_SD      (S, D) float32, T5's last hidden states; None is the null condition
    frames       of the codec, LEAST_FRAMES or more, those of the prefix included
    prefix_KT    (K, P) integers in [0, V), P below frames: codes to go on from, which the result begins with
    should_stop  asked before each token: once it says True, no other is made
    melody_C     (C,) integers in [0, 12), the notes of a melody model, see `melody_places`; None is the null melody

    Raises ValueError for fewer frames, for a prefix or melody of another shape or too long, and for a melody that the
    model does not read; ModelError for logits not finite.
    """
    decoder = model.decoder
    given_KS = _given(model, frames, prefix_KT)
    _check_melody(model, melody_C)
    # Guidance moves from the null condition to the prompt's; without prompt and melody they are the same.
    guidance = 1.0 if text_SD is None and melody_C is None else sampling.guidance
    if should_stop is not None and should_stop():
        return None
    # The last codebook comes so many steps later than the first; the start token is one of the steps that are given.
    steps = 1 + frames + _largest_delay(model)
    with _forked_random_states(given_KS.device, sampling.seed):
        conditions = read_conditions(model, text_SD, melody_C, given_KS, guided=guidance > 1)
        try:
            codes_1KT = decoder.generate(
                inputs=given_KS,
                **conditions,
                generation_config=_generation_config(
                    decoder.config.pad_token_id, steps - given_KS.shape[1], sampling, guidance
                ),
                logits_processor=LogitsProcessorList([finite := _Finite(given_KS.device)]),
                stopping_criteria=StoppingCriteriaList([_Asking(should_stop)] if should_stop else []),
            )
        except _Stopped:
            return None
    if finite.broken:
        raise ModelError("the model's logits are NaN or infinite: its weights are not usable")
    return codes_1KT[0].cpu()


def decode(codec: EncodecModel, codes_KT: Tensor) -> np.ndarray:
    """The sound of codes (K, T) in [0, V): float32, about -1 to 1, of T x samples per frame samples.

    Mono, (samples,), where there are as many codebooks as the codec has. Of twice as many, which stand as 1L, 1R, 2L,
    2R and so on, it is stereo, (samples, 2): each channel is decoded by itself.

    Raises ModelError where the sound is not finite.
    """
    channels = len(codes_KT) // codec.config.num_quantizers
    codes_KT = codes_KT.to(codec.device, torch.int64)
    with torch.no_grad(), reproducible(codec.device):
        decoded = [
            codec.decode(codes_KT[None, None, channel::channels], audio_scales=[None]).audio_values[0, 0]
            for channel in range(channels)
        ]
    audio = np.stack([of_channel.float().cpu().numpy() for of_channel in decoded], axis=-1)
    assert len(audio) == codes_KT.shape[1] * codec.config.hop_length
    if not np.isfinite(audio).all():
        raise ModelError("the model generates sound that is NaN or infinite: its weights are not usable")
    return audio[:, 0] if channels == 1 else audio


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
    """Write mono or stereo sound as a 16-bit WAV, complete or not at all.

    audio  (samples,) or (samples, 2) float32; where a sample exceeds 1, all of it is turned down until none does

    Raises StorageError.
    """
    peak = float(abs(audio).max(initial=0.0))
    try:
        with replacing(path) as partial, partial.open("wb") as file:
            soundfile.write(file, audio / max(peak, 1.0), sample_rate_hz, "PCM_16", format="WAV")
    except (OSError, soundfile.LibsndfileError) as error:
        raise StorageError(f"{path} cannot be written ({error}): choose another --output") from error


class _Stopped(Exception):
    """The generation is to end at once, without codes."""


class _Asking(StoppingCriteria):
    """Raises _Stopped once it is asked to: what transformers makes of tokens that end too early are no codes."""

    def __init__(self, should_stop: Callable[[], bool]):
        self.should_stop = should_stop

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: object) -> Tensor:
        if self.should_stop():
            raise _Stopped
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def _largest_delay(model: LanguageModel) -> int:
    return (model.decoder.num_codebooks - 1) // model.decoder.config.audio_channels


def _given(model: LanguageModel, frames: int, prefix_KT: Tensor | None) -> Tensor:
    """What `generate` goes on from, (K, 1 + P) int64: the start token and the codes that are given."""
    codebooks, least = model.decoder.num_codebooks, max(LEAST_FRAMES, _largest_delay(model))
    if frames < least:
        raise ValueError(f"{frames} frames are fewer than {least}")
    prefix_KT = torch.empty(codebooks, 0, dtype=torch.int64) if prefix_KT is None else prefix_KT
    if prefix_KT.ndim != 2 or len(prefix_KT) != codebooks or not prefix_KT.shape[1] < frames:
        raise ValueError(f"a prefix of shape {tuple(prefix_KT.shape)} for {frames} frames of {codebooks} codebooks")
    device = model.enc_to_dec_proj.weight.device
    start_K1 = torch.full((codebooks, 1), model.decoder.config.pad_token_id, device=device)
    return torch.cat([start_K1, prefix_KT.to(device, torch.int64)], dim=1)


def _check_melody(model: LanguageModel, melody_C: Tensor | None) -> None:
    if melody_C is None:
        return
    if model.audio_enc_to_dec_proj is None:
        raise ValueError("a melody for a model that reads none")
    if melody_C.shape != (MELODY_PLACES,):
        raise ValueError(f"a melody of shape {tuple(melody_C.shape)} for {MELODY_PLACES} places")


class _Finite(LogitsProcessor):
    """Notes whether any logit was not finite, without waiting for the device, and lets the draws go on.

    To draw from a NaN would raise an error without a name, and on a GPU one after which CUDA can do nothing more.
    """

    def __init__(self, device: torch.device):
        self._broken = torch.zeros((), dtype=torch.bool, device=device)

    @property
    def broken(self) -> bool:
        return bool(self._broken)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self._broken |= ~scores.isfinite().all()
        return scores.nan_to_num()


def _generation_config(special: int, new_tokens: int, sampling: Sampling, guidance: float) -> GenerationConfig:
    config = GenerationConfig(
        bos_token_id=special,
        pad_token_id=special,
        decoder_start_token_id=special,
        guidance_scale=guidance,
        max_new_tokens=new_tokens,
        do_sample=not sampling.greedy,
        num_beams=1,
        num_return_sequences=1,
        use_cache=True,
    )
    if not sampling.greedy:
        config.temperature, config.top_k = sampling.temperature, sampling.top_k
    return config


@contextmanager
def _forked_random_states(device: torch.device, seed: int) -> Iterator[None]:
    """Inside it the random states of the CPU and of `device` start from `seed`; afterwards they are as before.

    So is Python's own, which transformers' decoder draws from at each layer (version 5.23, for its LayerDrop).
    """
    pythons = random.getstate()
    on_gpu = device.type == "cuda"
    try:
        with torch.random.fork_rng(devices=[device] if on_gpu else []):
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the other GPUs too
            if on_gpu:
                with torch.cuda.device(device):
                    torch.cuda.manual_seed(seed)
            yield
    finally:
        random.setstate(pythons)
