"""Codes from a MusicGen's language model and prompts, and sound from codes."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import soundfile
import torch
from torch import Tensor, nn
from transformers import EncodecModel, PreTrainedTokenizerBase, T5EncoderModel

from trainer.atomic import write_whole
from trainer.data.text_states import text_states
from trainer.errors import ConfigError, ModelError, StorageError
from trainer.evaluation.conditions import text_tokens
from trainer.evaluation.decoding import Decoding, largest_delay, make_codes
from trainer.evaluation.sound_pieces import decode_channel
from trainer.model.language_model import LanguageModel, load_language_model
from trainer.model.source import Source, load_codec, load_text_encoder
from trainer.plan.strategies import BF16_CAPABILITY
from trainer.spec.shapes import MELODY_PLACES

# For fewer frames transformers leaves the delay pattern out (build_delay_pattern_mask, version 5.23).
LEAST_FRAMES = 4
PLAIN = Decoding()


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
    generator  of its draws, on the CPU whatever the device, which go on from its state; unused where Sampling is greedy
    prefix_KT  (K, P) integers in [0, V): codes to go on from, which the result begins with
    melody_C   (C,) integers in [0, 12), the notes of a melody model; None is the null melody
    """

    text_SD: Tensor | None
    generator: torch.Generator
    prefix_KT: Tensor | None = None
    melody_C: Tensor | None = None


@dataclass(kw_only=True)
class Pace:
    """How fast codes are made: those of all codebooks that were drawn, and the seconds that this took in all."""

    codes: int = 0
    seconds: float = 0.0

    @property
    def codes_per_second(self) -> float:
        return self.codes / self.seconds if self.seconds else 0.0

    def add(self, codes: int, since: float) -> None:
        """Codes that are on the CPU now, and were begun when time.perf_counter() said `since`."""
        self.codes += codes
        self.seconds += time.perf_counter() - since


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
    """All parts of a MusicGen, frozen and in eval mode, on one device; see load_for_generation for their precision."""

    language_model: LanguageModel
    text_encoder: T5EncoderModel
    tokenizer: PreTrainedTokenizerBase
    codec: EncodecModel


def load_for_generation(
    source: Source, device: torch.device, precision: Literal["auto", "no", "bf16"] = "no"
) -> WholeModel:
    """All parts on `device`, each loaded once. Raises ModelError where weights do not fit the configuration.

    precision  of the language model's linear layers: "no" is float32; "bf16" computes as sounds are made while a run
               in bf16 trains (trainer/engine/sampling_model.py); "auto" is bf16 on a GPU that has it, float32 elsewhere
    """
    language_model = load_language_model(source)
    if precision == "bf16" or (precision == "auto" and _has_bf16(device)):
        for module in language_model.modules():
            if isinstance(module, nn.Linear):
                module.to(torch.bfloat16)
    return WholeModel(
        language_model=language_model.to(device).eval().requires_grad_(False),
        text_encoder=load_text_encoder(source).to(device),
        tokenizer=source.load_tokenizer(),
        codec=load_codec(source).to(device),
    )


def _has_bf16(device: torch.device) -> bool:
    # torch.cuda.is_bf16_supported() also says True where bf16 is emulated.
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= BF16_CAPABILITY


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
    decoding: Decoding = PLAIN,
    pace: Pace | None = None,
) -> list[Tensor] | None:
    """The codes (K, frames) int64 in [0, V), on the CPU, of each request, in their order; None where it was stopped.

    Each is what its request gives alone: on the CPU of one machine bit for bit where there is one request, and with
    several but for the rounding of larger products. They depend on the arguments alone, and change nothing but the
    generators: the random states of torch and Python are neither read nor changed. Where linear layers are bf16, it is
    computed under autocast.

    model        in eval mode
    frames       of the codec, LEAST_FRAMES or more, those of a prefix included
    sampling     without its seed: each request brings its own generator
    should_stop  asked before each step: once it says True, no other is made
    pace         to which what was made is added

    Requests of a melody model whose texts differ in length are made one length after the other.

    Raises ValueError for fewer frames, for a prefix or melody of another shape or too long, for prefixes of different
    lengths, and for a melody that the model does not read; ModelError for logits not finite.
    """
    prefixes = [_prefix(model, frames, request) for request in requests]
    if len({prefix_KP.shape for prefix_KP in prefixes}) > 1:
        raise ValueError(f"prefixes of different lengths: {sorted({one.shape[1] for one in prefixes})} frames")
    for request in requests:
        _check_melody(model, request.melody_C)
    made: dict[int, Tensor] = {}
    since = time.perf_counter()
    for batch in _batches(model, requests):
        codes_BKT = make_codes(
            model,
            [requests[number] for number in batch],
            torch.stack([prefixes[number] for number in batch]).to(model.enc_to_dec_proj.weight.device),
            frames=frames,
            sampling=sampling,
            decoding=decoding,
            should_stop=should_stop,
        )
        if codes_BKT is None:
            return None
        made.update(zip(batch, codes_BKT.cpu(), strict=True))
    if pace is not None:
        pace.add(sum(codes_KT[:, prefixes[n].shape[1] :].numel() for n, codes_KT in made.items()), since)
    return [made[number] for number in range(len(requests))]


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
    """The codes (K, frames) of one request by its seed, which is that of `sampling`. See Request and generate_all."""
    request = Request(
        text_SD=text_SD,
        generator=torch.Generator().manual_seed(sampling.seed),
        prefix_KT=prefix_KT,
        melody_C=melody_C,
    )
    made = generate_all(model, [request], frames=frames, sampling=sampling, should_stop=should_stop)
    return None if made is None else made[0]


def decode(codec: EncodecModel, codes_KT: Tensor) -> np.ndarray:
    """The sound of codes (K, T) in [0, V): float32, about -1 to 1, of T x samples per frame samples.

    Mono, (samples,), where there are as many codebooks as the codec has. Of twice as many, which stand as 1L, 1R, 2L,
    2R and so on, it is stereo, (samples, 2): each channel is decoded by itself.

    Raises ModelError where the sound is not finite, and what `decode_channel` raises.
    """
    channels = len(codes_KT) // codec.config.num_quantizers
    decoded = [decode_channel(codec, codes_KT[channel::channels]) for channel in range(channels)]
    audio = np.stack([of_channel.numpy() for of_channel in decoded], axis=-1)
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
    # In memory, because from inside libsndfile an error of the disk reaches nobody.
    made = io.BytesIO()
    try:
        soundfile.write(made, audio / max(peak, 1.0), sample_rate_hz, "PCM_16", format="WAV")
        write_whole(path, made.getvalue())
    except (OSError, soundfile.LibsndfileError) as error:
        raise StorageError(f"{path} cannot be written ({error}): choose another --output") from error


def _prefix(model: LanguageModel, frames: int, request: Request) -> Tensor:
    """The codes (K, P) int64 that the request goes on from, P may be 0."""
    codebooks, least = model.decoder.num_codebooks, max(LEAST_FRAMES, largest_delay(model))
    if frames < least:
        raise ValueError(f"{frames} frames are fewer than {least}")
    if request.prefix_KT is None:
        return torch.empty(codebooks, 0, dtype=torch.int64)
    prefix_KT = request.prefix_KT
    if prefix_KT.ndim != 2 or len(prefix_KT) != codebooks or not prefix_KT.shape[1] < frames:
        raise ValueError(f"a prefix of shape {tuple(prefix_KT.shape)} for {frames} frames of {codebooks} codebooks")
    return prefix_KT.to("cpu", torch.int64)


def _check_melody(model: LanguageModel, melody_C: Tensor | None) -> None:
    if melody_C is None:
        return
    if model.audio_enc_to_dec_proj is None:
        raise ValueError("a melody for a model that reads none")
    if melody_C.shape != (MELODY_PLACES,):
        raise ValueError(f"a melody of shape {tuple(melody_C.shape)} for {MELODY_PLACES} places")


def _batches(model: LanguageModel, requests: Sequence[Request]) -> list[list[int]]:
    """The numbers of the requests that are made together.

    A text model reads texts of any lengths beside each other, by a mask. In front of a melody model's codes stands the
    text: beside a longer one, a row's codes would stand at other places than alone.
    """
    batches: dict[int, list[int]] = {}
    for number, request in enumerate(requests):
        key = 0 if model.audio_enc_to_dec_proj is None else text_tokens(request)
        batches.setdefault(key, []).append(number)
    return list(batches.values())
