"""A step of transformers' MusicGen decoder over keys and values whose memory is there from the start.

transformers' own cache copies all keys and values of a layer at each step, and its forward pass cannot be captured in
a CUDA graph. This step is the same computation with the same modules: pre-norm layers of self-attention, where there
are any cross-attention, and GELU, as transformers 5.15 to 5.23 and audiocraft 1.3.0 have it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from trainer.evaluation.conditions import Conditions
from trainer.model.language_model import LanguageModel
from trainer.model.positions import rows_of

# A compiled step is made for shapes: lengths are rounded up to these, so that few are made.
PLACES_BLOCK, TEXT_BLOCK = 256, 32
# Each model, number of sounds and length has one; above torch's own limit of 8, steps would run uncompiled.
MOST_GRAPHS = 64


@dataclass(frozen=True, kw_only=True)
class _Memory:
    """What a step reads and fills. R rows, H heads, d their width, L places, S text tokens.

    keys, values              of each layer, (R, H, L, d)
    text_keys, text_values    of each layer, (R, H, S, d); none in a melody model
    attended_R11S             bool: the text that a row attends to; None where it is all of it
    positions_LD              float32
    """

    keys: list[Tensor]
    values: list[Tensor]
    text_keys: list[Tensor]
    text_values: list[Tensor]
    attended_R11S: Tensor | None
    positions_LD: Tensor


class StaticDecoder:
    """The decoder of a batch, with room for the codes of all its steps."""

    def __init__(self, model: LanguageModel, conditions: Conditions, draws: int, *, compiled: bool):
        """draws: how many steps are made. What transformers' cache holds is copied."""
        cache, inputs_RKN = conditions.cache, conditions.unread_RKN
        if inputs_RKN.shape[-1] > 1:  # a melody model's start token and prefix
            model.decoder.model.decoder(
                input_ids=inputs_RKN[..., :-1].flatten(0, 1), past_key_values=cache, use_cache=True
            )
        read = cache if conditions.text_RSD is None else cache.self_attention_cache
        self._decoder, self._compiled = model.decoder, compiled
        self._place = read.get_seq_length()
        places = self._place + draws
        if compiled:
            places = _rounded_up(places, PLACES_BLOCK)
        self._places_L = torch.arange(places, device=inputs_RKN.device)
        self._memory = _memory(model, conditions, read, places, len(inputs_RKN), compiled=compiled)

    def __call__(self, codes_RKN: Tensor) -> Tensor:
        """The logits (R, K, V) behind the last of N steps; those before it are in the memory already."""
        place_1 = self._places_L[self._place : self._place + 1]
        self._place += 1
        if not self._compiled:
            return _logits(self._decoder, self._memory, codes_RKN[..., -1], place_1, self._place)
        torch.compiler.cudagraph_mark_step_begin()
        return _compiled_logits()(self._decoder, self._memory, codes_RKN[..., -1].contiguous(), place_1, None)


@functools.cache
def _compiled_logits() -> Callable[..., Tensor]:
    """One for all models and batches: torch compiles it again for other shapes, and remembers those that it has."""
    torch._dynamo.config.recompile_limit = max(MOST_GRAPHS, torch._dynamo.config.recompile_limit)
    return torch.compile(_logits, mode="reduce-overhead", dynamic=False)


def _logits(decoder: Any, memory: _Memory, codes_RK: Tensor, place_1: Tensor, reach: int | None) -> Tensor:
    """The logits (R, K, V) behind codes at `place_1`, whose keys and values are put into the memory.

    reach  how many places are read; None for all of them with a mask, so that the shapes are those of every step
    """
    inner = decoder.model.decoder
    embedded_RD = inner.embed_tokens[0](codes_RK[:, 0])
    for k, table in enumerate(inner.embed_tokens[1:], 1):
        embedded_RD = embedded_RD + table(codes_RK[:, k])
    hidden_R1D = embedded_RD[:, None] + memory.positions_LD[place_1]
    visible_1L = None
    if reach is None:
        visible_1L = (torch.arange(len(memory.positions_LD), device=place_1.device) <= place_1)[None]
    for number, layer in enumerate(inner.layers):
        normed_R1D = layer.self_attn_layer_norm(hidden_R1D)
        keys, values = memory.keys[number], memory.values[number]
        keys.index_copy_(2, place_1, _heads(layer.self_attn, layer.self_attn.k_proj(normed_R1D)))
        values.index_copy_(2, place_1, _heads(layer.self_attn, layer.self_attn.v_proj(normed_R1D)))
        seen = slice(None) if reach is None else slice(reach)
        hidden_R1D = hidden_R1D + _attend(layer.self_attn, normed_R1D, keys[:, :, seen], values[:, :, seen], visible_1L)
        if memory.text_keys:
            normed_R1D = layer.encoder_attn_layer_norm(hidden_R1D)
            text_keys, text_values = memory.text_keys[number], memory.text_values[number]
            hidden_R1D = hidden_R1D + _attend(
                layer.encoder_attn, normed_R1D, text_keys, text_values, memory.attended_R11S
            )
        wide_R1F = layer.activation_fn(layer.fc1(layer.final_layer_norm(hidden_R1D)))
        hidden_R1D = hidden_R1D + layer.fc2(wide_R1F)
    hidden_RD = inner.layer_norm(hidden_R1D)[:, 0]
    return torch.stack([head(hidden_RD) for head in decoder.lm_heads], dim=1)


def _attend(attention: Any, hidden_R1D: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    queries = _heads(attention, attention.q_proj(hidden_R1D))
    mixed_RH1d = scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
    return attention.out_proj(mixed_RH1d.transpose(1, 2).flatten(2))


def _heads(attention: Any, states_RND: Tensor) -> Tensor:
    """(R, H, N, d)"""
    return states_RND.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)


def _memory(
    model: LanguageModel, conditions: Conditions, read: Any, places: int, rows: int, *, compiled: bool
) -> _Memory:
    inner, heads = model.decoder.model.decoder, model.decoder.lm_heads
    keys: list[Tensor] = []
    values: list[Tensor] = []
    text_keys: list[Tensor] = []
    text_values: list[Tensor] = []
    text_RSD, attended_RS = conditions.text_RSD, conditions.attended_RS
    if text_RSD is not None and compiled:
        text_RSD, attended_RS = _padded(text_RSD, attended_RS)
    for number, layer in enumerate(inner.layers):
        attention = layer.self_attn
        for all_of_a_kind, held in ((keys, "keys"), (values, "values")):
            room = torch.zeros(
                rows, attention.num_heads, places, attention.head_dim, dtype=heads[0].weight.dtype,
                device=heads[0].weight.device,
            )  # fmt: skip
            if length := read.get_seq_length():
                room[:, :, :length] = getattr(read.layers[number], held)
            # Else CUDA graphs are left out, because the step writes to it. With a guard, the next batch's memory, which
            # lies elsewhere, would be compiled anew; so it is only recorded anew.
            torch._dynamo.mark_static_address(room, guard=False)
            all_of_a_kind.append(room)
        if text_RSD is not None:
            text_keys.append(_heads(layer.encoder_attn, layer.encoder_attn.k_proj(text_RSD)))
            text_values.append(_heads(layer.encoder_attn, layer.encoder_attn.v_proj(text_RSD)))
    return _Memory(
        keys=keys,
        values=values,
        text_keys=text_keys,
        text_values=text_values,
        attended_R11S=None if attended_RS is None else attended_RS[:, None, None, :],
        positions_LD=rows_of(inner.embed_positions, 0, places),
    )


def _padded(text_RSD: Tensor, attended_RS: Tensor | None) -> tuple[Tensor, Tensor]:
    """The text with zeros behind it, up to a multiple of TEXT_BLOCK, and the mask that leaves them out."""
    if attended_RS is None:
        attended_RS = torch.ones(text_RSD.shape[:2], dtype=torch.bool, device=text_RSD.device)
    more = _rounded_up(text_RSD.shape[1], TEXT_BLOCK) - text_RSD.shape[1]
    return nn.functional.pad(text_RSD, (0, 0, 0, more)), nn.functional.pad(attended_RS, (0, more))


def _rounded_up(number: int, block: int) -> int:
    return -(-number // block) * block
