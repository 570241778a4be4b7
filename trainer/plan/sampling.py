"""Bytes that a process holds while it makes sounds (--sample_every): a copy of the model, and what making one takes.

Sounds are made between steps: no activations, no copies of a strategy's work are there then. What is made is described
in trainer/engine/sampling_model.py and trainer/evaluation/; tests/plan/test_sampling.py counts what they allocate.
"""

from __future__ import annotations

from trainer.plan.layout import CAPTION_TOKENS, FLOAT32, Layout, Samples
from trainer.spec.shapes import FRAME_RATE_HZ, Shape
from trainer.spec.trainable import Counts

# What one layer works with at its most, for each step of a prefix that is read at once: three float32 values of the
# residual stream's width, a cast, and its feed-forward part before and after GELU.
PREFIX_RESIDUALS, PREFIX_VALUES, PREFIX_FFN_VALUES = 3, 1, 2
# What EnCodec's last layers hold while they decode, in float32 values for each sample of the sound: so many times the
# channels of its first convolution, and so many more. PyTorch recorded 205 values with 64 channels and 44 with 8 on a
# CPU (2026-11-27), which is 3 x channels + 21; the rest is room for the convolution's own.
DECODING_TENSORS, DECODING_VALUES = 4, 24
SAMPLE_RATE_HZ = 32_000


def sampling_bytes(shape: Shape, layout: Layout, counts: Counts, samples: Samples) -> int:
    """What a process holds at its peak while it makes one sound, beside all that it keeps between steps.

    EnCodec comes once the codes are made and the caches are gone; its weights may stay for the next sound.
    """
    codec = FLOAT32 * (shape.frozen - shape.text_encoder)
    working = max(generating_bytes(shape, layout, samples), decoding_bytes(shape, samples.frames))
    return copy_bytes(shape, layout, counts) + max(_in_flight_bytes(shape, layout), codec + working)


def copy_bytes(shape: Shape, layout: Layout, counts: Counts) -> int:
    """The copy: linear layers in the precision of the computation, embeddings and norms in float32; no adapters."""
    rows = counts.added if layout.workload.selection.new_rows else 0
    return layout.compute_bytes * shape.cast_parameters + FLOAT32 * (shape.parameters - shape.cast_parameters + rows)


def decoding_bytes(shape: Shape, frames: int) -> int:
    """What EnCodec works with while it decodes so many frames, beside its weights: one channel after the other, while
    those that are decoded stay."""
    values = DECODING_TENSORS * shape.codec_channels + DECODING_VALUES + shape.audio_channels - 1
    return FLOAT32 * values * round(frames / FRAME_RATE_HZ * SAMPLE_RATE_HZ)


def generating_bytes(shape: Shape, layout: Layout, samples: Samples) -> int:
    """Keys and values of all layers, of the sound and of the prompt, and what a prefix needs that is read at once.

    The sound has as many steps as frames and the largest delay. A melody model keeps its prompt, which is the melody
    and the text, as it keeps steps; a text model keeps the text's keys and values beside them.
    """
    rows = 2 if samples.guided else 1
    prompt = shape.prefix_places(CAPTION_TOKENS)
    steps = prompt + samples.frames + shape.largest_delay
    of_a_step = 2 * shape.width * layout.compute_bytes
    # A layer's keys and values are copied where a step is added to them.
    cache = (shape.layers + 1) * of_a_step * steps
    if shape.cross_attention:
        cache += shape.layers * of_a_step * CAPTION_TOKENS
    values = layout.compute_bytes * (PREFIX_VALUES * shape.width + PREFIX_FFN_VALUES * shape.ffn)
    prefix = (prompt + samples.continued_frames) * (values + FLOAT32 * PREFIX_RESIDUALS * shape.width)
    return rows * (cache + prefix)


def _in_flight_bytes(shape: Shape, layout: Layout) -> int:
    """The float32 copy of the largest parameter on its way into the copy; two where the host's memory is the device's
    and an adapter is added to it."""
    largest = max(shape.width * shape.ffn, (shape.codes + 1) * shape.width, shape.text_width * shape.width)
    return FLOAT32 * largest * (2 if layout.workload.selection.lora and not layout.on_gpu else 1)
