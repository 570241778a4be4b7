"""How often the music of a run is heard, from its order: told before the first step, so that nobody trains on each clip
a thousand times, or once, without knowing it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from trainer.data.order import Order
from trainer.spec.recipes import times_in_words

# A clip that is longer than the segment by less than this share of it is as good as heard whole.
WHOLE = 1.01


@dataclass(frozen=True, kw_only=True)
class Heard:
    """What becomes of the music in a whole run, the steps that a resumed one has done already included.

    times        each second of all music is heard, on average
    short_times  each clip that fits into a crop; None where there is none
    long_times   each second of a clip that is longer, on average; None where there is none
    seconds      of the music, each counted once
    epochs       of the run, the last one perhaps not whole
    """

    times: float
    short_times: float | None
    long_times: float | None
    seconds: float
    epochs: float
    clips: int
    crops_per_epoch: int
    steps: int
    global_batch: int
    segment_seconds: float

    def in_words(self, *, early_stop: bool = False, start_step: int = 0) -> str:
        """One line: how often, and the epochs and steps of which that is made.

        early_stop  whether validations may end the run before
        start_step  steps that are done already
        """
        most = "at most " if early_stop else ""
        longer = f"each second of those longer than {self.segment_seconds:g} s"
        if self.long_times is None:
            heard = f"each clip is heard {most}{times_in_words(self.times)}"
        elif self.short_times is None:
            heard = f"each second of the music is heard {most}{times_in_words(self.long_times)} on average"
        else:
            heard = (
                f"each clip is heard {most}{times_in_words(self.short_times)},"
                f" {longer} {times_in_words(self.long_times)} on average"
            )
        epochs = "1 epoch" if self.epochs == 1 else f"{_number(self.epochs)} epochs"
        crops = f"{self.clips:,} clips"
        if self.long_times is not None:
            crops = f"{self.crops_per_epoch:,} crops of {crops}"
        done = f" ({start_step:,} steps are done)" if start_step else ""
        return f"{heard}: {epochs} of {crops}, {self.steps:,} steps of {self.global_batch:,}{done}"


def heard_of(order: Order, frame_rate_hz: float) -> Heard:
    """How often the music of this order is heard.

    Crops are drawn, so that a second inside a long file is heard more or less often than the average. Where the last
    epoch is not whole, some clips are heard once more than others.
    """
    frames = order.frames.astype(np.float64)
    length = frames.mean(axis=1)  # of a clip, over its views, any of which may be drawn
    crop = np.minimum(frames, order.segment_frames).mean(axis=1)
    epochs = order.epoch_of(order.steps)
    is_long = frames.min(axis=1) > WHOLE * order.segment_frames

    def times(clips: np.ndarray) -> float | None:
        """Seconds of these clips that an epoch hears over those that they have, times the epochs."""
        return float(epochs * (order.crops_of_clips * crop)[clips].sum() / length[clips].sum()) if clips.any() else None

    short, everything = epochs if (~is_long).any() else None, np.ones(order.clips, dtype=bool)
    return Heard(
        times=(times(everything) or 0.0) if is_long.any() else epochs,
        short_times=short,
        long_times=times(is_long),
        seconds=float(length.sum()) / frame_rate_hz,
        epochs=epochs,
        clips=order.clips,
        crops_per_epoch=order.crops_per_epoch,
        steps=order.steps,
        global_batch=order.global_batch,
        segment_seconds=order.segment_frames / frame_rate_hz,
    )


def _number(epochs: float) -> str:
    return f"{epochs:,.0f}" if epochs >= 100 or epochs == round(epochs) else f"{epochs:.3g}"
