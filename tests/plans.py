"""Plans of a given layout, for tests that decide it themselves."""

from __future__ import annotations

from pathlib import Path

from accelerate.state import AcceleratorState

from trainer.engine import Engine, Ranks, build_accelerator
from trainer.flags.config import Config
from trainer.model.source import Source, open_model
from trainer.plan.layout import Checkpointing, Layout, Samples, Workload
from trainer.plan.memory import expected_bytes
from trainer.plan.plan import Plan
from trainer.spec.shapes import KNOWN
from trainer.spec.trainable import EVERYTHING, Selection
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
    ema: bool = False,
    eight_bit_moments: bool = False,
    base_bits: int | None = None,
    compiled: bool = False,
    gathers_once: bool = False,
    reduces_once: bool = False,
    selection: Selection = EVERYTHING,
    on_gpu: bool = False,
    samples: Samples | None = None,
) -> Plan:
    """A plan with exactly this layout, for the debug model, on CPUs unless it is said."""
    workload = Workload(
        segment_frames=100,
        selection=selection,
        ema=ema,
        eight_bit_moments=eight_bit_moments,
        base_bits=base_bits,  # type: ignore[arg-type]
        samples=samples,
    )
    layout = Layout(
        workload=workload,
        strategy=strategy,  # type: ignore[arg-type]
        nodes=nodes,
        world_size=world_size,
        on_gpu=on_gpu,
        mixed_precision=precision,  # type: ignore[arg-type]
        micro_batch=micro_batch,
        accumulation=accumulation,
        gradient_checkpointing=checkpointing,
        offload_optimizer=offload,
        compiled=compiled,
        gathers_once=gathers_once,
        reduces_once=reduces_once,
    )
    memory = expected_bytes(KNOWN["debug"], layout)
    return Plan(layout=layout, global_batch=global_batch, memory=memory, gpu_memory_bytes=None, reasons=())


def engine_for(plan: Plan, config: Config, source: Source | None = None) -> Engine:
    """An engine over `source` or the debug model, in this process; it may follow another."""
    AcceleratorState._reset_state(True)
    accelerator = build_accelerator(plan, engine_settings(config), Path("."))
    return Engine(accelerator, Ranks(timeout_seconds=60), source or open_model("debug"), plan, engine_settings(config))
