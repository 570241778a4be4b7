"""What `--suite gpu` runs: every published size on one GPU, as training would use it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from benchmarks import steps
from benchmarks.report import Row
from benchmarks.work import Work
from trainer.memory import expected_bytes

SIZES = ("small", "medium", "large")
MOST = 64  # micro-batch


def gpu(models: Sequence[str], rounds: int) -> Iterator[list[Row]]:
    """Steps of 30 s clips in bf16: ours eager and compiled, with and without recomputing; the others; the largest
    micro-batch that fits."""
    if not torch.cuda.is_available():
        raise SystemExit("--suite gpu needs a CUDA device: torch finds none. Without --suite the cases run on a CPU")
    memory = torch.cuda.get_device_properties(0).total_memory
    for model in models:
        for checkpointing in (False, True):
            work = Work(model=model, layers=None, frames=1500, micro_batch=1, accumulation=2, precision="bf16")
            work = replace(work, gradient_checkpointing=checkpointing)
            largest = largest_micro_batch(work, memory)
            if largest == 0:
                expected = expected_bytes(work.shape, work.layout(on_gpu=True)).total / 2**30
                row: Row = {"case": "step", "model": model, "checkpointing": checkpointing, "plan_gib": expected}
                yield [row | {"note": "does not fit by the plan"}]
                continue
            work = replace(work, micro_batch=min(largest, 8))
            yield steps.measure(["step", "bare", "seq2seq", "audiocraft"], work, rounds)
            yield steps.measure(["step"], replace(work, compiled=True), rounds)
            found = steps.measure(["step"], replace(work, micro_batch=largest), rounds)
            yield [row | {"note": "largest by the plan"} for row in found]


def largest_micro_batch(work: Work, memory_bytes: int) -> int:
    """The largest whose expected memory the device has; 0 where not even one clip fits."""
    fitting = [
        size
        for size in range(1, MOST + 1)
        if expected_bytes(work.shape, replace(work, micro_batch=size).layout(on_gpu=True)).total <= memory_bytes
    ]
    return max(fitting, default=0)
