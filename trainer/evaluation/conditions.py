"""What a language model generates from: text, melody and codes that are given, in its cache before the first draw.

A text model attends to the text; the codes that are given but the last lie in the cache. In front of the codes of a
melody model stand melody and text: these lie in the cache, and all codes that are given are read with the first draw.

The rows of a batch are its requests, and behind them the null conditions of those that are guided.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, EncoderDecoderCache

from trainer.model.delay_pattern import inputs_and_labels
from trainer.model.language_model import LanguageModel
from trainer.spec.shapes import MELODY_PLACES

if TYPE_CHECKING:
    from trainer.evaluation.generation import Request


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """R rows of B requests, on the model's device.

    guided       the requests that have a null row, in the order of these rows
    cache        transformers' keys and values of what stands before `unread_RKN`
    unread_RKN   (R, K, N) int64: what the decoder reads before the first draw
    text_RSD     the projected text that a text model attends to; None in a melody model
    attended_RS  (R, S) bool: the text that a row attends to; None where it is all of it
    """

    guided: tuple[int, ...]
    cache: Any
    unread_RKN: Tensor
    text_RSD: Tensor | None
    attended_RS: Tensor | None


def text_tokens(request: Request) -> int:
    """How many places a request's text takes; the null condition is one zero."""
    return 1 if request.text_SD is None else len(request.text_SD)


def read_conditions(
    model: LanguageModel, requests: Sequence[Request], prefix_BKP: Tensor, *, guidance: float
) -> Conditions:
    """The conditions of a batch. The model is run, without gradients.

    requests    of a melody model: with texts of one length, since their codes would stand at different places else
    prefix_BKP  (B, K, P) int64: codes that are given, on the model's device
    guidance    above 1, the null condition of a request that has text or melody comes as a row of its own
    """
    conditioned = [n for n, one in enumerate(requests) if one.text_SD is not None or one.melody_C is not None]
    guided = tuple(conditioned) if guidance > 1 else ()
    text_RSD, attended_RS = _text(model, requests, len(guided))
    given_RKP = torch.cat([prefix_BKP, prefix_BKP[list(guided)]])
    config = model.decoder.config
    # The inputs of P + 1 steps, the start token and the delayed codes. The last is what the first draw follows.
    longer_RKN = nn.functional.pad(given_RKP, (0, 1), value=config.pad_token_id)
    inputs_RKN, _ = inputs_and_labels(longer_RKN, config.pad_token_id, config.audio_channels)
    if model.audio_enc_to_dec_proj is None:
        cache = _attended(model, text_RSD, attended_RS, inputs_RKN[..., :-1])
        return Conditions(
            guided=guided, cache=cache, unread_RKN=inputs_RKN[..., -1:], text_RSD=text_RSD, attended_RS=attended_RS
        )
    cache = _in_front(model, text_RSD, [one.melody_C for one in requests])
    return Conditions(guided=guided, cache=cache, unread_RKN=inputs_RKN, text_RSD=None, attended_RS=None)


def cross_mask(attended_RS: Tensor | None, steps: int) -> Tensor | None:
    """(R, 1, steps, S) bool. With four axes transformers uses a mask as it is; one with two it reads on the host."""
    return None if attended_RS is None else attended_RS[:, None, None, :].expand(-1, 1, steps, -1)


def _text(model: LanguageModel, requests: Sequence[Request], guided: int) -> tuple[Tensor, Tensor | None]:
    """The projected text (R, S, D), zero behind a shorter one, and which of it each row attends to.

    A null condition is exactly zero, whatever the length: its keys and values are zero too, and need no mask.
    """
    device, projection = model.enc_to_dec_proj.weight.device, model.enc_to_dec_proj
    lengths = [text_tokens(request) for request in requests]
    rows, places = len(requests) + guided, max(lengths)
    states_RSD = torch.zeros(rows, places, projection.in_features)
    mask_RS = torch.zeros(rows, places, dtype=torch.int64)
    for row, request in enumerate(requests):
        if request.text_SD is not None:
            states_RSD[row, : lengths[row]] = request.text_SD
            mask_RS[row, : lengths[row]] = 1
    attended_RS = None
    if len(set(lengths)) > 1:
        attended_RS = (mask_RS.bool() | (mask_RS.sum(dim=1, keepdim=True) == 0)).to(device)
    mask_RS = mask_RS.to(device)
    return projection(states_RSD.to(device)) * mask_RS[..., None], attended_RS


def _attended(model: LanguageModel, text_RSD: Tensor, attended_RS: Tensor | None, inputs_RKP: Tensor) -> Any:
    """Of a text model: a cache with the keys and values of all given steps but the last."""
    config = model.decoder.config
    # Given here, because what transformers makes for a decoder without encoder (version 5.23) has one list of keys for
    # both attentions.
    cache = EncoderDecoderCache(DynamicCache(config=config), DynamicCache(config=config))
    if inputs_RKP.shape[-1]:
        model.decoder.model(
            input_ids=inputs_RKP.flatten(0, 1),
            encoder_hidden_states=text_RSD,
            encoder_attention_mask=cross_mask(attended_RS, inputs_RKP.shape[-1]),
            past_key_values=cache,
            use_cache=True,
        )
    return cache


def _in_front(model: LanguageModel, text_RSD: Tensor, melodies: Sequence[Tensor | None]) -> Any:
    """Of a melody model: a cache with the keys and values of melody and text.

    The null melody is note 0 at all places, and so it is in the row without conditions. Given the prefix itself,
    MusicgenMelodyForCausalLM.generate (transformers 5.23) would put zeros there in place of it, which no model was
    trained with; audiocraft and MusicgenMelodyForConditionalGeneration do as is done here.
    """
    melody_RC = torch.zeros(len(text_RSD), MELODY_PLACES, dtype=torch.int64)
    for row, melody_C in enumerate(melodies):
        if melody_C is not None:
            melody_RC[row] = melody_C
    melody_RCD = model.melody_states(melody_RC.to(text_RSD.device))
    cache = DynamicCache(config=model.decoder.config)
    model.decoder.model.decoder(
        inputs_embeds=torch.cat([melody_RCD, text_RSD], dim=1), past_key_values=cache, use_cache=True
    )
    return cache
