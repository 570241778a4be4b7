"""Time and disk of a run, by arithmetic that is done here again in another way."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from trainer.plan.forecast import (
    NEWEST,
    Clips,
    Disk,
    Steps,
    bytes_in_words,
    cache_bytes,
    disk_of,
    seconds_in_words,
    step_seconds,
    time_in_words,
)
from trainer.plan.layout import Workload
from trainer.plan.time import StepTime
from trainer.run.checkpoint import KEPT
from trainer.spec.shapes import KNOWN
from trainer.spec.trainable import Lora, Selection

TIME = StepTime(compute=0.4, update=0.05, communication=0.3, exposed=0.1, source="made up")


def test_a_full_step_takes_what_the_model_of_time_says() -> None:
    assert step_seconds(TIME, 1.0) == pytest.approx(TIME.seconds) == pytest.approx(0.55)


def test_shorter_clips_save_what_is_computed_and_neither_the_update_nor_what_is_sent() -> None:
    # Half of 0.4 s is computed; of the 0.2 s that were sent beside it, half finds no room any more.
    assert step_seconds(TIME, 0.5) == pytest.approx(0.2 + 0.05 + 0.1 + 0.1)
    assert step_seconds(TIME, 0.0) == pytest.approx(0.05 + 0.3)
    for less, more in itertools.pairwise((0.0, 0.2, 0.5, 0.9, 1.0)):
        assert step_seconds(TIME, less) < step_seconds(TIME, more)


def test_shorter_clips_save_nothing_of_what_the_host_needs() -> None:
    time = replace(TIME, communication=0, exposed=0, least_compute=0.3)
    assert [step_seconds(time, share) for share in (1.0, 0.75, 0.5, 0.1)] == pytest.approx([0.45, 0.35, 0.35, 0.35])
    # A step that was measured as faster than that shows that the host needs less.
    assert step_seconds(replace(time, compute=0.2), 0.5) == pytest.approx(0.25)


def test_the_line_says_step_epoch_and_what_is_left() -> None:
    steps = Steps(left=12_500, per_epoch=125.0, share=1.0)
    line = time_in_words(StepTime(compute=0.6, update=0, communication=0, exposed=0, source=""), steps)
    assert line.startswith("0.6 s a step, 125 steps an epoch (75 s), 12,500 steps to do: 2 h 05 min;")
    assert time_in_words(None, steps) == "125 steps an epoch, 12,500 steps to do"
    assert "at most 12,500 steps" in time_in_words(TIME, Steps(left=12_500, per_epoch=125, early_stop=True))


@pytest.mark.parametrize("seconds,words", [
    (0.0523, "0.052 s"), (0.5, "0.5 s"), (0.997, "1.0 s"), (5.21, "5.2 s"), (9.97, "10 s"), (75, "75 s"),
    (120, "2 min"), (3570, "1 h 00 min"), (7500, "2 h 05 min"), (3 * 86400 + 4 * 3600 - 60, "3 d 4 h"),
    (172_799, "2 d 0 h"),
])  # fmt: skip
def test_seconds_are_told_in_two_digits_or_so(seconds: float, words: str) -> None:
    assert seconds_in_words(seconds) == words


@pytest.mark.parametrize("size,words", [
    (90_000, "0.1 MB"), (9_960_000, "10 MB"), (488e6, "488 MB"), (1.2e9, "1.2 GB"), (22.06e9, "22 GB"),
    (999.7e6, "1.0 GB"), (1.5e12, "1.5 TB"),
])  # fmt: skip
def test_bytes_are_told_in_two_digits_or_so(size: float, words: str) -> None:
    assert bytes_in_words(size) == words


def test_an_hour_of_codes_takes_1_44_megabytes_in_each_view_and_twice_that_in_stereo() -> None:
    hour = {"clips": 1, "seconds": 3600, "frame_rate_hz": 50.0}
    for views in (1, 4):
        assert cache_bytes(KNOWN["small"], Clips(views=views, **hour)) == pytest.approx(1.44e6 * views, rel=1e-3)
        assert cache_bytes(KNOWN["stereo-small"], Clips(views=views, **hour)) == pytest.approx(2.88e6 * views, rel=1e-3)


def test_a_checkpoint_has_weights_and_two_moments_and_the_exports_the_whole_model_three_times() -> None:
    small = KNOWN["small"]
    disk = disk_of(small, Workload(segment_frames=1500), None, keep_best=False, own_text_encoder=False)
    assert disk.checkpoint == 12 * small.parameters
    assert disk.exports["lm_final.pt"] == disk.step_file == 4 * small.parameters
    # EnCodec has 59 million parameters, T5's encoder 110 million.
    assert disk.exports["huggingface"] == 4 * (small.parameters + 169_000_000)
    assert disk.exports["audiocraft"] == 4 * (small.parameters + 59_000_000)


def test_of_an_adapter_the_checkpoint_is_small_and_the_exports_are_whole() -> None:
    small = KNOWN["small"]
    lora = Selection(lora=Lora(rank=16, alpha=32.0, dropout=0.0, targets=("q_proj", "v_proj")))
    whole = disk_of(small, Workload(segment_frames=1500), None, keep_best=False, own_text_encoder=False)
    workload = Workload(segment_frames=1500, selection=lora)
    part = disk_of(small, workload, None, keep_best=False, own_text_encoder=False)
    assert part.checkpoint < whole.checkpoint / 50
    assert part.exports == whole.exports | {"adapter": part.checkpoint // 3}


def test_the_best_step_is_one_checkpoint_more_than_the_newest_and_the_one_that_is_written() -> None:
    assert NEWEST == KEPT
    wanted = [disk_of(KNOWN["debug"], Workload(segment_frames=100), None, keep_best=best, own_text_encoder=True)
              for best in (False, True)]  # fmt: skip
    assert [disk.checkpoints for disk in wanted] == [KEPT + 1, KEPT + 2]


@pytest.mark.parametrize("former", [{}, {"a": 40}, {"a": 40, "b": 70}, {"a": 40, "b": 70, "c": 5}, {"a": 500}])
def test_what_is_still_needed_is_the_most_that_ever_lies_there_beside_what_does_now(former: dict[str, int]) -> None:
    exports = {"a": 50, "b": 60, "c": 10}
    disk = Disk(cache=0, checkpoint=100, checkpoints=3, exports=exports, step_file=50, step_files=2, sounds=7)
    there, most = dict(former), 0
    for name, size in exports.items():  # the new one is whole before the former one goes
        most = max(most, sum(there.values()) + size)
        there[name] = size
    expected = most - sum(former.values()) + 300 - 220 + 2 * 50 + 7
    assert disk.still_needed(former | {"checkpoints": 220}) == expected
