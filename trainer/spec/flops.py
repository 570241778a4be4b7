"""Model FLOPs: the arithmetic that training on one clip needs, counted from the model's shape.

Counted are matrix products, at two FLOPs for each multiply-add. Not counted are norms, GELU, softmax and embeddings; a
T5 in the loop, whose captions are short; padding; and what is computed a second time to save memory. So model FLOPs per
second, divided by the FLOPs per second of the device's own large matrix product, say which share of the device's power
becomes training: the model FLOPs utilisation, MFU.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from trainer.spec.shapes import MELODY_PLACES, Shape
from trainer.spec.trainable import CROSS, EMBEDDINGS, EVERYTHING, HEADS, PROJECTION, SELF, Lora, Selection

MULTIPLY_ADD = 2  # FLOPs
# A product is computed once for each unit of its kind. Places are what the decoder's layers compute: the frames, and in
# melody models the melody's notes and the text's tokens before them. The products of attention's scores and sums are
# computed for each pair: a place that looks, and a place or text token that it looks at.
Unit = Literal["frame", "place", "token", "note", "place and place", "place and token"]


@dataclass(frozen=True, kw_only=True)
class Product:
    """A matrix product: its multiply-adds for one unit, and how often it is computed, forward and backward together."""

    unit: Unit
    multiply_adds: int
    times: int


def clip_flops(
    shape: Shape, frames: int, text_tokens: int = 0, selection: Selection = EVERYTHING, *, causal: bool = True
) -> int:
    """FLOPs of the forward and backward pass of one clip of so many frames, with a caption of so many text tokens.

    selection  what is trained, on which it depends how much of the backward pass is needed
    causal     each place attends to itself and those before it; False counts the whole square of places, which kernels
               without a causal form compute, and torch's FlopCounterMode counts

    With T frames, S text tokens and everything trained this is 3 x 2 x T x (layers x (6 D^2 + 2 D F) + K V D), for
    self-attention 3 x 2 x layers x D x T^2 (twice that if not causal), for cross-attention 3 x 4 x layers x D x T x S,
    for its keys and values 3 x 4 x layers x D^2 x S, and for the text's projection 4 x D x D_text x S, as its input
    needs no gradient. D is the width, F the ffn's width, K codebooks, V codes.

    A melody model has P = 235 + S + T places instead, where an absent caption has S = 1:
    3 x 2 x (P x layers x (4 D^2 + 2 D F) + T x K V D), for self-attention 3 x 2 x layers x D x P^2, and for the two
    projections 4 x D x (D_text x S + 12 x 235).

    Clips of 30 s without captions take 2.39, 10.25 and 17.9 GFLOPs per frame with small, medium and large, 10.40 and
    18.1 with melody and melody-large, and in stereo 0.05, 0.08 and 0.10 more at the three widths.
    """
    multiply_adds = _multiply_adds(shape, selection)
    prefix = shape.prefix_places(text_tokens)
    places = prefix + frames
    numbers: dict[Unit, float] = {
        "frame": frames,
        "place": places,
        "token": prefix - MELODY_PLACES if shape.melody else text_tokens,
        "note": MELODY_PLACES,
        "place and place": places**2 / 2 if causal else places**2,
        "place and token": places * text_tokens,
    }
    return round(MULTIPLY_ADD * sum(each * numbers[unit] for unit, each in multiply_adds.items()))


@lru_cache(maxsize=8)
def _multiply_adds(shape: Shape, selection: Selection) -> Mapping[Unit, int]:
    """Multiply-adds of forward and backward pass, for one of each unit that the model has."""
    totals: dict[Unit, int] = {}
    for product in _products(shape, selection):
        totals[product.unit] = totals.get(product.unit, 0) + product.multiply_adds * product.times
    return totals


def _products(shape: Shape, selection: Selection) -> Iterator[Product]:
    """Every product of the model, in the order of the forward pass.

    Each is computed once forward; once backward for each of its inputs that needs a gradient, because something that is
    trained comes before it; and once backward for its weights, if these are trained.
    """
    lora, width, ffn = selection.lora, shape.width, shape.ffn
    parts_trained = lora is None and not selection.new_rows  # else adapters or rows beside the model are trained
    projection, heads = (parts_trained and part not in selection.frozen_parts for part in (PROJECTION, HEADS))
    sizes = (shape.text_width, width)
    text_needed = selection.new_rows > 0
    yield from _linear(lora, "enc_to_dec_proj", sizes, "token", trained=projection, needed=text_needed)
    # From here on: whether the text's states, and those of the places, need a gradient at this point of the model.
    text_needed = text_needed or projection or _adapted(lora, "enc_to_dec_proj")
    needed = parts_trained and EMBEDDINGS not in selection.frozen_parts
    if shape.melody:
        notes = (shape.chroma_bins, width)
        yield from _linear(lora, "audio_enc_to_dec_proj", notes, "note", trained=projection)
        # The text stands in the row too, and the melody's projection is trained where the text's is.
        needed = needed or text_needed or _adapted(lora, "audio_enc_to_dec_proj")
    for layer in range(shape.layers):
        trained = parts_trained and layer not in selection.frozen_layers
        needed = needed or trained  # the layer's first norm is trained, and comes before all its products
        needed = yield from _attention(lora, SELF, width, trained=trained, needed=needed, keys_needed=needed)
        if shape.cross_attention:
            needed = yield from _attention(lora, CROSS, width, trained=trained, needed=needed, keys_needed=text_needed)
        for name, sizes in (("fc1", (width, ffn)), ("fc2", (ffn, width))):
            yield from _linear(lora, name, sizes, "place", trained=trained, needed=needed)
            needed = needed or _adapted(lora, name)
    sizes = (width, shape.codebooks * shape.codes)
    needed = needed or heads  # the final norm is trained with the heads, and comes before them
    yield from _linear(None, "lm_heads", sizes, "frame", trained=heads, needed=needed)


def _attention(
    lora: Lora | None, kind: str, width: int, *, trained: bool, needed: bool, keys_needed: bool
) -> Generator[Product, None, bool]:
    """One attention of a layer; returns whether its output needs a gradient.

    needed       whether the places that look need one
    keys_needed  whether what they look at needs one: places for self-attention, else the text
    """
    looked_at: Unit = "token" if kind == CROSS else "place"
    inputs: dict[str, tuple[Unit, bool]] = {
        "q_proj": ("place", needed),
        "k_proj": (looked_at, keys_needed),
        "v_proj": (looked_at, keys_needed),
    }
    outputs_needed = {}
    for name, (unit, input_needed) in inputs.items():
        yield from _linear(lora, f"{kind}.{name}", (width, width), unit, trained=trained, needed=input_needed)
        outputs_needed[name] = input_needed or trained or _adapted(lora, f"{kind}.{name}")
    query, key, value = outputs_needed.values()
    pair: Unit = "place and token" if kind == CROSS else "place and place"
    yield Product(unit=pair, multiply_adds=width, times=1 + query + key)  # the scores, of queries and keys
    yield Product(unit=pair, multiply_adds=width, times=1 + (query or key) + value)  # the sums of values by scores
    needed = needed or query or key or value
    yield from _linear(lora, f"{kind}.out_proj", (width, width), "place", trained=trained, needed=needed)
    return needed or _adapted(lora, f"{kind}.out_proj")


def _linear(
    lora: Lora | None, name: str, sizes: tuple[int, int], unit: Unit, *, trained: bool, needed: bool = False
) -> Iterator[Product]:
    """A linear layer of inputs x outputs weights, and its adapter, if it has one.

    trained  whether its own weights are
    needed   whether its input needs a gradient
    """
    inputs, outputs = sizes
    yield Product(unit=unit, multiply_adds=inputs * outputs, times=1 + trained + needed)
    if lora is not None and _adapted(lora, name):  # two products, whose weights are trained
        yield Product(unit=unit, multiply_adds=inputs * lora.rank, times=2 + needed)
        yield Product(unit=unit, multiply_adds=lora.rank * outputs, times=3)


def _adapted(lora: Lora | None, name: str) -> bool:
    return lora is not None and lora.adapts(name)
