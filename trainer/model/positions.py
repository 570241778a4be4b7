"""transformers' sinusoidal positions, looked up on the device alone.

transformers before 5.18 makes the places' numbers on the host and copies them to the device in every forward pass. From
memory that is not pinned such a copy waits for all that the device still has to do, so that the device then waits for
the host, at each micro-batch and at each token of a sound. Here the rows are a slice of the table: the same values.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.models.musicgen.modeling_musicgen import MusicgenSinusoidalPositionalEmbedding
from transformers.models.musicgen_melody.modeling_musicgen_melody import MusicgenMelodySinusoidalPositionalEmbedding


class CodePositions(MusicgenSinusoidalPositionalEmbedding):
    """Of a text model's decoder."""

    @torch.no_grad()
    def forward(self, input_ids: Tensor, past_key_values_length: int = 0) -> Tensor:
        """The rows (T, D) of codes (B, K, T) that stand behind `past_key_values_length` others."""
        return rows_of(self, past_key_values_length, input_ids.shape[-1])


class RowPositions(MusicgenMelodySinusoidalPositionalEmbedding):
    """Of a melody model's decoder."""

    @torch.no_grad()
    def forward(self, inputs_embeds: Tensor, past_key_values_length: int = 0) -> Tensor:
        """The rows (P, D) of states (B, P, D) that stand behind `past_key_values_length` others."""
        return rows_of(self, past_key_values_length, inputs_embeds.shape[1])


def look_up_on_device(decoder: Any) -> None:
    """Give transformers' MusicgenDecoder or MusicgenMelodyDecoder such positions, with memory where its own have it."""
    own = decoder.embed_positions
    made = CodePositions if isinstance(own, MusicgenSinusoidalPositionalEmbedding) else RowPositions
    with own.weights.device:
        decoder.embed_positions = made(own.num_positions, own.embedding_dim)


def rows_of(positions: Any, first: int, count: int) -> Tensor:
    """The rows (count, D) of a table of positions from `first` on; it grows where it is too short."""
    if first + count > len(positions.weights):
        positions.make_weights(first + count, positions.embedding_dim)
    return positions.weights[first : first + count]
