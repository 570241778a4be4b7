"""Codes from a MusicGen's language model and a prompt, by transformers' own `generate`, and sound from codes."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    EncodecModel,
    EncoderDecoderCache,
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
from trainer.model.delay_pattern import inputs_and_labels
from trainer.model.language_model import LanguageModel, load_language_model
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
    model: WholeModel, prompt: str, *, frames: int, sampling: Sampling, prefix_KT: Tensor | None = None
) -> Generated:
    """Music for one prompt; an empty one, or spaces alone, is the null condition. See `generate_codes`.

    Raises ModelError where the sound is not finite.
    """
    text_SD = text_states(model.text_encoder, model.tokenizer, prompt)
    codes_KT = generate_codes(model.language_model, text_SD, frames=frames, sampling=sampling, prefix_KT=prefix_KT)
    assert codes_KT is not None, "nothing stops it"
    return Generated(codes_KT=codes_KT, audio=decode(model.codec, codes_KT))


@torch.no_grad()
def generate_codes(
    model: LanguageModel,
    text_SD: Tensor | None,
    *,
    frames: int,
    sampling: Sampling,
    prefix_KT: Tensor | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> Tensor | None:
    """The codes (K, frames) int64 in [0, V), on the CPU, that the model makes of a text; None where it was stopped.

    The result depends on the arguments alone: the random states of torch and Python are neither read nor changed. On
    the CPU of one machine it is the same bit for bit. A model whose linear layers are bf16 is called under autocast.

    model        in eval mode
    text_SD      (S, D) float32, T5's last hidden states; None is the null condition
    frames       of the codec, LEAST_FRAMES or more, those of the prefix included
    prefix_KT    (K, P) integers in [0, V), P below frames: codes to go on from, which the result begins with
    should_stop  asked before each token: once it says True, no other is made

    Raises ValueError for fewer frames or a prefix of another shape or too long; ModelError for logits not finite.
    """
    decoder, codebooks = model.decoder, model.decoder.num_codebooks
    if frames < max(LEAST_FRAMES, codebooks - 1):
        raise ValueError(f"{frames} frames are fewer than {max(LEAST_FRAMES, codebooks - 1)}")
    special, device = decoder.config.pad_token_id, model.enc_to_dec_proj.weight.device
    prefix_KT = torch.empty(codebooks, 0, dtype=torch.int64) if prefix_KT is None else prefix_KT
    if prefix_KT.ndim != 2 or len(prefix_KT) != codebooks or not prefix_KT.shape[1] < frames:
        raise ValueError(f"a prefix of shape {tuple(prefix_KT.shape)} for {frames} frames of {codebooks} codebooks")
    start_K1 = torch.full((codebooks, 1), special, device=device)
    given_KS = torch.cat([start_K1, prefix_KT.to(device, torch.int64)], dim=1)
    # Guidance moves from the null condition to the prompt's; without a prompt they are the same.
    guidance = sampling.guidance if text_SD is not None else 1.0
    text_BSD, mask_BS = _conditions(model, text_SD, guided=guidance > 1)
    if should_stop is not None and should_stop():
        return None
    # Given here, because what transformers makes for a decoder without encoder (version 5.23) has one list of keys for
    # both attentions.
    cache = EncoderDecoderCache(DynamicCache(config=decoder.config), DynamicCache(config=decoder.config))
    with _forked_random_states(device, sampling.seed):
        _read_prefix(model, given_KS, text_BSD, mask_BS, cache)
        try:
            codes_1KT = decoder.generate(
                inputs=given_KS,
                # Given too: transformers would mask the start token, which is the padding token as well.
                attention_mask=torch.ones(1, given_KS.shape[1], dtype=torch.int64, device=device),
                encoder_hidden_states=text_BSD,
                encoder_attention_mask=mask_BS,
                past_key_values=cache,
                generation_config=_generation_config(
                    special, frames + codebooks - given_KS.shape[1], sampling, guidance
                ),
                logits_processor=LogitsProcessorList([finite := _Finite(device)]),
                stopping_criteria=StoppingCriteriaList([_Asking(should_stop)] if should_stop else []),
            )
        except _Stopped:
            return None
    if finite.broken:
        raise ModelError("the model's logits are NaN or infinite: its weights are not usable")
    return codes_1KT[0].cpu()


def decode(codec: EncodecModel, codes_KT: Tensor) -> np.ndarray:
    """The sound of codes (K, T) in [0, V): (T x samples per frame,) float32, about -1 to 1.

    Raises ModelError where the sound is not finite.
    """
    codes = codes_KT.to(codec.device, torch.int64)[None, None]
    with torch.no_grad(), reproducible(codec.device):
        audio = codec.decode(codes, audio_scales=[None]).audio_values[0, 0].float().cpu().numpy()
    assert len(audio) == codes_KT.shape[1] * codec.config.hop_length
    if not np.isfinite(audio).all():
        raise ModelError("the model generates sound that is NaN or infinite: its weights are not usable")
    return audio


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


def _conditions(model: LanguageModel, text_SD: Tensor | None, *, guided: bool) -> tuple[Tensor, Tensor]:
    """What cross-attention reads, (B, S, D), and where there is text, (B, S) int64.

    B is 1, or 2 with guidance: then the null condition, which is exactly zero, comes second, as transformers has it.
    """
    device, width = model.enc_to_dec_proj.weight.device, model.enc_to_dec_proj.in_features
    states_BSD = torch.zeros(1, 1, width, device=device) if text_SD is None else text_SD.to(device)[None]
    mask_BS = torch.full(states_BSD.shape[:2], int(text_SD is not None), device=device)
    if guided:
        states_BSD = torch.cat([states_BSD, torch.zeros_like(states_BSD)])
        mask_BS = torch.cat([mask_BS, torch.zeros_like(mask_BS)])
    return model.enc_to_dec_proj(states_BSD) * mask_BS[..., None], mask_BS


def _read_prefix(
    model: LanguageModel, given_KS: Tensor, text_BSD: Tensor, mask_BS: Tensor, cache: EncoderDecoderCache
) -> None:
    """Put the keys and values of all given steps but the last into the cache.

    MusicgenForCausalLM.generate (transformers 5.15 to 5.23) reads only the last of what is given to it.
    """
    prefix_1KP = given_KS[None, :, 1:]
    if prefix_1KP.shape[-1]:
        config = model.decoder.config
        inputs_1KP, _ = inputs_and_labels(prefix_1KP, config.pad_token_id, config.audio_channels)
        model.decoder.model(
            input_ids=inputs_1KP[0].repeat(len(text_BSD), 1),
            encoder_hidden_states=text_BSD,
            encoder_attention_mask=mask_BS,
            past_key_values=cache,
            use_cache=True,
        )


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
