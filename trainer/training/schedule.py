"""The learning rate as a function of the step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Linear warm-up to `peak` over `warmup_steps`, then cosine, linear or no decay towards `peak * min_ratio`.

    peak       the highest learning rate
    steps      of the whole run
    min_ratio  in [0, 1]
    """

    peak: float
    steps: int
    warmup_steps: int
    decay: Literal["cosine", "linear", "constant"] = "cosine"
    min_ratio: float = 0.0


def learning_rate(schedule: Schedule, step: int) -> float:
    """Learning rate of optimizer step `step`, counted from 0.

    The last warm-up step has the peak. The decay would reach its end one step after the run's last, so that no step is
    spent on a rate of zero. A function of the step alone: there is nothing to save for a resumed run.
    """
    done = step + 1
    if done <= schedule.warmup_steps:
        return schedule.peak * done / schedule.warmup_steps
    left = max(1, schedule.steps + 1 - schedule.warmup_steps)
    progress = min(1.0, (done - schedule.warmup_steps) / left)
    floor = schedule.peak * schedule.min_ratio
    if schedule.decay == "constant":
        return schedule.peak
    if schedule.decay == "linear":
        return floor + (schedule.peak - floor) * (1 - progress)
    return floor + (schedule.peak - floor) * 0.5 * (1 + math.cos(math.pi * progress))
