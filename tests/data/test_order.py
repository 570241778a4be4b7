"""The order of clips: conservation laws, and independence from how a step is split."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from trainer.data.order import Order, draw, permutation, rows_of_step, steps_of, valid_cells

LENGTHS = [5, 40, 41, 200, 17, 40, 90]


def order_of(**changes) -> Order:
    settings = {
        "seed": 3,
        "epochs": 4,
        "global_batch": 3,
        "segment_frames": 40,
        "codebooks": 4,
        "caption_drop_rate": 0.5,
        "frames": np.array([[length, length - 1] for length in LENGTHS]),
    }
    return Order(**{**settings, **changes})


@pytest.mark.parametrize("global_batch", [1, 3, 7, 8, 28, 50])
def test_every_clip_comes_once_an_epoch_whatever_the_global_batch(global_batch):
    order = order_of(global_batch=global_batch)
    rows = [row for step in range(order.steps) for row in rows_of_step(order, step)]
    counts = Counter((row.epoch, row.clip) for row in rows)
    assert counts == {(epoch, clip): 1 for epoch in range(4) for clip in range(len(LENGTHS))}
    assert order.steps == -(-4 * len(LENGTHS) // global_batch)


def test_a_clips_draw_does_not_depend_on_the_global_batch():
    def draws(global_batch):
        order = order_of(global_batch=global_batch)
        return {(row.epoch, row.clip): row for step in range(order.steps) for row in rows_of_step(order, step)}

    assert draws(1) == draws(5) == draws(28)


def test_the_same_clips_form_a_prefix_of_the_stream():
    small, large = order_of(global_batch=2), order_of(global_batch=4)
    pairs = {(row.epoch, row.clip) for step in (0, 1) for row in rows_of_step(small, step)}
    assert pairs == {(row.epoch, row.clip) for row in rows_of_step(large, 0)}


def test_crops_stay_inside_the_clip_and_reach_both_ends():
    order = order_of()
    rows = [draw(order, epoch, 3) for epoch in range(3000)]
    assert all(row.start >= 0 and row.start + row.frames <= order.frames[3, row.view] for row in rows)
    starts = {row.start for row in rows}
    assert min(starts) == 0 and max(starts) == 160 and len(starts) > 150
    assert {row.view for row in rows} == {0, 1}


def test_draws_differ_between_seeds_epochs_and_clips_and_repeat():
    frames = np.full((3, 2), 10_000)
    draws = {
        (seed, epoch, clip): draw(order_of(seed=seed, frames=frames), epoch, clip).start
        for seed in range(3) for epoch in range(3) for clip in range(3)
    }  # fmt: skip
    assert len(set(draws.values())) == len(draws)
    assert draw(order_of(seed=2, frames=frames), 1, 0).start == draws[2, 1, 0]


def test_captions_are_dropped_at_their_rate_and_per_clip():
    order = order_of(caption_drop_rate=0.1)
    dropped = np.array([[draw(order, epoch, clip).drop_caption for clip in range(7)] for epoch in range(3000)])
    deviation = np.sqrt(0.1 * 0.9 / dropped.size)
    assert abs(dropped.mean() - 0.1) < 4 * deviation
    # independent per clip: a whole epoch without captions would show as rows of equal values
    assert abs((dropped.sum(axis=1) == 1).mean() - 7 * 0.1 * 0.9**6) < 0.04
    assert not any(draw(replace(order, caption_drop_rate=0.0), epoch, 0).drop_caption for epoch in range(500))


def test_seeds_and_epochs_give_different_permutations_and_equal_ones_repeat():
    orders = {tuple(permutation(seed, epoch, 20)) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25
    assert tuple(permutation(1, 2, 20)) in orders


def test_valid_cells_are_those_that_labels_have():
    # slow obvious version: count cells (codebook, step) with a code, clip alone in its segment
    rows = rows_of_step(order_of(global_batch=7), 0)
    expected = [0, 0, 0, 0]
    for row in rows:
        for k in range(4):
            for step in range(40):
                expected[k] += 0 <= step - k < row.frames
    assert valid_cells(rows, 4, 40).tolist() == expected


def test_by_duration_an_epoch_has_as_many_crops_of_a_clip_as_segments_fit_into_every_view():
    order = order_of(by_duration=True)
    expected = {(epoch, clip): max(1, (length - 1) // 40) for epoch in range(4) for clip, length in enumerate(LENGTHS)}
    rows = [row for step in range(order.steps) for row in rows_of_step(order, step)]
    assert Counter((row.epoch, row.clip) for row in rows) == expected
    assert {(row.epoch, row.clip, row.crop) for row in rows} == {
        (epoch, clip, crop) for (epoch, clip), crops in expected.items() for crop in range(crops)
    }
    per_epoch = sum(expected.values()) // 4
    assert order.crops_per_epoch == per_epoch > order.clips == len(LENGTHS)
    assert order.steps == -(-4 * per_epoch // 3)
    assert order.epoch_of(order.steps) == 4 and order.epoch_of(1) == 3 / per_epoch


def test_by_duration_clips_of_less_than_two_segments_have_todays_order():
    short = {"frames": np.array([[length, length - 1] for length in (5, 40, 41, 80, 17)])}
    one, other = order_of(**short), order_of(**short, by_duration=True)
    assert one.steps == other.steps
    assert all(rows_of_step(one, step) == rows_of_step(other, step) for step in range(one.steps))


def test_each_crop_of_a_clip_draws_view_text_and_dropping_for_itself():
    order = order_of(frames=np.array([[40_000, 40_000]]), by_duration=True, texts=np.array([8]))
    rows = [draw(order, 0, 0, crop) for crop in range(order.crops_of(0))]
    assert len(rows) == 1_000
    # Bounds of six standard deviations of a binomial distribution: sqrt(1000 x 0.5 x 0.5) = 15.8.
    assert abs(sum(row.view for row in rows) - 500) < 95
    assert abs(sum(row.drop_caption for row in rows) - 500) < 95
    assert set(row.text for row in rows) == set(range(8))


def test_by_duration_the_ends_of_a_long_clip_are_trained_on_too():
    order = order_of(frames=np.array([[130]]), by_duration=True, epochs=1)
    counts = np.zeros(130)
    for epoch in range(600):
        for crop in range(3):
            row = draw(order, epoch, 0, crop)
            counts[row.start : row.start + row.frames] += 1
    assert counts.sum() == 600 * 3 * 40
    # Three uniform crops would have the first frame in 3 / 91 of all epochs, and so in 20 of them.
    assert counts.min() > counts.mean() / 3 and counts.max() < 2 * counts.mean()


def test_a_short_clip_gets_room_for_its_diagonal_tail_and_a_full_one_does_not():
    assert [steps_of(frames, 3, 40) for frames in (5, 37, 38, 40)] == [8, 40, 40, 40]
