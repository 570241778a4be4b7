"""What `--suite gpu` runs: every published size on one GPU, as training would use it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from benchmarks import steps
from benchmarks.report import Row
from benchmarks.work import Work
from trainer.plan.layout import Checkpointing
from trainer.plan.memory import expected_bytes

SIZES = ("small", "medium", "large")
MOST_CLIPS = 16  # the largest micro-batch that is tried
# How our layers may be computed: compiled or not, and what the backward pass recomputes.
WAYS: tuple[tuple[bool, Checkpointing], ...] = (
    (False, False),
    (False, True),
    (True, False),
    (True, "selective"),
    (True, True),
)


def gpu(models: Sequence[str], rounds: int) -> Iterator[list[Row]]:
    """Steps of 30 s clips in bf16, for each model.

    First our step in each of WAYS, with the largest micro-batch that fits by the plan, up to MOST_CLIPS. Then all
    contestants, with the largest that fits ours without compiling and recomputing.
    """
    if not torch.cuda.is_available():
        raise SystemExit("--suite gpu needs a CUDA device: torch finds none. Without --suite the cases run on a CPU")
    memory = torch.cuda.get_device_properties(0).total_memory
    for model in models:
        for compiled, recompute in WAYS:
            work = Work(model=model, layers=None, frames=1500, micro_batch=1, precision="bf16")
            work = replace(work, compiled=compiled, gradient_checkpointing=recompute)
            largest = largest_micro_batch(work, memory)
            if largest == 0:
                expected = expected_bytes(work.shape, work.layout(on_gpu=True)).total / 2**30
                row: Row = {"case": "step", "model": model, "checkpointing": recompute, "plan_gib": expected}
                yield [row | {"compiled": compiled, "note": "does not fit by the plan"}]
                continue
            yield steps.measure(["step"], replace(work, micro_batch=largest), rounds)
        plain = Work(model=model, layers=None, frames=1500, micro_batch=1, precision="bf16")
        fits = max(1, largest_micro_batch(plain, memory))
        yield steps.measure(["bare", "step", "seq2seq", "audiocraft"], replace(plain, micro_batch=fits), rounds)


def largest_micro_batch(work: Work, memory_bytes: int) -> int:
    """The largest micro-batch whose expected memory the device has; 0 where not even one clip fits."""
    fitting = [
        size
        for size in range(1, MOST_CLIPS + 1)
        if expected_bytes(work.shape, replace(work, micro_batch=size).layout(on_gpu=True)).total <= memory_bytes
    ]
    return max(fitting, default=0)
