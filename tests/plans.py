"""Plans of a given layout, for tests that decide it themselves."""

from __future__ import annotations

from pathlib import Path

from accelerate.state import AcceleratorState

from trainer.config import Config
from trainer.engine import Engine, Ranks, build_accelerator
from trainer.memory import Layout, expected_bytes
from trainer.models import open_model
from trainer.plan import Plan
from trainer.shapes import KNOWN


def plan_for(
    strategy: str = "single",
    *,
    world_size: int = 1,
    micro_batch: int = 8,
    accumulation: int = 1,
    global_batch: int = 8,
    precision: str = "no",
    nodes: int = 1,
    offload: bool = False,
    checkpointing: bool = False,
    averages: bool = False,
    eight_bit: bool = False,
) -> Plan:
    """A plan with exactly this layout, for the debug model on CPUs."""
    layout = Layout(
        strategy=strategy,  # type: ignore[arg-type]
        shards=world_size // nodes,
        precision=precision,  # type: ignore[arg-type]
        micro_batch=micro_batch,
        accumulation=accumulation,
        frames=100,
        gradient_checkpointing=checkpointing,
        offload_optimizer=offload,
        on_gpu=False,
        averages=averages,
        eight_bit=eight_bit,
    )
    return Plan(
        strategy=layout.strategy,
        nodes=nodes,
        world_size=world_size,
        offload_optimizer=offload,
        global_batch=global_batch,
        micro_batch=micro_batch,
        accumulation=accumulation,
        mixed_precision=layout.precision,
        gradient_checkpointing=checkpointing,
        memory=expected_bytes(KNOWN["debug"], layout),
        gpu_memory_bytes=None,
        reasons=(),
    )


def engine_for(plan: Plan, config: Config) -> Engine:
    """An engine over the debug model, in this process; it may follow another."""
    AcceleratorState._reset_state(True)
    accelerator = build_accelerator(plan, config, Path("."))
    return Engine(accelerator, Ranks(timeout_seconds=60), open_model("debug"), plan, config)
