"""What a process does on a GPU: train two steps of a published size with a sound in between, and measure it."""

from __future__ import annotations

import json
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.gpu.cases import work_of
from trainer.plan.layout import Samples
from trainer.plan.memory import expected_bytes
from trainer.wiring import engine_settings

SAMPLES = Samples(sound_frames=500)


def measure(size: str, strategy: str) -> dict[str, Any]:
    """Bytes at the peak of a sound, as planned, and before and after; whether the copy had the run's weights."""
    import torch
    from benchmarks.random_models import random_model, random_source

    from tests.plan.test_sampling import generate
    from trainer.engine import Engine, Ranks, build_accelerator, find_cluster
    from trainer.flags.config import Config
    from trainer.model.source import free_unused
    from trainer.plan.launcher import Launch

    work = work_of(size, strategy, 1, "eager")
    silent = work.plan(gpu_memory_bytes=find_cluster(Launch()).gpu_memory_bytes)
    layout = replace(silent.layout, workload=replace(silent.layout.workload, samples=SAMPLES))
    plan = replace(silent, layout=layout, memory=expected_bytes(work.shape, layout))
    config, source = Config(dataset_path="unused"), random_source(work.model)
    with Ranks(timeout_seconds=600) as ranks:
        accelerator = build_accelerator(plan, engine_settings(config), Path("."))
        engine = Engine(accelerator, ranks, source, plan, engine_settings(config))
        batch = work.batch().to(engine.device)

        def step(number: int) -> float:
            return engine.step([batch] * work.accumulation, work.cells, step=number, learning_rate=1e-4).loss

        step(0)
        before = _held()
        torch.cuda.reset_peak_memory_stats()
        with engine.sampling_model() as model:
            generate(model, SAMPLES)
            codec = random_model("debug").audio_encoder.eval().to(engine.device)  # of the published size
            codes = torch.zeros(1, 1, work.shape.codebooks, SAMPLES.sound_frames, dtype=torch.int64)
            codec.decode(codes.to(engine.device), [None])
            held = dict(model.named_parameters())
            equal = all(
                torch.equal(held[shard.name].view(-1), shard.weight.to(held[shard.name].dtype))
                for shard in engine.shards()
            )
            del codec, held
            free_unused(engine.device)
        peak, workspaces, after = torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated(), _held()
        workspaces -= _bytes(after)
        loss = step(1)
    return {
        "peak_bytes": peak,
        "expected_bytes": plan.memory.samples,
        "left_bytes": _bytes(after) - _bytes(before),
        "left_blocks": sorted((after - before).elements(), reverse=True)[:5],
        "workspace_bytes": workspaces,
        "equal": equal,
        "loss": loss,
    }


def _bytes(blocks: Counter[int]) -> int:
    return sum(size * count for size, count in blocks.items())


def _held() -> Counter[int]:
    """The sizes in bytes of all blocks of device memory in use, each with how many there are.

    cuBLAS's workspaces are not among them: they belong to the process, and come again with the next product.
    """
    import torch

    torch.cuda.synchronize()
    torch._C._cuda_clearCublasWorkspaces()  # as torch's own tests of leaks do
    segments = torch.cuda.memory_snapshot()
    blocks = [block for segment in segments for block in segment["blocks"]]
    return Counter(block["size"] for block in blocks if block["state"] == "active_allocated")


if __name__ == "__main__":
    print("MEASURED " + json.dumps(measure(*sys.argv[1:3])))
