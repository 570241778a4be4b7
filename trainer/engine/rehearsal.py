"""How long the parts of a rehearsed step take, from which the seconds of a full step follow."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

import torch

from trainer.data.batches import Batch
from trainer.engine.ranks import Ranks
from trainer.plan.time import StepTime

# A first pass of so many seconds is not run again where nothing is compiled: what warms up is little of it.
SLOW_SECONDS = 20.0
MOST_MICRO_BATCHES = 2  # from the second on, gradients and activations are held at once


def measured(
    once: Callable[[], StepTime], ranks: Ranks, device: torch.device, scaler: torch.amp.GradScaler | None, *,
    compiled: bool,
) -> StepTime:  # fmt: skip
    """What a full step takes, by a step that `once` makes and undoes: by the second one, since the first compiles and
    warms up; by the first where that was slow without compiling. A collective.

    scaler  of fp16's losses; it counts the steps since an overflow, and is left as the first step leaves it
    """
    since, found = time.perf_counter(), once()
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2**30
        ranks.say(f"one step of the largest micro-batch took {peak:.1f} GiB of device memory")
    # By the first rank's clock, so that all do the same.
    slow = ranks.gather(time.perf_counter() - since > SLOW_SECONDS)[0]
    if slow and not compiled:
        return found
    state = {} if scaler is None else scaler.state_dict()
    found = once()
    if scaler is not None:
        scaler.load_state_dict(state)
    return found


class TimedBatches(Sequence[Batch]):
    """The micro-batches of a rehearsed step, which note when each is asked for and when the last one is done.

    The engine asks for the next one once a backward pass has been issued. Here the device is waited for, which training
    never does. A step that overflows under fp16 is computed again; what is noted is of the last attempt.
    """

    def __init__(self, batch: Batch, accumulation: int, device: torch.device):
        self._batches = [batch] * min(MOST_MICRO_BATCHES, accumulation)
        self._accumulation, self._device = accumulation, device
        self._moments: list[float] = []

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, index: int) -> Batch:  # type: ignore[override]
        return self._batches[index]

    def __iter__(self) -> Iterator[Batch]:
        self._moments = [self._now()]
        for batch in self._batches:
            yield batch
            self._moments.append(self._now())

    def time(self) -> StepTime:
        """What a full step takes, by the step that has just been made of these: all micro-batches but the last take
        what the first did, and the last what the last did, in which gradients may be reduced. The rest is norm,
        clipping, AdamW and what else is done once a step.

        What is sent is in the parts in which it is waited for.
        """
        end = self._now()
        first, last = self._moments[1] - self._moments[0], self._moments[-1] - self._moments[-2]
        return StepTime(
            compute=(self._accumulation - 1) * first + last,
            update=end - self._moments[-1],
            communication=0.0,
            exposed=0.0,
            source="measured before the first step",
        )

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()
