"""What a process does on a GPU: run a planned layout of a published size and measure it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from benchmarks.work import Work

from trainer.plan.layout import Checkpointing
from trainer.wiring import engine_settings

# Compiled or not, and what is recomputed.
WAYS: dict[str, tuple[bool, Checkpointing]] = {
    "eager": (False, False),
    "recomputing": (False, True),
    "compiled": (True, False),
    "selective": (True, "selective"),
}


def work_of(size: str, strategy: str, micro_batch: int, way: str) -> Work:
    """Two micro-batches of 30 s clips in bf16; `way` is a key of WAYS."""
    compiled, checkpointing = WAYS[way]
    return Work(
        model=size,
        layers=None,
        frames=1500,
        micro_batch=micro_batch,
        accumulation=2,
        text_tokens=32,
        precision="bf16",
        strategy=strategy,  # type: ignore[arg-type]
        gradient_checkpointing=checkpointing,
        compiled=compiled,
    )


def measure(work: Work, steps: int = 6) -> dict:
    """Losses, gradient norms and peak memory of `steps` steps."""
    import torch
    from benchmarks.random_models import random_source

    from trainer.engine import Engine, Ranks, build_accelerator, find_cluster
    from trainer.flags.config import Config
    from trainer.plan.launcher import Launch

    plan = work.plan(gpu_memory_bytes=find_cluster(Launch()).gpu_memory_bytes)
    config = Config(dataset_path="unused")
    accelerator = build_accelerator(plan, engine_settings(config), Path("."))
    with Ranks(timeout_seconds=600) as ranks:
        engine = Engine(accelerator, ranks, random_source(work.model), plan, engine_settings(config))
        batch = work.batch().to(engine.device)
        torch.cuda.reset_peak_memory_stats()
        results = [
            engine.step([batch] * work.accumulation, work.cells, step=step, learning_rate=1e-4) for step in range(steps)
        ]
    return {
        "losses": [result.loss for result in results],
        "norms": [result.grad_norm for result in results],
        "peak_bytes": torch.cuda.max_memory_allocated(),
        "expected_bytes": plan.memory.allocated,
        "parts": plan.memory.describe(),
    }


if __name__ == "__main__":
    size, strategy, micro_batch, way = sys.argv[1:5]
    print("MEASURED " + json.dumps(measure(work_of(size, strategy, int(micro_batch), way))))
