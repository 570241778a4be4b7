"""Model FLOPs: what the arithmetic of a clip's step needs, counted from the model's shape, however it is computed.

Two FLOPs for each multiply-add of a matrix product; norms, GELU, softmax and embeddings are not counted. What is
computed twice to save memory is counted once, padding not at all. So model FLOPs a second, over what the device's
own matrix product reaches, are the share of it that becomes training: the model FLOPs utilisation, MFU.
"""

from __future__ import annotations

from trainer.shapes import Shape

MULTIPLY_ADD = 2
# A product's backward pass is two products of its size: for its inputs, and for its weights.
FORWARD_AND_BACKWARD = 3


def clip_flops(shape: Shape, frames: int, text_tokens: int = 0, *, causal: bool = True) -> int:
    """FLOPs of forward and backward of one clip of so many frames and text tokens.

    causal  each frame attends to itself and those before it; False counts the whole square, as kernels without
            a causal form compute it, and torch's FlopCounterMode counts

    frames x 3 x 2 x (layers x (6 D^2 + 2 D F) + K V D), self-attention 3 x 2 x layers x D x T^2 (twice that if not
    causal), cross-attention 3 x 4 x layers x D x T x S, its keys and values 3 x 4 x layers x D^2 x S, the text's
    projection 4 x D x D_text x S, whose input needs no gradient. 2.39, 10.25 and 17.9 GFLOP a frame of 30 s for
    small, medium and large.
    """
    width, layers = shape.width, shape.layers
    crossed = layers if shape.cross_attention else 0
    of_frame = layers * (4 * width**2 + 2 * width * shape.ffn) + shape.codebooks * shape.codes * width
    of_frame += crossed * 2 * width**2
    pairs = layers * (frames**2 / 2 if causal else frames**2) + crossed * frames * text_tokens
    products = frames * of_frame + text_tokens * crossed * 2 * width**2 + 2 * width * pairs
    projection = text_tokens * shape.text_width * width
    return round(MULTIPLY_ADD * (FORWARD_AND_BACKWARD * products + (FORWARD_AND_BACKWARD - 1) * projection))
