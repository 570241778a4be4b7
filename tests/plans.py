"""Plans of a given layout, for tests that decide it themselves."""

from __future__ import annotations

from pathlib import Path

from accelerate.state import AcceleratorState

from trainer.engine import Engine, Ranks, build_accelerator
from trainer.flags.config import Config
from trainer.model.source import Source, open_model
from trainer.plan.memory import Checkpointing, Layout, expected_bytes
from trainer.plan.plan import Plan
from trainer.spec.shapes import KNOWN
from trainer.spec.trainable import Counts
from trainer.wiring import engine_settings


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
    checkpointing: Checkpointing = False,
    averages: bool = False,
    eight_bit: bool = False,
    base_bits: int | None = None,
    compiled: bool = False,
    counts: Counts | None = None,
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
        base_bits=base_bits,  # type: ignore[arg-type]
        counts=counts,
        compiled=compiled,
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
        compiled=compiled,
        memory=expected_bytes(KNOWN["debug"], layout),
        gpu_memory_bytes=None,
        reasons=(),
    )


def engine_for(plan: Plan, config: Config, source: Source | None = None) -> Engine:
    """An engine over `source` or the debug model, in this process; it may follow another."""
    AcceleratorState._reset_state(True)
    accelerator = build_accelerator(plan, engine_settings(config), Path("."))
    return Engine(accelerator, Ranks(timeout_seconds=60), source or open_model("debug"), plan, engine_settings(config))
