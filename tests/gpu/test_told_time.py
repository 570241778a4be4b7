"""A full step's time by its rehearsal and by the plan, beside real steps. Bounded on a GPU alone."""

from __future__ import annotations

import os
import time
from pathlib import Path
from statistics import median

import pytest
import torch
from benchmarks.work import Work

from tests.gpu.one_card import run_ranks, say_figure
from trainer.plan.time import StepTime

pytestmark = [pytest.mark.full, pytest.mark.timeout(300)]
# More micro-batches than the rehearsal runs, so that it has to reckon.
SMALL = Work(model="small", layers=None, frames=1500, micro_batch=16, accumulation=3, precision="bf16", compiled=True)
DEBUG = Work(model="debug", layers=None, frames=60, micro_batch=2, accumulation=3)
STEPS, WARM_UPS = 6, 1
WITHIN = 0.2  # docs/time.md: the aim of all times that are told


def told_and_real(work: Work) -> tuple[StepTime, StepTime | None, list[float]]:
    """A full step's time by the rehearsal and by the plan, and the seconds of real steps.

    A step returns while the device is still at AdamW, for which the next one waits: so one after the other they take
    what a step takes.
    """
    from benchmarks.random_models import random_source

    from trainer.engine import Engine, Ranks, build_accelerator, find_cluster
    from trainer.flags.config import Config
    from trainer.plan.launcher import read_launch
    from trainer.plan.time import step_time
    from trainer.wiring import engine_settings

    cluster, settings = find_cluster(read_launch(os.environ)), engine_settings(Config(dataset_path="unused"))
    plan = work.plan(gpu_memory_bytes=cluster.gpu_memory_bytes if cluster.device == "cuda" else None)
    accelerator = build_accelerator(plan, settings, Path("."))
    seconds = []
    with Ranks(timeout_seconds=300) as ranks:
        engine = Engine(accelerator, ranks, random_source(work.model), plan, settings)
        batch = work.batch()
        rehearsed = engine.rehearse(batch, work.accumulation)
        for step in range(WARM_UPS + STEPS):
            since = time.perf_counter()
            engine.step([batch] * work.accumulation, work.cells, step=step, learning_rate=1e-5)
            seconds.append(time.perf_counter() - since)
    planned = step_time(work.shape, plan.layout, cluster, text_tokens=work.text_tokens)
    return rehearsed, planned, seconds[WARM_UPS:]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_rehearsal_and_the_plan_foretell_the_time_of_real_steps() -> None:
    [(rehearsed, planned, seconds)] = run_ranks(1, told_and_real, SMALL)
    real = median(seconds)
    expected = "of a card without known rates" if planned is None else f"planned {planned.seconds / real:.2f} of it"
    say_figure(
        f"small, 3 x 16 clips of 30 s: {real:.3f} s a step ({min(seconds):.3f} to {max(seconds):.3f}); rehearsed"
        f" {rehearsed.seconds / real:.2f} of it, {expected}"
    )
    assert rehearsed.seconds == pytest.approx(real, rel=WITHIN)
    assert planned is None or planned.seconds == pytest.approx(real, rel=WITHIN)


@pytest.mark.skipif(torch.cuda.is_available(), reason="is of a CPU")
def test_on_a_cpu_the_rehearsal_alone_tells_a_time() -> None:
    [(rehearsed, planned, seconds)] = run_ranks(1, told_and_real, DEBUG)
    assert planned is None and len(seconds) == STEPS
    assert rehearsed.compute > 0 and rehearsed.update > 0
