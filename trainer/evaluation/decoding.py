"""The loop that makes codes, step by step, for several requests at once."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trainer.errors import ModelError
from trainer.evaluation.conditions import Conditions, cross_mask, read_conditions
from trainer.evaluation.draws import Draws
from trainer.evaluation.static_decoder import StaticDecoder
from trainer.model.delay_pattern import delay
from trainer.model.language_model import LanguageModel

if TYPE_CHECKING:
    from trainer.evaluation.generation import Request, Sampling

TO_BE_MADE = -1  # a cell of the pattern whose code is not there yet


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How the decoder is run. The codes are the same, but for the rounding of products in another order.

    Neither was measured on a GPU yet, and on a CPU they gain little (docs/benchmarks.md): both are off by default.

    static_cache  keys and values have their memory from the start, where transformers copies all of them at each step
    compiled      the step is compiled by torch, with CUDA graphs on a GPU; only with static_cache. The first step of
                  each new number of rows or length then takes a minute
    """

    static_cache: bool = False
    compiled: bool = False

    def __post_init__(self) -> None:
        if self.compiled and not self.static_cache:
            raise ValueError("compiled=True needs static_cache=True: a step is compiled for memory that stays")


@torch.no_grad()
def make_codes(
    model: LanguageModel,
    requests: Sequence[Request],
    prefix_BKP: Tensor,
    *,
    frames: int,
    sampling: Sampling,
    decoding: Decoding,
    should_stop: Callable[[], bool] | None,
) -> Tensor | None:
    """The codes (B, K, frames) of requests that fit into one batch, on the model's device; None where it was stopped.

    See generate_all and read_conditions. Raises ModelError for logits not finite.
    """
    pattern_BKS = _pattern(model, prefix_BKP, frames)
    steps = pattern_BKS.shape[-1]
    with _computing(model), _pythons_random_state():
        conditions = read_conditions(model, requests, prefix_BKP, guidance=sampling.guidance)
        decode: Callable[[Tensor], Tensor] = _Decoder(model, conditions)
        if decoding.static_cache:
            decode = StaticDecoder(model, conditions, steps - prefix_BKP.shape[-1], compiled=decoding.compiled)
        # On the device from here on: a list as an index is copied there at each step, which waits for all before it.
        guided_G = torch.tensor(conditions.guided, dtype=torch.int64).to(prefix_BKP.device)
        draws = Draws(sampling, [one.generator for one in requests], guided_G)
        inputs_RKN = conditions.unread_RKN
        for step in range(prefix_BKP.shape[-1], steps):
            if should_stop is not None and should_stop():
                return None
            made_BK = draws(decode(inputs_RKN))
            # Drawn for all codebooks, also where a code is given or none belongs, as transformers does.
            given_BK = pattern_BKS[..., step]
            next_BK = torch.where(given_BK == TO_BE_MADE, made_BK, given_BK)
            pattern_BKS[..., step] = next_BK
            inputs_RKN = torch.cat([next_BK, next_BK.index_select(0, guided_G)])[..., None]
    if draws.broken:
        raise ModelError("the model's logits are NaN or infinite: its weights are not usable")
    return _without_delay(pattern_BKS, frames, model.decoder.config.audio_channels)


class _Decoder:
    """transformers' decoder with its own growing cache."""

    def __init__(self, model: LanguageModel, conditions: Conditions):
        self._decoder, self._conditions = model.decoder, conditions

    def __call__(self, codes_RKN: Tensor) -> Tensor:
        """The logits (R, K, V) behind the last of N steps, which are added to the cache."""
        rows, codebooks, steps = codes_RKN.shape
        attending = {}
        if self._conditions.text_RSD is not None:
            attending = {
                "encoder_hidden_states": self._conditions.text_RSD,
                "encoder_attention_mask": cross_mask(self._conditions.attended_RS, steps),
            }
        logits = self._decoder(
            input_ids=codes_RKN.flatten(0, 1), past_key_values=self._conditions.cache, use_cache=True, **attending
        ).logits
        return logits[:, -1].view(rows, codebooks, -1)


def largest_delay(model: LanguageModel) -> int:
    """How many steps later than the first codebook the last one comes."""
    return (model.decoder.num_codebooks - 1) // model.decoder.config.audio_channels


def _pattern(model: LanguageModel, prefix_BKP: Tensor, frames: int) -> Tensor:
    """(B, K, frames + largest delay) int64: the delayed codes, TO_BE_MADE but for the prefix, and the special token
    where a codebook has none."""
    special, channels = model.decoder.config.pad_token_id, model.decoder.config.audio_channels
    codes_BKT = torch.full((*prefix_BKP.shape[:2], frames), TO_BE_MADE, device=prefix_BKP.device)
    codes_BKT[..., : prefix_BKP.shape[-1]] = prefix_BKP
    return delay(torch.nn.functional.pad(codes_BKT, (0, largest_delay(model)), value=special), special, channels)


def _without_delay(pattern_BKS: Tensor, frames: int, channels: int) -> Tensor:
    late = [k // channels for k in range(pattern_BKS.shape[1])]
    return torch.stack([pattern_BKS[:, k, by : by + frames] for k, by in enumerate(late)], dim=1)


@contextmanager
def _computing(model: LanguageModel) -> Iterator[None]:
    """Autocast to the precision of the linear layers, where it is not float32."""
    weight = model.decoder.lm_heads[0].weight
    if weight.dtype == torch.float32:
        yield
    else:
        with torch.autocast(weight.device.type, weight.dtype):
            yield


@contextmanager
def _pythons_random_state() -> Iterator[None]:
    """Afterwards it is as before: transformers' decoder draws from it at each layer (version 5.23, for LayerDrop)."""
    state = random.getstate()
    try:
        yield
    finally:
        random.setstate(state)
