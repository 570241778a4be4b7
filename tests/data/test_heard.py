"""How often the music of a run is heard: counted by drawing every crop of it."""

from __future__ import annotations

import numpy as np
import pytest

from trainer.data.heard import heard_of
from trainer.data.order import Order, rows_of_step

SEGMENT = 100


def order_of(lengths: list[int], **changes) -> Order:
    values = {"seed": 3, "epochs": 4, "global_batch": 3, "segment_frames": SEGMENT, "codebooks": 4} | changes
    frames = np.array([[one, one] for one in lengths])
    return Order(caption_drop_rate=0.0, frames=frames, **values)  # type: ignore[arg-type]


def drawn(order: Order) -> np.ndarray:
    """Frames of each clip that the rows of all steps hold together."""
    frames = np.zeros(order.clips)
    for step in range(order.steps):
        for row in rows_of_step(order, step):
            frames[row.clip] += row.frames
    return frames


@pytest.mark.parametrize("lengths", [[40, 100, 7], [250, 1000], [60, 250, 100, 1000, 330]])
@pytest.mark.parametrize("by_duration", [False, True])
@pytest.mark.parametrize("batch", [1, 3, 8])
def test_it_is_what_all_steps_draw(lengths, by_duration, batch) -> None:
    """Whole epochs, in steps that span two of them too: frames drawn over frames that there are."""
    order = order_of(lengths, by_duration=by_duration, global_batch=batch)
    heard, found, length = heard_of(order, 50), drawn(order), np.array(lengths)
    is_long = length > SEGMENT
    assert heard.times == pytest.approx(found.sum() / length.sum())
    assert heard.seconds == length.sum() / 50
    for times, which in ((heard.short_times, ~is_long), (heard.long_times, is_long)):
        assert (times is None) == (not which.any())
        assert times is None or times == pytest.approx(found[which].sum() / length[which].sum())


@pytest.mark.parametrize("max_steps", [1, 7, 16, 1000])
def test_max_steps_end_it_before_the_epochs_do(max_steps) -> None:
    """Clips of one length, so that each row has as many frames wherever the run ends."""
    order = order_of([80] * 10, max_steps=max_steps)
    assert heard_of(order, 50).times == pytest.approx(drawn(order).sum() / 800)
    assert heard_of(order, 50).times == min(4, max_steps * 3 / 10)


def test_views_of_unequal_length_are_heard_on_average() -> None:
    order = Order(
        seed=0, epochs=5, global_batch=2, segment_frames=SEGMENT, codebooks=4, caption_drop_rate=0.0,
        frames=np.array([[300, 299, 299, 299]] * 3),
    )  # fmt: skip
    assert heard_of(order, 50).times == pytest.approx(5 * 100 / 299.25)


@pytest.mark.parametrize(
    "lengths,changes,line",
    [
        ([50] * 24, {"epochs": 100, "global_batch": 2},
         "each clip is heard 100 times: 100 epochs of 24 clips, 1,200 steps of 2"),
        ([50] * 24, {"epochs": 1, "global_batch": 8}, "each clip is heard once: 1 epoch of 24 clips, 3 steps of 8"),
        ([50] * 20, {"max_steps": 8, "global_batch": 8},
         "each clip is heard 3.2 times: 3.2 epochs of 20 clips, 8 steps of 8"),
        ([400] * 8, {"epochs": 100, "global_batch": 8},
         "each second of the music is heard 25 times on average: 100 epochs of 8 crops of 8 clips, 100 steps of 8"),
        ([400] * 8, {"epochs": 100, "global_batch": 8, "by_duration": True},
         "each second of the music is heard 100 times on average: 100 epochs of 32 crops of 8 clips, 400 steps of 8"),
        ([400, 50], {"epochs": 10, "global_batch": 2},
         "each clip is heard 10 times, each second of those longer than 2 s 2.5 times on average:"
         " 10 epochs of 2 crops of 2 clips, 10 steps of 2"),
        ([101] * 4, {"epochs": 10, "global_batch": 2},
         "each clip is heard 10 times: 10 epochs of 4 clips, 20 steps of 2"),
    ],
)  # fmt: skip
def test_it_is_one_line(lengths, changes, line) -> None:
    assert heard_of(order_of(lengths, **changes), 50).in_words() == line


def test_an_early_stop_and_a_resumed_run_are_told() -> None:
    words = heard_of(order_of([50] * 6), 50).in_words(early_stop=True, start_step=5)
    assert words == "each clip is heard at most 4 times: 4 epochs of 6 clips, 8 steps of 3 (5 steps are done)"


def test_processes_and_accumulation_change_nothing() -> None:
    """An order knows of neither: a step has `global_batch` crops on whatever there is."""
    assert not {"world_size", "micro_batch", "accumulation"} & set(Order.__dataclass_fields__)
