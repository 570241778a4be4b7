"""One rank of a large world on one device, with no other rank: torch's fake process group answers every collective.

What is received is made up, so that losses mean nothing. Memory, kernels and Python's work are those of that rank.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.plan.layout import Checkpointing, Precision, Strategy

STEPS = 5


@dataclass(frozen=True, kw_only=True)
class World:
    """Rank 0's part of `ranks` ranks on `nodes` machines."""

    model: str
    strategy: Strategy
    ranks: int
    nodes: int = 1
    micro_batch: int = 1
    accumulation: int = 2
    frames: int = 1500
    precision: Precision = "bf16"
    gradient_checkpointing: Checkpointing = False
    compiled: bool = False
    gathers_once: bool = False
    reduces_once: bool = False

    def __str__(self) -> str:
        once = " once" * self.reduces_once
        machines = f" of {self.nodes} machines" * (self.nodes > 1)
        return f"{self.model} {self.strategy} on {self.ranks} ranks{machines}{once}"


@dataclass(frozen=True, kw_only=True)
class Share:
    """What rank 0 held and took.

    peak_bytes, planned_bytes   device memory at most, 0 without a GPU; and what the plan says
    weight_bytes, optimizer_bytes  between steps
    host_seconds                until the last kernel of a step was started
    step_seconds                until it had ended, with nothing to communicate
    """

    peak_bytes: int
    planned_bytes: int
    weight_bytes: int
    optimizer_bytes: int
    host_seconds: float
    step_seconds: float


class FakeRanks:
    """What the engine asks of the other ranks, of which there are none."""

    def __init__(self, world_size: int):
        self.rank, self.world_size, self.is_first, self.steps_begun = 0, world_size, True, 0

    def sum(self, values: Tensor) -> Tensor:
        return values

    def check_equal(self, **_: object) -> None: ...

    def say(self, text: str) -> None: ...


def share(world: World) -> Share:
    """Build rank 0's engine and take some steps of it; to be called in a process of its own."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(world.ranks)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(world.ranks // world.nodes), "MASTER_ADDR": "127.0.0.1"}
    os.environ["MASTER_PORT"] = "29999"  # nothing listens there
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(0)
    dist.init_process_group("fake", rank=0, world_size=world.ranks, store=FakeStore())
    engine, batch, planned = _engine(world)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    cells = torch.full((4,), float(world.ranks * world.micro_batch * world.accumulation * world.frames))
    cells = cells.to(engine.device)
    times = [_step(engine, batch, cells, world.accumulation, number) for number in range(STEPS)]
    host, whole = (median(column) for column in zip(*times[2:], strict=True))
    return Share(
        peak_bytes=torch.cuda.max_memory_allocated() if cuda else 0,
        planned_bytes=planned,
        weight_bytes=engine.backend.weight_bytes(),
        optimizer_bytes=engine.backend.optimizer_bytes(),
        host_seconds=host,
        step_seconds=whole,
    )


def _engine(world: World) -> tuple[Any, Any, int]:
    """The engine, a micro-batch on its device, and the bytes that the plan expects."""
    from benchmarks.random_models import random_source
    from benchmarks.work import Work

    from trainer.engine import Engine, build_accelerator
    from trainer.flags.config import Config
    from trainer.plan.memory import expected_bytes
    from trainer.wiring import engine_settings

    work = Work(
        model=world.model,
        layers=None,
        frames=world.frames,
        micro_batch=world.micro_batch,
        accumulation=world.accumulation,
        text_tokens=32,
        precision=world.precision,
        strategy=world.strategy,
        gradient_checkpointing=world.gradient_checkpointing,
        compiled=world.compiled,
    )
    layout = replace(
        work.layout(on_gpu=torch.cuda.is_available()),
        nodes=world.nodes,
        world_size=world.ranks,
        gathers_once=world.gathers_once,
        reduces_once=world.reduces_once,
    )
    plan = replace(
        work.plan(gpu_memory_bytes=None),
        layout=layout,
        global_batch=work.clips * world.ranks,
        memory=expected_bytes(work.shape, layout),
    )
    settings = engine_settings(Config(dataset_path="unused"))
    accelerator = build_accelerator(plan, settings, Path("."))
    # The sums over ranks that this check needs are made up here.
    Engine._check_shards = lambda self, plan: None  # type: ignore[method-assign]
    engine = Engine(accelerator, FakeRanks(world.ranks), random_source(world.model), plan, settings)  # type: ignore[arg-type]
    return engine, work.batch().to(engine.device), plan.memory.allocated


def _step(engine: Any, batch: Any, cells: Tensor, accumulation: int, number: int) -> tuple[float, float]:
    """Seconds of one step: on the host, and until the device was done. What made-up gradients give is not looked at."""
    since = time.perf_counter()
    engine._backward([batch] * accumulation, cells, number)
    norm = 2 + 0 * engine.backend.finish(1e-6)  # as if it had to be clipped
    engine.backend.update(norm, norm.isfinite())
    host = time.perf_counter() - since
    if engine.device.type == "cuda":
        torch.cuda.synchronize()
    return host, time.perf_counter() - since
