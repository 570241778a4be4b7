"""Micro-batches of tensors, made from the cached codes and texts by a thread ahead of their use."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from trainer.data.melody_places import melody_places
from trainer.data.order import Row, steps_of
from trainer.model.delay_pattern import inputs_and_labels
from trainer.spec.flops import clip_flops
from trainer.spec.shapes import MELODY_PLACES, Shape
from trainer.spec.trainable import EVERYTHING, Selection

if TYPE_CHECKING:
    from trainer.data.cache import CachedCodes

Item = TypeVar("Item")
Made = TypeVar("Made")


class Melodies(Protocol):
    """The melodies of some clips, which are numbered from 0."""

    def crop(self, clip: int, view: int, start: int, frames: int) -> np.ndarray:
        """The notes of frames [start, start + frames) of one cached view of a clip: (n,) uint8 in [0, 12).

        One for every 4096 samples, from the first on: n is 1 + frames x 640 // 4096 at most, and fewer where the melody
        ends before the crop does; it may be 0.
        """


class Text(Protocol):
    """What the model reads of captions: the states that T5 made of them, or token ids where T5 itself is trained."""

    def states(self, caption: str) -> np.ndarray:
        """T5's last hidden states (S, D) float32, or token ids (S,) int64; the end token </s> is included."""

    def tokens(self, caption: str) -> int:
        """S of a caption, which costs less than its states."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One micro-batch, all of it on one device. T here are decoder steps, which the delay pattern makes of frames.

    inputs_BKT     int64, codes in [0, V); the special token V where a codebook has none
    labels_BKT     int64, codes in [0, V); -100 where nothing is learned: padding, fillers, the special token
    text_BSD       float32, T5's states, zero where there is no text; token ids (B, S) int64 where T5 is trained
    text_mask_BS   float32, 1 where there is text and 0 where there is none
    attention_BS   bool, the text that a row may attend to; None where all rows have equally long texts, or none. In a
                   melody model: the places of the text that are in the row, also where its caption is dropped
    melody_BC      int64 in [0, 12), notes in front of the text; None in a text model
    frames         of the clips themselves, without padding and fillers
    padded_frames  rows x steps that are computed
    flops          model FLOPs of forward and backward of these frames and their captions, without padding
    """

    inputs_BKT: Tensor
    labels_BKT: Tensor
    text_BSD: Tensor
    text_mask_BS: Tensor
    attention_BS: Tensor | None
    frames: int
    padded_frames: int
    flops: int = 0
    melody_BC: Tensor | None = None

    def map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """The batch with `change` applied to each tensor."""
        return replace(
            self,
            inputs_BKT=change(self.inputs_BKT),
            labels_BKT=change(self.labels_BKT),
            text_BSD=change(self.text_BSD),
            text_mask_BS=change(self.text_mask_BS),
            attention_BS=None if self.attention_BS is None else change(self.attention_BS),
            melody_BC=None if self.melody_BC is None else change(self.melody_BC),
        )

    def to(self, device: torch.device) -> Batch:
        """The batch on `device`; from pinned memory, the copy runs beside what the host does next."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=True))


@dataclass(frozen=True, kw_only=True)
class Examples:
    """One set of clips, ready to be cut into micro-batches. Clips are numbered from 0 as `Row.clip` counts them.

    codes           EnCodec's codes of every clip
    text            what the model reads of every caption
    melodies        of every clip, for a melody model; None for a text model
    captions        of each clip; None is a null condition: the clip is trained without text
    names           file of each clip, for messages
    shape           sizes of the model that reads the batches
    special_token   V, the code that stands where a codebook has no frame
    segment_frames  the most frames of a crop
    texts           of each clip, those among which `Row.text` chooses; None where a clip always has its caption
    token_ids       whether `text` gives token ids, since T5 itself is trained
    trained         which parameters are trained, on which the FLOPs of a clip depend
    """

    codes: CachedCodes
    text: Text
    captions: Sequence[str | None]
    names: Sequence[str]
    shape: Shape
    special_token: int
    segment_frames: int
    texts: Sequence[Sequence[str | None]] | None = None
    token_ids: bool = False
    trained: Selection = EVERYTHING
    melodies: Melodies | None = None

    def text_of(self, row: Row) -> str | None:
        """What the row is trained with; None is a null condition."""
        if row.drop_caption:
            return None
        return self.captions[row.clip] if self.texts is None else self.texts[row.clip][row.text]

    def all_texts(self) -> Iterator[str]:
        """Every caption, and every text that is drawn in place of one."""
        return (text for texts in (self.captions, *(self.texts or ())) for text in texts if text is not None)

    def blank_text(self, rows: int, tokens: int) -> Tensor:
        """Zeros in the shape of a micro-batch's text: (rows, tokens, D) float32, or (rows, tokens) int64 ids."""
        if self.token_ids:
            return torch.zeros(rows, tokens, dtype=torch.int64)
        return torch.zeros(rows, tokens, self.shape.text_width)

    def batch(self, rows: Sequence[Row]) -> Batch:
        """The micro-batch of these rows, in CPU memory, pinned where there is a CUDA device."""
        codes = [self.codes.crop(row.clip, row.view, row.start, row.frames) for row in rows]
        texts = [self.text_of(row) for row in rows]
        states = [None if text is None else self.text.states(text) for text in texts]
        steps = max(steps_of(row.frames, self.shape.largest_delay, self.segment_frames) for row in rows)
        padded = self._padded_codes(codes, steps)
        inputs, labels = inputs_and_labels(padded, self.special_token, self.shape.audio_channels)
        for index, row in enumerate(rows):
            if row.weight == 0:
                labels[index] = -100
        lengths = [self._text_places(row, of_row) for row, of_row in zip(rows, states, strict=True)]
        text, mask, attention = self._padded_text(states, lengths)
        batch = Batch(
            inputs_BKT=inputs,
            labels_BKT=labels,
            text_BSD=text,
            text_mask_BS=mask,
            attention_BS=attention,
            frames=sum(row.frames for row in rows if row.weight),
            padded_frames=steps * len(rows),
            flops=sum(self._flops(row, length) for row, length in zip(rows, lengths, strict=True)),
            melody_BC=self._melodies_of(rows),
        )
        return batch.map(Tensor.pin_memory) if torch.cuda.is_available() else batch

    def blank_melody(self, rows: int) -> Tensor | None:
        """The null melody in the shape of a micro-batch: (rows, C) int64, zero; None for a text model."""
        return torch.zeros(rows, MELODY_PLACES, dtype=torch.int64) if self.shape.melody else None

    def _melodies_of(self, rows: Sequence[Row]) -> Tensor | None:
        """`Batch.melody_BC`. A melody shorter than its places is repeated, and an absent one is note 0 at all of them,
        as in generation. Source: audiocraft 1.3.0, ChromaStemConditioner with match_len_on_eval."""
        notes_BC = self.blank_melody(len(rows))
        if notes_BC is None:
            return None
        assert self.melodies is not None, "a melody model has the melodies of its clips"
        for index, row in enumerate(rows):
            if row.drop_melody:
                continue
            notes_C = melody_places(self.melodies.crop(row.clip, row.view, row.start, row.frames))
            if notes_C is not None:
                notes_BC[index] = notes_C
        return notes_BC

    def _text_places(self, row: Row, states: np.ndarray | None) -> int:
        """How many places of a row its text takes. Where there is no cross-attention, a dropped caption keeps them, so
        that the codes stay at their places, and an absent one has one: as in generation."""
        if states is not None:
            return len(states)
        if not self.shape.melody:
            return 0
        text = self.captions[row.clip] if self.texts is None else self.texts[row.clip][row.text]
        return 1 if text is None else self.text.tokens(text)

    def _flops(self, row: Row, tokens: int) -> int:
        return row.weight * clip_flops(self.shape, row.frames, tokens, self.trained)

    def _padded_codes(self, codes: Sequence[np.ndarray], steps: int) -> Tensor:
        padded = torch.full((len(codes), self.shape.codebooks, steps), self.special_token, dtype=torch.int64)
        for index, clip_KT in enumerate(codes):
            padded[index, :, : clip_KT.shape[1]] = torch.from_numpy(clip_KT.astype(np.int64))
        return padded

    def _padded_text(
        self, states: Sequence[np.ndarray | None], lengths: Sequence[int]
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Text, text mask and attention mask of a Batch, where texts have these lengths in the rows.

        Softmax over no key at all is NaN. A row without text therefore attends to its keys of zero wherever the
        longest text of the batch has tokens: whatever their weights, values of zero add nothing.
        """
        longest = max(1, *lengths)
        text = self.blank_text(len(states), longest)
        mask = torch.zeros(len(states), longest)
        for index, of_row in enumerate(states):
            if of_row is not None:
                text[index, : len(of_row)] = torch.from_numpy(of_row)
                mask[index, : len(of_row)] = 1
        if self.shape.melody:
            within = torch.arange(longest)[None] < torch.tensor(lengths)[:, None]
            return text, mask, None if within.all() else within
        padded = any(0 < length < longest for length in lengths)
        attention = mask.bool() | ~mask.bool().any(dim=1, keepdim=True) if padded else None
        return text, mask, attention


def prefetched(items: Iterable[Item], make: Callable[[Item], Made], ahead: int = 2) -> Iterator[Made]:
    """What `make` makes of each item, in order, by a thread, up to `ahead` before they are used."""
    with ThreadPoolExecutor(1, thread_name_prefix="batches") as pool:
        pending = []
        for item in items:
            pending.append(pool.submit(make, item))
            if len(pending) > ahead:
                yield pending.pop(0).result()
        while pending:
            yield pending.pop(0).result()
