"""A bar that says how far a batch of sounds is."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType

from tqdm import tqdm

from generating.length import Length
from trainer.evaluation.conditions import text_tokens
from trainer.evaluation.decoding import largest_delay
from trainer.evaluation.generation import Request
from trainer.model.language_model import LanguageModel


class Steps:
    """The steps of a batch, each of which makes a frame of all its sounds; on stderr, where that is a terminal."""

    def __init__(self, model: LanguageModel, requests: Sequence[Request], length: Length, title: str):
        self._bar = tqdm(
            total=steps_of(model, requests, length), desc=title, unit=" steps", leave=False, disable=None,
            bar_format="{desc}: {percentage:3.0f}%|{bar}| {n_fmt} of {total_fmt} steps, {remaining} left",
        )  # fmt: skip

    def __enter__(self) -> Steps:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()

    def count(self) -> bool:
        """For the should_stop of generate_all, which is asked before each step: nothing stops it."""
        # Where memory did not suffice, steps are made again.
        if self._bar.total is not None and self._bar.n < self._bar.total:
            self._bar.update()
        return False


def steps_of(model: LanguageModel, requests: Sequence[Request], length: Length) -> int:
    """How often generate_long asks should_stop.

    Each window takes as many steps more as the last codebook comes late. Requests of a melody model whose texts differ
    in length are made one after the other (generate_all).
    """
    prefix = 0 if requests[0].prefix_KT is None else requests[0].prefix_KT.shape[1]
    turns = 1 if model.audio_enc_to_dec_proj is None else len({text_tokens(one) for one in requests})
    return turns * (length.frames - prefix + len(length.starts) * largest_delay(model))
