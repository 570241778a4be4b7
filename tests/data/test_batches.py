"""Micro-batches hold what their rows ask for."""

from __future__ import annotations

import threading

import numpy as np
import torch

from tests.synthetic import random_examples
from trainer.data.batches import prefetched
from trainer.data.order import Row

SEGMENT = 20


def row(clip: int, view: int, start: int, frames: int, **changes) -> Row:
    return Row(clip=clip, epoch=0, view=view, start=start, frames=frames, **({"drop_caption": False} | changes))


def test_a_row_reads_the_frames_of_its_own_clip_view_and_crop():
    examples = random_examples([50, 60, 9], segment_frames=SEGMENT)
    rows = [row(1, 1, 33, 20), row(0, 0, 7, 20), row(1, 0, 2, 20), row(2, 1, 0, 9)]
    batch = examples.batch(rows)
    for index, one in enumerate(rows):
        codes = examples.codes.clips[one.clip][one.view][:, one.start : one.start + one.frames].astype(np.int64)
        for k in range(4):
            labels = batch.labels_BKT[index, k]
            kept = min(one.frames, SEGMENT - k)  # the diagonal's tail
            assert labels[k : k + kept].tolist() == codes[k, :kept].tolist()
            assert (labels >= 0).sum() == kept
    assert batch.frames == 69 and batch.padded_frames == 4 * SEGMENT


def test_a_row_has_the_states_of_its_own_caption_unless_it_is_dropped():
    examples = random_examples([20] * 3, ["one two three", "four five", None], segment_frames=SEGMENT)
    rows = [row(1, 0, 0, 20), row(0, 0, 0, 20), row(0, 0, 0, 20, drop_caption=True), row(2, 0, 0, 20)]
    batch = examples.batch(rows)
    assert batch.text_mask_BS.sum(1).tolist() == [2, 3, 0, 0]
    assert torch.equal(batch.text_BSD[0, :2], torch.from_numpy(examples.text.states("four five")))
    assert torch.equal(batch.text_BSD[1], torch.from_numpy(examples.text.states("one two three")))
    assert not batch.text_BSD[2:].any() and not batch.text_BSD[0, 2:].any()
    assert batch.attention_BS.sum(1).tolist() == [2, 3, 3, 3]


def test_a_filler_is_computed_and_counts_nothing():
    examples = random_examples([20, 20], segment_frames=SEGMENT)
    batch = examples.batch([row(0, 0, 0, 20), row(1, 0, 0, 20, weight=0)])
    assert (batch.labels_BKT[1] == -100).all() and batch.frames == 20 and batch.padded_frames == 40


def test_batches_come_in_order_and_no_more_are_made_than_asked_for():
    made, gate = [], threading.Event()

    def make(share):
        gate.wait(10)
        made.append(share)
        return share

    batches = prefetched([[index] for index in range(9)], make, ahead=3)
    gate.set()
    assert next(batches) == [0]
    assert len(made) <= 4
    assert list(batches) == [[index] for index in range(1, 9)]
