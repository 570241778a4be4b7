"""The delay pattern against a slow, obvious version."""

from __future__ import annotations

import torch

from trainer.model.delay_pattern import IGNORED, delay, inputs_and_labels


def test_each_step_predicts_one_diagonal():
    codes = torch.randint(0, 2048, (2, 4, 9))
    inputs, labels = inputs_and_labels(codes, special=2048)
    for b in range(2):
        for k in range(4):
            for step in range(9):
                frame = step - k
                assert labels[b, k, step] == (codes[b, k, frame] if frame >= 0 else IGNORED)
                assert inputs[b, k, step] == (codes[b, k, frame - 1] if frame >= 1 else 2048)


def test_padded_frames_are_read_as_special_and_never_predicted():
    codes = torch.randint(0, 2048, (1, 4, 12))
    codes[..., 5:] = 2048
    inputs, labels = inputs_and_labels(codes, special=2048)
    assert [(labels[0, k] >= 0).sum().item() for k in range(4)] == [5, 5, 5, 5]
    assert (labels != 2048).all()
    assert (inputs[0, 0, 6:] == 2048).all()


def test_clips_shorter_than_the_delays_keep_their_first_codebooks():
    delayed = delay(torch.zeros(1, 4, 2, dtype=torch.int64), fill=7)
    assert delayed[0].tolist() == [[0, 0], [7, 0], [7, 7], [7, 7]]
