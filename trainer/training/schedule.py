"""The learning rate as a function of the step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Linear warm-up to `peak`, then cosine, linear or no decay towards `peak * min_ratio`."""

    peak: float
    steps: int
    warmup_steps: int
    decay: Literal["cosine", "linear", "constant"] = "cosine"
    min_ratio: float = 0.0


def learning_rate(schedule: Schedule, step: int) -> float:
    """Learning rate of optimizer step `step` (0-based).

    The peak is reached with the last warm-up step; the floor would be reached one step after the last,
    so that no step is spent on a rate of zero. Nothing has to be stored to resume.
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
