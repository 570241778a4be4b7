"""Model FLOPs: what the arithmetic of a clip's step needs, counted from the model's shape, however it is computed.

Two FLOPs for each multiply-add of a matrix product; norms, GELU, softmax and embeddings are not counted, nor is a T5
in the loop, whose captions are short. What is computed twice to save memory is counted once, padding not at all. So
model FLOPs a second, over what the device's own matrix product reaches, are the share of it that becomes training:
the model FLOPs utilisation, MFU.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

from trainer.spec.shapes import Shape
from trainer.spec.trainable import ATTENTIONS, EMBEDDINGS, EVERYTHING, HEADS, PROJECTION, Lora, Selection

MULTIPLY_ADD = 2
# What a product is for: so many multiply-adds a frame, a text token, a pair of frames, a pair of frame and token.
Size = tuple[int, int, int, int]


def clip_flops(
    shape: Shape, frames: int, text_tokens: int = 0, selection: Selection = EVERYTHING, *, causal: bool = True
) -> int:
    """FLOPs of forward and backward of one clip of so many frames and text tokens.

    selection  what is trained. A product is computed forward; backward for its inputs, where something that is
               trained is before them; and for its weights, where these are trained
    causal     each frame attends to itself and those before it; False counts the whole square, as kernels without
               a causal form compute it, and torch's FlopCounterMode counts

    With all trained: frames x 3 x 2 x (layers x (6 D^2 + 2 D F) + K V D), self-attention 3 x 2 x layers x D x T^2
    (twice that if not causal), cross-attention 3 x 4 x layers x D x T x S, its keys and values 3 x 4 x layers x D^2 x
    S, the text's projection 4 x D x D_text x S, whose input needs no gradient. 2.39, 10.25 and 17.9 GFLOP a frame of
    30 s for small, medium and large.
    """
    of_frame, of_token, of_pair, of_crossing = _multiply_adds(shape, selection)
    pairs = frames**2 / 2 if causal else frames**2
    total = of_frame * frames + of_token * text_tokens + of_pair * pairs + of_crossing * frames * text_tokens
    return round(MULTIPLY_ADD * total)


@lru_cache(maxsize=8)
def _multiply_adds(shape: Shape, selection: Selection) -> Size:
    """Of the step: forward, and backward as far as it is needed."""
    products = list(_products(shape, selection))
    of_frame, of_token, of_pair, of_crossing = (
        sum(size[kind] * times for size, times in products) for kind in range(4)
    )
    return of_frame, of_token, of_pair, of_crossing


def _products(shape: Shape, selection: Selection) -> Iterator[tuple[Size, int]]:
    """Every product of the model, from the inputs on, and how often it is computed: 1 to 3 times."""
    lora, width, ffn = selection.lora, shape.width, shape.ffn
    whole = lora is None and not selection.new_rows  # parts are trained themselves

    text_trained = whole and PROJECTION not in selection.frozen_parts
    yield from _linear(lora, "", "enc_to_dec_proj", (shape.text_width, width), text_trained, selection.new_rows > 0, 1)
    # Whether something that is trained is before the text, and before the frames, at this place of the model.
    text = text_trained or selection.new_rows > 0 or _adapted(lora, "", "enc_to_dec_proj")
    moves = whole and EMBEDDINGS not in selection.frozen_parts
    for layer in range(shape.layers):
        trained = whole and layer not in selection.frozen_layers
        for kind in ATTENTIONS if shape.cross_attention else ATTENTIONS[:1]:
            keys_of = 1 if kind == "encoder_attn" else 0  # of the text, or of the frames
            moves = moves or trained  # its norm is
            before = {"q_proj": moves, "k_proj": text if keys_of else moves, "v_proj": text if keys_of else moves}
            after = {}
            for name, needed in before.items():
                place = 0 if name == "q_proj" else keys_of
                yield from _linear(lora, kind, name, (width, width), trained, needed, place)
                after[name] = needed or trained or _adapted(lora, kind, name)
            pair: Size = (0, 0, 0, width) if keys_of else (0, 0, width, 0)
            scores = after["q_proj"] or after["k_proj"]
            yield pair, 1 + after["q_proj"] + after["k_proj"]
            yield pair, 1 + scores + after["v_proj"]
            moves = moves or scores or after["v_proj"]
            yield from _linear(lora, kind, "out_proj", (width, width), trained, moves, 0)
            moves = moves or _adapted(lora, kind, "out_proj")
        yield from _linear(lora, "", "fc1", (width, ffn), trained, moves, 0)
        moves = moves or _adapted(lora, "", "fc1")
        yield from _linear(lora, "", "fc2", (ffn, width), trained, moves, 0)
        moves = moves or _adapted(lora, "", "fc2")
    heads_trained = whole and HEADS not in selection.frozen_parts
    sizes = (width, shape.codebooks * shape.codes)
    yield from _linear(None, "", "lm_heads", sizes, heads_trained, moves or heads_trained, 0)


def _linear(
    lora: Lora | None, kind: str, name: str, sizes: tuple[int, int], trained: bool, needed: bool, place: int
) -> Iterator[tuple[Size, int]]:
    """A linear layer and its adapter, if it has one.

    needed  whether its input needs a gradient
    place   what it is computed for: 0 each frame, 1 each text token
    """
    inputs, outputs = sizes
    yield _at(place, inputs * outputs), 1 + trained + needed
    if lora is not None and _adapted(lora, kind, name):
        yield _at(place, inputs * lora.rank), 2 + needed
        yield _at(place, lora.rank * outputs), 3


def _adapted(lora: Lora | None, kind: str, name: str) -> bool:
    return lora is not None and bool({name, f"{kind}.{name}"} & set(lora.targets))


def _at(place: int, multiply_adds: int) -> Size:
    return (multiply_adds, 0, 0, 0) if place == 0 else (0, multiply_adds, 0, 0)
