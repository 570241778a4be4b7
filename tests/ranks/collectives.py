"""What an optimizer step gives to torch's process groups, counted where torch hands it over."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.plans import plan_for
from tests.ranks.cases import LENGTHS, SEGMENT
from tests.synthetic import random_examples
from trainer.data.batches import Batch
from trainer.wiring import engine_settings

# torch's operations by the kind of collective; which argument is the whole tensor, which the processes share. Python
# and C++ (DistributedDataParallel) both come through these.
WHOLE_ARGUMENT = {
    "_allgather_base_": ("gather", 0),
    "allgather_": ("gather", 0),
    "allgather_into_tensor_coalesced_": ("gather", 0),
    "_reduce_scatter_base_": ("scatter", 1),
    "reduce_scatter_": ("scatter", 1),
    "reduce_scatter_tensor_coalesced_": ("scatter", 1),
    "allreduce_": ("allreduce", 0),
    "allreduce_coalesced_": ("allreduce", 0),
    "reduce_": ("reduce", 0),
    "broadcast_": ("broadcast", 0),
}
# What one process sends of a tensor, on average over the n processes: so often (n - 1) / n.
TIMES = {"gather": 1, "scatter": 1, "allreduce": 2, "reduce": 1, "broadcast": 1}
# The engine sums losses and norms, DeepSpeed norms and signs of overflow: tensors of a few values.
FEW_VALUES = 16


class Collectives(TorchDispatchMode):
    """Inside the block, counts the tensors that this process gives to collectives."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: dict[str, float] = defaultdict(float)

    def __torch_dispatch__(self, operation: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        if operation.namespace == "c10d":
            self._count(operation.__name__.split(".")[0], arguments)
        return operation(*arguments, **(named or {}))

    def _count(self, name: str, arguments: Any) -> None:
        if name == "barrier":
            return
        kind, whole = WHOLE_ARGUMENT[name]  # KeyError: a collective that the formulas do not know
        tensors = list(_flat(arguments[whole]))
        group = next(_group(argument) for argument in arguments if isinstance(argument, torch.ScriptObject))
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        sent = TIMES[kind] * size * (group.size() - 1) / group.size()
        few = sum(tensor.numel() for tensor in tensors) <= FEW_VALUES
        self.sent["few" if few else kind] += sent


def _flat(tensors: Any) -> Iterable[Tensor]:
    if isinstance(tensors, Tensor):
        yield tensors
    else:
        for each in tensors:
            yield from _flat(each)


def _group(argument: Any) -> Any:
    return torch.distributed.ProcessGroup.unbox(argument)


def sent_in_a_step(
    strategy: str,
    accumulation: int,
    *,
    model: str = "debug",
    steps: int = 3,
    gathers_once: bool = False,
    reduces_once: bool = False,
    zero: dict[str, Any] | None = None,
    flags: dict[str, Any] | None = None,
    layers: int | None = None,
    **planned: Any,
) -> dict[str, float]:
    """Bytes that this rank sent in the last of some steps, by kind of collective; those of few values apart, as "few".

    Of the last, since in the first one ZeRO-3 only learns what it is to gather ahead.

    zero     settings of DeepSpeed's in place of the trainer's
    flags    of the config
    layers   of the decoder, in place of the debug model's
    planned  of the plan, as plan_for takes it
    """
    import os

    from trainer.engine import Engine, Ranks, accelerator, build_accelerator
    from trainer.flags.config import Config
    from trainer.model.debug_model import build_debug_model
    from trainer.model.source import open_model, source_of

    if zero is not None:
        ours = accelerator.zero_config

        def changed(*arguments: Any) -> dict[str, Any]:
            config = ours(*arguments)
            return config | {"zero_optimization": config["zero_optimization"] | zero}

        accelerator.zero_config = changed
    config = Config(dataset_path="unused", timeout_minutes=2.0, lr=1e-3, **(flags or {}))
    source = open_model(model) if layers is None else source_of(build_debug_model(layers=layers), name=model)
    plan = plan_for(strategy, world_size=int(os.environ["WORLD_SIZE"]), accumulation=accumulation, **planned)
    workload = replace(plan.layout.workload, selection=config.selection)
    layout = replace(plan.layout, workload=workload, gathers_once=gathers_once, reduces_once=reduces_once)
    plan = replace(plan, layout=layout)
    built = build_accelerator(plan, engine_settings(config), Path("."))
    with Ranks(timeout_seconds=60) as ranks:
        engine = Engine(built, ranks, source, plan, engine_settings(config))
        batches, cells = _batches(model, config.selection.new_rows, accumulation)
        for step in range(steps):
            with Collectives() as collectives:
                engine.step(batches, cells, step=step, learning_rate=config.lr)
        return dict(collectives.sent)


def _batches(model: str, new_tokens: int, accumulation: int) -> tuple[list[Batch], np.ndarray]:
    """Micro-batches of two clips, and what the engine is told of the step's valid cells: any number does."""
    from trainer.data.order import Row

    examples = random_examples(LENGTHS, segment_frames=SEGMENT, new_tokens=new_tokens, model=model)
    rows = [Row(clip=clip, epoch=0, view=0, start=0, frames=5, drop_caption=False) for clip in range(2)]
    return [examples.batch(rows)] * accumulation, np.full(examples.shape.codebooks, 100)
