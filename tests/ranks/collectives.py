"""What an optimizer step gives to torch's process groups, counted where torch hands it over."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.plans import plan_for
from tests.ranks.cases import GLOBAL_BATCH, LENGTHS, SEGMENT
from tests.synthetic import random_examples
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


@dataclass(frozen=True, kw_only=True)
class Counted:
    """Bytes that one process sent in a step, by kind of collective; those of a few values apart, as "few"."""

    sent: Counter[str]

    def of(self, *kinds: str) -> float:
        return sum(self.sent[kind] for kind in kinds)


class Collectives(TorchDispatchMode):
    """Inside the block, counts the tensors that this process gives to collectives."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: Counter[str] = Counter()

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
        if sum(tensor.numel() for tensor in tensors) <= FEW_VALUES:
            kind, times = "few", TIMES[kind]
        else:
            times = TIMES[kind]
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        self.sent[kind] += times * size * (group.size() - 1) / group.size()  # type: ignore[assignment]


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
    **planned: Any,
) -> Counted:
    """What this rank sent in the last of some steps: in the first, ZeRO-3 only learns what it is to gather ahead.

    zero   settings of DeepSpeed's in place of the trainer's
    flags  of the config
    """
    import os

    from trainer.data.order import Order, micro_batches, rows_of_step, valid_cells
    from trainer.engine import Engine, Ranks, accelerator, build_accelerator
    from trainer.flags.config import Config
    from trainer.model.source import open_model

    if zero is not None:
        ours = accelerator.zero_config

        def changed(*arguments: Any) -> dict[str, Any]:
            config = ours(*arguments)
            return config | {"zero_optimization": config["zero_optimization"] | zero}

        accelerator.zero_config = changed
    world_size = int(os.environ["WORLD_SIZE"])
    config = Config(dataset_path="unused", timeout_minutes=2.0, lr=1e-3, **(flags or {}))
    new_tokens = config.selection.new_rows
    examples = random_examples(LENGTHS, segment_frames=SEGMENT, new_tokens=new_tokens, model=model)
    order = Order(
        seed=1,
        epochs=9,
        global_batch=GLOBAL_BATCH,
        segment_frames=SEGMENT,
        codebooks=examples.shape.codebooks,
        channels=examples.shape.audio_channels,
        caption_drop_rate=0.3,
        melody_drop_rate=0.4 if examples.shape.melody else 0.0,
        frames=examples.codes.frames,
    )
    micro = GLOBAL_BATCH // (world_size * accumulation)
    plan = plan_for(
        strategy,
        world_size=world_size,
        micro_batch=micro,
        accumulation=accumulation,
        selection=config.selection,
        **planned,
    )
    plan = replace(plan, layout=replace(plan.layout, gathers_once=gathers_once, reduces_once=reduces_once))
    built = build_accelerator(plan, engine_settings(config), Path("."))
    with Ranks(timeout_seconds=60) as ranks:
        engine = Engine(built, ranks, open_model(model), plan, engine_settings(config))
        for step in range(steps):
            rows = rows_of_step(order, step)
            shares = micro_batches(
                rows, micro_batch=micro, accumulation=accumulation, world_size=world_size, rank=ranks.rank
            )
            cells = valid_cells(rows, order.codebooks, SEGMENT, order.channels)
            batches = [examples.batch(share) for share in shares]
            with Collectives() as collectives:
                engine.step(batches, cells, step=step, learning_rate=config.lr)
        return Counted(sent=collectives.sent)
