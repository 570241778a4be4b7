"""Bytes of activations: what the forward pass keeps for the backward pass, and what the backward pass works with.

Counted in values per place of one clip and per layer, as multiples of the model's width or of the width of its
feed-forward part (ffn). Places are the frames, and in melody models the melody and the text before them, too. The
counts are what autograd saves in transformers 5.23's MusicgenDecoderLayer and MusicgenMelodyDecoderLayer with a fused
attention kernel; tests/plan/test_memory.py counts them again. The values of the residual stream have its precision,
all others that of the computation (Layout.residual_bytes and compute_bytes).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from trainer.plan.layout import FLOAT32, Layout
from trainer.spec.shapes import Shape
from trainer.spec.trainable import count

# One layer of which nothing is recomputed keeps:
LAYER_RESIDUALS = 3  # the residual stream, as the input of each of the three LayerNorms
LAYER_VALUES = 9  # the three normed inputs; q, k and v; attention's output; cross-attention's q and output
LAYER_FFN_VALUES = 2  # before and after GELU, of the ffn's width
# Without cross-attention: less one LayerNorm's input, and less three values (its normed input, q and output).
CROSS_RESIDUALS, CROSS_VALUES = 1, 3
AUTOCAST_EXTRA_VALUES = 2  # autocast casts the common input of q, k and v once for each of them
COMPILED_EXTRA_VALUES = -1  # the compiler joins these casts, and one more (torch 2.11 on an H100 and 2.13 on a CPU)

# With selective checkpointing a compiled layer keeps its input (a residual), and the results of its matrix products:
# q, k, v, attention's output and its projection; cross-attention's q, output and projection; the ffn before GELU.
# Under autocast this comes to 28 bytes times the width, per frame and layer, where ffn = 4 x width. On an H100 it was
# 28.3 (2026-11-23).
SELECTIVE_RESIDUALS, SELECTIVE_VALUES, SELECTIVE_FFN_VALUES = 1, 8, 1

# Beside what is kept, the backward pass of the one layer at work holds gradients: of two values of the ffn's width, and
# of three of the residual stream.
BACKWARD_FFN_VALUES = 2
BACKWARD_RESIDUALS = 3

# T5-base's encoder runs in the loop where a new word is learned, in float32 and with frozen weights. Per layer and
# token it keeps this many values of T5's width, and per layer and head a table of scores, tokens x tokens.
T5_LAYERS, T5_HEADS, T5_VALUES = 12, 12, 10


@dataclass(frozen=True, kw_only=True)
class Activations:
    """Bytes of one micro-batch of the longest clips.

    kept     by all layers, and by a T5 in the loop
    working  what the backward pass of one layer holds besides
    logits   what the heads and the loss keep, or hold while the loss's gradient is computed; gone when layers begin
    """

    kept: int
    working: int
    logits: int

    @property
    def peak(self) -> int:
        return self.kept + max(self.working, self.logits)


def activations_of(shape: Shape, layout: Layout) -> Activations:
    """The activations of a micro-batch of this layout, as deep in a row as the melody and caption of each clip go."""
    frames, clips = layout.workload.segment_frames, layout.micro_batch
    places = shape.prefix_places(layout.workload.caption_tokens) + frames
    kept, working = place_bytes(shape, layout)
    norm, logits = logits_bytes(shape, layout)
    return Activations(
        kept=clips * (places * kept + caption_bytes(shape, layout)),
        working=clips * places * working,
        logits=clips * (places * norm + frames * logits),
    )


def place_bytes(shape: Shape, layout: Layout) -> tuple[int, int]:
    """Bytes per place of one clip: what all layers keep, and what the backward pass of one layer holds besides."""
    extra = 0
    if layout.autocast:
        extra = COMPILED_EXTRA_VALUES if layout.compiled else AUTOCAST_EXTRA_VALUES
    layer = _layer_bytes(shape, layout, LAYER_RESIDUALS, LAYER_VALUES + extra, LAYER_FFN_VALUES)
    backward = layout.compute_bytes * BACKWARD_FFN_VALUES * shape.ffn
    backward += layout.residual_bytes * BACKWARD_RESIDUALS * shape.width
    if not layout.gradient_checkpointing:
        return shape.layers * layer, backward
    kept = layout.residual_bytes * shape.width
    if layout.gradient_checkpointing == "selective":
        kept = _layer_bytes(shape, layout, SELECTIVE_RESIDUALS, SELECTIVE_VALUES, SELECTIVE_FFN_VALUES)
    # The layer at work has been computed again, so that all its activations are there once more.
    return shape.layers * kept, layer + backward


def logits_bytes(shape: Shape, layout: Layout) -> tuple[int, int]:
    """Bytes per place, and bytes per frame, of what the heads and the loss keep or hold.

    Kept are the final norm's input of each place, and of the frames the heads' inputs (under autocast one cast for each
    codebook) and the float32 log-probabilities of every codebook. One codebook at a time, its cross entropy holds two
    gradients in float32 and, where the computation is in half precision, one in that.
    """
    heads = shape.codebooks if layout.autocast else 1
    one_codebook = 2 * FLOAT32 + (layout.compute_bytes if layout.mixed_precision != "no" else 0)
    of_codes = shape.codes * (shape.codebooks * FLOAT32 + one_codebook)
    return layout.residual_bytes * shape.width, layout.compute_bytes * shape.width * heads + of_codes


def caption_bytes(shape: Shape, layout: Layout) -> int:
    """Bytes per caption that a T5 in the loop keeps; 0 where its states come from the cache, as in all other runs."""
    if not count(shape, layout.workload.selection).text_encoder:
        return 0
    tokens = layout.workload.caption_tokens
    return FLOAT32 * T5_LAYERS * tokens * (T5_VALUES * shape.text_width + T5_HEADS * tokens)


def row_places(shape: Shape, layout: Layout, tokens: int) -> int:
    """How many places a row costs at most besides its frames, whose text has so many tokens.

    In a melody model they are places. In cross-attention a token has keys and values in every layer, two values of the
    width, and two more where autocast casts what they are made of; a place has 13 values and more, or, where layers are
    computed again, the layer's input in every layer. So a token costs at most a place. What a T5 in the loop keeps for
    the text is rounded up to places.
    """
    workload = replace(layout.workload, caption_tokens=tokens)
    in_loop = caption_bytes(shape, replace(layout, workload=workload))
    kept, _ = place_bytes(shape, layout)
    return max(tokens, shape.prefix_places(tokens)) - (-in_loop // kept)


def _layer_bytes(shape: Shape, layout: Layout, residuals: int, values: int, ffn_values: int) -> int:
    """Bytes per place of one layer that keeps so many values; a layer's input, one residual, is kept in any case."""
    if not shape.cross_attention:
        residuals, values = max(1, residuals - CROSS_RESIDUALS), values - CROSS_VALUES
    compute, residual = layout.compute_bytes, layout.residual_bytes
    return compute * (values * shape.width + ffn_values * shape.ffn) + residual * residuals * shape.width
