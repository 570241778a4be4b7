"""What a process does on a GPU: run a planned layout of a published size and measure it."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from trainer.memory import Layout

TEXT_TOKENS, FRAMES, ACCUMULATION = 32, 1500, 2


def layout_of(strategy: str, micro_batch: int, checkpointing: bool) -> Layout:
    """The layout that is measured, for the plan's expectation."""
    return Layout(
        strategy=strategy,  # type: ignore[arg-type]
        shards=1,
        precision="bf16",
        micro_batch=micro_batch,
        accumulation=ACCUMULATION,
        frames=FRAMES,
        gradient_checkpointing=checkpointing,
        offload_optimizer=False,
        on_gpu=True,
    )


def measure(size: str, strategy: str, micro_batch: int, checkpointing: bool, steps: int = 6) -> dict:
    """Peak memory and speed of `steps` steps of 2 micro-batches of 30 s clips in bf16."""
    import numpy as np
    import torch

    from tests.gpu.published import random_source
    from trainer.batches import Batch
    from trainer.config import Config
    from trainer.engine import Engine, Ranks, build_accelerator, find_cluster
    from trainer.launcher import Launch
    from trainer.memory import expected_bytes
    from trainer.patterns import inputs_and_labels
    from trainer.plan import Plan
    from trainer.shapes import KNOWN

    frames, accumulation = FRAMES, ACCUMULATION
    layout = layout_of(strategy, micro_batch, checkpointing)
    memory = expected_bytes(KNOWN[size], layout)
    cluster = find_cluster(Launch())
    plan = Plan(
        strategy=strategy,
        nodes=1,
        world_size=1,
        offload_optimizer=False,
        global_batch=micro_batch * accumulation,
        micro_batch=micro_batch,
        accumulation=accumulation,
        mixed_precision="bf16",
        gradient_checkpointing=checkpointing,
        memory=memory,
        gpu_memory_bytes=cluster.gpu_memory_bytes,
        reasons=(),
    )
    config = Config(dataset_path="unused")
    accelerator = build_accelerator(plan, config, Path("."))
    source = random_source(size)
    with Ranks(timeout_seconds=600) as ranks:
        engine = Engine(accelerator, ranks, source, plan, config)
        codes = torch.randint(0, 2048, (micro_batch, 4, frames))
        inputs, labels = inputs_and_labels(codes, 2048)
        batch = Batch(
            inputs_BKT=inputs,
            labels_BKT=labels,
            text_BSD=torch.randn(micro_batch, TEXT_TOKENS, KNOWN[size].text_width) * 0.1,
            text_mask_BS=torch.ones(micro_batch, TEXT_TOKENS),
            attention_BS=None,
            frames=micro_batch * frames,
            padded_frames=micro_batch * frames,
        ).to(engine.device)
        cells = np.array([accumulation * micro_batch * (frames - k) for k in range(4)])
        state_bytes = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        losses, seconds = [], []
        for step in range(steps):
            torch.cuda.synchronize()
            since = time.perf_counter()
            result = engine.step([batch] * accumulation, cells, step=step, learning_rate=1e-4)
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - since)
            losses.append(result.loss)
    rate = accumulation * micro_batch * frames / sorted(seconds[1:])[len(seconds[1:]) // 2]
    return {
        "size": size,
        "strategy": strategy,
        "micro_batch": micro_batch,
        "checkpointing": checkpointing,
        "losses": losses,
        "frames_per_second": rate,
        "state_bytes": state_bytes,
        "peak_bytes": torch.cuda.max_memory_allocated(),
        "expected_bytes": memory.allocated,
        "parts": memory.describe(),
    }


if __name__ == "__main__":
    size, strategy, micro_batch, checkpointing = sys.argv[1:5]
    print("MEASURED " + json.dumps(measure(size, strategy, int(micro_batch), checkpointing == "1")))
