"""Micro-batches of tensors from the cached codes and text states, made ahead of their use."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from trainer.data.order import Row
from trainer.model.delay_pattern import inputs_and_labels, steps_of
from trainer.spec.flops import clip_flops
from trainer.spec.shapes import Shape
from trainer.spec.trainable import EVERYTHING, Selection


class Codes(Protocol):
    """Cached codes by clip index; `frames` is (clips, views) int64."""

    @property
    def frames(self) -> np.ndarray: ...

    def crop(self, clip: int, view: int, start: int, frames: int) -> np.ndarray: ...


class Text(Protocol):
    """What the model reads of a caption: (S, D) float32, cached T5 states; or (S,) int64, ids for a T5 in the loop."""

    def states(self, caption: str) -> np.ndarray: ...


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One micro-batch on one device; see LanguageModel.forward for the four inputs. For a T5 in the loop, text_BSD
    is token ids (B, S)."""

    inputs_BKT: Tensor
    labels_BKT: Tensor
    text_BSD: Tensor
    text_mask_BS: Tensor
    attention_BS: Tensor | None
    frames: int  # of the clips themselves, without padding and fillers
    padded_frames: int  # steps x rows that are computed
    flops: int = 0  # model FLOPs of forward and backward of these frames and their captions

    def map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """The batch with `change` applied to each tensor."""
        return replace(
            self,
            inputs_BKT=change(self.inputs_BKT),
            labels_BKT=change(self.labels_BKT),
            text_BSD=change(self.text_BSD),
            text_mask_BS=change(self.text_mask_BS),
            attention_BS=None if self.attention_BS is None else change(self.attention_BS),
        )

    def to(self, device: torch.device) -> Batch:
        return self.map(lambda tensor: tensor.to(device, non_blocking=True))


@dataclass(frozen=True, kw_only=True)
class Examples:
    """What rows refer to: the codes and captions of one set of clips. `captions[clip]` None is a null
    condition, `names[clip]` is its file, for messages, `shape` is of the model that reads them. `texts[clip]` are
    those that Row.text chooses from; None where each clip is always trained with its caption. `token_ids` says that
    `text` gives ids, `trained` what is trained, on which the FLOPs of a clip depend."""

    codes: Codes
    text: Text
    captions: Sequence[str | None]
    names: Sequence[str]
    shape: Shape
    special_token: int
    segment_frames: int
    texts: Sequence[Sequence[str | None]] | None = None
    token_ids: bool = False
    trained: Selection = EVERYTHING

    def text_of(self, row: Row) -> str | None:
        """What the row is trained with; None is a null condition."""
        if row.drop_caption:
            return None
        return self.captions[row.clip] if self.texts is None else self.texts[row.clip][row.text]

    def all_texts(self) -> Iterator[str]:
        """Every caption and every text that is drawn in its place."""
        return (text for texts in (self.captions, *(self.texts or ())) for text in texts if text is not None)

    def blank_text(self, rows: int, tokens: int) -> Tensor:
        """Text of a micro-batch before any caption is in it: (rows, tokens, D) float32, or (rows, tokens) int64."""
        if self.token_ids:
            return torch.zeros(rows, tokens, dtype=torch.int64)
        return torch.zeros(rows, tokens, self.shape.text_width)

    def batch(self, rows: Sequence[Row]) -> Batch:
        """The micro-batch of these rows, in CPU memory, pinned where there is a CUDA device."""
        codes = [self.codes.crop(row.clip, row.view, row.start, row.frames) for row in rows]
        texts = [self.text_of(row) for row in rows]
        states = [None if text is None else self.text.states(text) for text in texts]
        steps = max(steps_of(row.frames, self.shape.codebooks, self.segment_frames) for row in rows)
        inputs, labels = inputs_and_labels(self._padded_codes(codes, steps), self.special_token)
        for index, row in enumerate(rows):
            if row.weight == 0:
                labels[index] = -100
        text, mask, attention = self._padded_text(states)
        batch = Batch(
            inputs_BKT=inputs,
            labels_BKT=labels,
            text_BSD=text,
            text_mask_BS=mask,
            attention_BS=attention,
            frames=sum(row.frames for row in rows if row.weight),
            padded_frames=steps * len(rows),
            flops=sum(self._flops(row, own) for row, own in zip(rows, states, strict=True)),
        )
        return batch.map(Tensor.pin_memory) if torch.cuda.is_available() else batch

    def _flops(self, row: Row, states: np.ndarray | None) -> int:
        tokens = 0 if states is None else len(states)
        return row.weight * clip_flops(self.shape, row.frames, tokens, self.trained)

    def _padded_codes(self, codes: Sequence[np.ndarray], steps: int) -> Tensor:
        padded = torch.full((len(codes), self.shape.codebooks, steps), self.special_token, dtype=torch.int64)
        for index, clip_KT in enumerate(codes):
            padded[index, :, : clip_KT.shape[1]] = torch.from_numpy(clip_KT.astype(np.int64))
        return padded

    def _padded_text(self, states: Sequence[np.ndarray | None]) -> tuple[Tensor, Tensor, Tensor | None]:
        """Text (B, S, D) or (B, S), mask (B, S) float, and what may be attended to (B, S) bool or None.

        A null row attends to its zero keys, wherever its batch-mates have text: any of them gives zero.
        """
        lengths = [0 if row is None else len(row) for row in states]
        longest = max(1, *lengths)
        text = self.blank_text(len(states), longest)
        mask = torch.zeros(len(states), longest)
        for index, row in enumerate(states):
            if row is not None:
                text[index, : len(row)] = torch.from_numpy(row)
                mask[index, : len(row)] = 1
        padded = any(0 < length < longest for length in lengths)
        attention = mask.bool() | ~mask.bool().any(dim=1, keepdim=True) if padded else None
        return text, mask, attention


def prefetched(
    shares: Iterable[Sequence[Row]], make: Callable[[Sequence[Row]], Batch], ahead: int = 2
) -> Iterator[Batch]:
    """`make` of each share, in order, computed by one thread up to `ahead` batches before it is asked for."""
    with ThreadPoolExecutor(1, thread_name_prefix="batches") as pool:
        pending = []
        for share in shares:
            pending.append(pool.submit(make, share))
            if len(pending) > ahead:
                yield pending.pop(0).result()
        while pending:
            yield pending.pop(0).result()
