"""What a process does on a GPU: train adapters of a published size beside a base of 4 or 8 bits, and measure it."""

from __future__ import annotations

import gc
import json
import os
import sys
import tempfile
import time
from pathlib import Path

STEPS, SAVED_AT = 8, 4


def measure(size: str, strategy: str, bits: int | None, compiled: bool) -> dict:
    """Losses and peak memory of STEPS steps of LoRA in bf16, the losses after a resumption, what the plan expects."""
    import torch
    from accelerate.state import AcceleratorState
    from benchmarks.random_models import random_source
    from benchmarks.work import Work

    from tests.synthetic import HEADER
    from trainer.engine import Engine, Ranks, build_accelerator, find_cluster
    from trainer.flags.config import Config
    from trainer.model.source import quiet_libraries
    from trainer.plan.launcher import Launch
    from trainer.plan.plan import make_plan
    from trainer.plan.request import batch_flags, request_of
    from trainer.run.checkpoint import Saver, newest
    from trainer.spec.shapes import FRAME_RATE_HZ
    from trainer.wiring import engine_settings

    quiet_libraries()
    # Bit for bit only holds where attention's backward pass adds up in one order: flash attention's, where
    # determinism is asked for without warn_only (torch, attention_backward.cu), and not cuDNN's.
    torch.use_deterministic_algorithms(True)
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    work = Work(
        model=size,
        layers=None,
        frames=1500,
        micro_batch=2,
        accumulation=2,
        text_tokens=32,
        precision="bf16",
        strategy=strategy,  # type: ignore[arg-type]
    )
    flags = {"lora_rank": 16, "base_bits": bits, "batch_size": 2, "grad_acc": 2, "strategy": strategy}
    config = Config(dataset_path="unused", compile="1" if compiled else "0", **flags)  # type: ignore[arg-type]
    asked = request_of(config, frozenset(), Launch(), frame_rate_hz=FRAME_RATE_HZ, deepspeed_available=False)
    assert asked.workload.segment_frames == work.frames
    plan = make_plan(find_cluster(Launch(), compiler=compiled), work.shape, batch_flags(config, frozenset()), asked)
    assert (plan.micro_batch, plan.accumulation, plan.mixed_precision) == (2, 2, "bf16"), plan.describe()
    accelerator = build_accelerator(plan, engine_settings(config), Path("."))
    with Ranks(timeout_seconds=600) as ranks, tempfile.TemporaryDirectory() as folder:
        saver = Saver(Path(folder), rank=0, world_size=1)

        def losses(engine: Engine, first: int, last: int) -> list[float]:
            batch = work.batch().to(engine.device)
            return [
                engine.step([batch] * work.accumulation, work.cells, step=step, learning_rate=1e-3).loss
                for step in range(first, last)
            ]

        since = time.perf_counter()
        engine = Engine(accelerator, ranks, random_source(size), plan, engine_settings(config))
        built_seconds, built_bytes = time.perf_counter() - since, torch.cuda.max_memory_allocated()
        weight_bytes = engine.backend.weight_bytes()
        torch.cuda.reset_peak_memory_stats()
        found = losses(engine, 0, SAVED_AT)
        saver.save(SAVED_AT, engine.state(), HEADER)
        saver.wait()
        torch.cuda.synchronize()
        since = time.perf_counter()
        found += losses(engine, SAVED_AT, STEPS)
        seconds = (time.perf_counter() - since) / (STEPS - SAVED_AT)
        peak = torch.cuda.max_memory_allocated()
        del engine
        gc.collect()
        torch.cuda.empty_cache()
        AcceleratorState._reset_state(strategy == "single")
        accelerator = build_accelerator(plan, engine_settings(config), Path("."))
        again = Engine(accelerator, ranks, random_source(size), plan, engine_settings(config))
        checkpoint = newest(Path(folder))
        assert checkpoint is not None
        again.load(checkpoint)
        resumed = losses(again, SAVED_AT, STEPS)
    return {
        "losses": found,
        "resumed": resumed,
        "step_seconds": seconds,
        "built_seconds": built_seconds,
        "built_bytes": built_bytes,
        "weight_bytes": weight_bytes,
        "expected_weight_bytes": plan.memory.weights,
        "peak_bytes": peak,
        "expected_bytes": plan.memory.allocated,
        "parts": plan.memory.describe(),
    }


if __name__ == "__main__":
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before CUDA starts
    size, strategy, bits, compiled = sys.argv[1:5]
    print("MEASURED " + json.dumps(measure(size, strategy, int(bits) or None, compiled == "1")))
