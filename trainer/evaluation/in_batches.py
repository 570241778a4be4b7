"""Requests in batches of as many as the device's memory has room for."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from trainer.errors import MemoryShortError
from trainer.evaluation.decoding import largest_delay
from trainer.evaluation.generation import Request
from trainer.model.language_model import LanguageModel
from trainer.spec.shapes import MELODY_PLACES


def in_batches(
    requests: Sequence[Request],
    make: Callable[[Sequence[Request]], list[Tensor] | None],
    *,
    most: int,
    on_smaller: Callable[[int], None] = lambda most: None,
) -> list[Tensor] | None:
    """What `make` makes of each request, in their order, of at most `most` at once; None where it returned None.

    A batch for which the device's memory does not suffice is made again from its generators' states before it, in
    halves, and so are those behind it: the results are the same.

    make        generate_all or another function that makes codes, with all but its requests given
    on_smaller  called with the smaller number, before it goes on

    Raises MemoryShortError where memory does not suffice for one.
    """
    made: list[Tensor] = []
    while len(made) < len(requests):
        batch = requests[len(made) : len(made) + most]
        states = [request.generator.get_state() for request in batch]
        try:
            found = make(batch)
        except torch.OutOfMemoryError as error:
            shortage = str(error).partition("\n")[0]
        else:
            if found is None:
                return None
            made += found
            continue
        # Out of the except block: the error holds the frames, and with them the tensors, of the failed batch.
        if len(batch) == 1:
            raise MemoryShortError(
                f"the device's memory does not suffice for one sound ({shortage}): generate fewer seconds, use a"
                " smaller model, or --device cpu"
            )
        most = len(batch) // 2
        for request, state in zip(batch, states, strict=True):
            request.generator.set_state(state)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        on_smaller(most)
    return made


def bytes_of_sound(model: LanguageModel, frames: int, guidance: float) -> int:
    """The memory of the keys and values that a sound of so many frames needs when it ends, a text's left out.

    Of small, guided, in float32: 0.6 GB for 30 s; of large 2.4 GB.
    """
    config = model.decoder.config
    places = frames + largest_delay(model) + (0 if model.audio_enc_to_dec_proj is None else MELODY_PLACES)
    rows = 2 if guidance > 1 else 1
    value_bytes = model.decoder.lm_heads[0].weight.element_size()
    return rows * 2 * config.num_hidden_layers * config.hidden_size * places * value_bytes
