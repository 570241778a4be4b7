"""What a language model generates from: text, melody and codes that are given, put into its cache before `generate`.

A text model attends to the text; the codes that are given but the last lie in the cache. In front of the codes of a
melody model stand melody and text: these lie in the cache, and all codes that are given are read by `generate`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache

from trainer.model.delay_pattern import inputs_and_labels
from trainer.model.language_model import LanguageModel
from trainer.spec.shapes import MELODY_PLACES


def read_conditions(
    model: LanguageModel, text_SD: Tensor | None, melody_C: Tensor | None, given_KS: Tensor, *, guided: bool
) -> dict[str, Any]:
    """What the decoder's `generate` takes besides the codes that are given. The model is run, without gradients.

    text_SD   (S, D) float32, or None for the null condition
    melody_C  (C,) int64 notes of a melody model, or None for its null melody; None for a text model
    given_KS  (K, S) int64: the start token, then codes that are given
    guided    whether the null condition comes as a second row, as transformers has it
    """
    text_BSD, mask_BS = _text(model, text_SD, guided=guided)
    if model.audio_enc_to_dec_proj is None:
        return _attended(model, text_BSD, mask_BS, given_KS)
    return _in_front(model, text_BSD, melody_C, given_KS)


def _text(model: LanguageModel, text_SD: Tensor | None, *, guided: bool) -> tuple[Tensor, Tensor]:
    """The projected text (B, S, D), and where there is text, (B, S) int64.

    B is 1, or 2 with guidance: then the null condition, which is exactly zero, comes second.
    """
    device, width = model.enc_to_dec_proj.weight.device, model.enc_to_dec_proj.in_features
    states_BSD = torch.zeros(1, 1, width, device=device) if text_SD is None else text_SD.to(device)[None]
    mask_BS = torch.full(states_BSD.shape[:2], int(text_SD is not None), device=device)
    if guided:
        states_BSD = torch.cat([states_BSD, torch.zeros_like(states_BSD)])
        mask_BS = torch.cat([mask_BS, torch.zeros_like(mask_BS)])
    return model.enc_to_dec_proj(states_BSD) * mask_BS[..., None], mask_BS


def _attended(model: LanguageModel, text_BSD: Tensor, mask_BS: Tensor, given_KS: Tensor) -> dict[str, Any]:
    """Of a text model: the text, and a cache with the keys and values of all given steps but the last.

    MusicgenForCausalLM.generate (transformers 5.15 to 5.23) reads only the last of what is given to it.
    """
    config = model.decoder.config
    # Given here, because what transformers makes for a decoder without encoder (version 5.23) has one list of keys for
    # both attentions.
    cache = EncoderDecoderCache(DynamicCache(config=config), DynamicCache(config=config))
    prefix_1KP = given_KS[None, :, 1:]
    if prefix_1KP.shape[-1]:
        inputs_1KP, _ = inputs_and_labels(prefix_1KP, config.pad_token_id, config.audio_channels)
        model.decoder.model(
            input_ids=inputs_1KP[0].repeat(len(text_BSD), 1),
            encoder_hidden_states=text_BSD,
            encoder_attention_mask=mask_BS,
            past_key_values=cache,
            use_cache=True,
        )
    return {
        # Given too: transformers would mask the start token, which is the padding token as well.
        "attention_mask": torch.ones(1, given_KS.shape[1], dtype=torch.int64, device=given_KS.device),
        "encoder_hidden_states": text_BSD,
        "encoder_attention_mask": mask_BS,
        "past_key_values": cache,
    }


def _in_front(
    model: LanguageModel, text_BSD: Tensor, melody_C: Tensor | None, given_KS: Tensor
) -> dict[str, Any]:
    """Of a melody model: a cache with the keys and values of melody and text.

    The null melody is note 0 at all places, and so it is in the row without conditions. Given the prefix itself,
    MusicgenMelodyForCausalLM.generate (transformers 5.23) would put zeros there in place of it, which no model was
    trained with; audiocraft and MusicgenMelodyForConditionalGeneration do as is done here.
    """
    device, rows = given_KS.device, len(text_BSD)
    melody_BC = torch.zeros(rows, MELODY_PLACES, dtype=torch.int64, device=device)
    if melody_C is not None:
        melody_BC[0] = melody_C.to(device)
    prefix_BPD = torch.cat([model.melody_states(melody_BC), text_BSD], dim=1)
    cache = DynamicCache(config=model.decoder.config)
    model.decoder.model.decoder(inputs_embeds=prefix_BPD, past_key_values=cache, use_cache=True)
    # As long as cache and codes together: shorter, and `generate` takes the codes that are given for cached ones.
    places = prefix_BPD.shape[1] + given_KS.shape[1]
    mask_1P = torch.ones(1, places, dtype=torch.int64, device=device)
    return {"attention_mask": mask_1P, "past_key_values": cache}
