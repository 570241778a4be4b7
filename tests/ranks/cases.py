"""What ranks do in the tests: functions at module level, so that a forkserver can find them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed.tensor import DTensor

from tests.ranks.harness import run_ranks
from tests.synthetic import HEADER, random_examples
from trainer.plan.layout import Checkpointing
from trainer.wiring import engine_settings

LENGTHS = [5, 40, 60, 33, 17, 40, 90, 12, 26]
SEGMENT = 40
GLOBAL_BATCH = 8


@dataclass(frozen=True, kw_only=True)
class Numbers:
    """Losses and gradient norms of the steps, bytes that this rank held, which of its frozen parameters moved, how many
    graphs it compiled, how many tensors its optimizer steps on that are more than memory of this rank, and how many
    rows each of its micro-batches had in each step."""

    losses: list[float]
    norms: list[float]
    optimizer_bytes: int = 0
    weight_bytes: int = 0
    gradient_bytes: int = 0
    frozen: int = 0
    moved: Sequence[str] = ()
    graphs: int = 0
    dtensors: int = 0
    row_counts: Sequence[Sequence[int]] = ()


def steps(
    strategy: str,
    accumulation: int,
    *,
    model: str = "debug",
    count: int = 10,
    precision: str = "no",
    folder: str | None = None,
    save_at: int | None = None,
    nodes: int = 1,
    offload: bool = False,
    checkpointing: Checkpointing = False,
    compiled: bool = False,
    gathers_once: bool = False,
    reduces_once: bool = False,
    mean_of_means: bool = False,
    flags: Mapping[str, Any] | None = None,
    epochs: int = 9,
    ema_decay: float | None = None,
    optimizer: Any = "adamw",
    watch: Callable[[Any], None] | None = None,
    captions: Sequence[str | None] | None = None,
    lengths: Sequence[int] = LENGTHS,
) -> Numbers:
    """`count` steps of a run of 11 on ragged clips, some without captions; the eleventh has a single clip.

    Of a melody model, some clips are without their melody too.

    model    one of DEBUG_NAMES
    folder   where checkpoints lie: the newest is resumed from
    save_at  save there after this step
    flags    of the config besides, such as freeze
    mean_of_means  the mistake that global counts avoid: each micro-batch divides by its own cells
    watch  called with the engine before the first step and after each
    captions  of the clips, in place of short ones
    lengths  of the clips, in frames
    """
    import os

    from tests.plans import plan_for
    from trainer.data.cut import cut_for, micro_batches
    from trainer.data.order import Order, rows_of_step, valid_cells
    from trainer.engine import Engine, Ranks, build_accelerator
    from trainer.flags.config import Config
    from trainer.model.source import open_model
    from trainer.run.checkpoint import Saver, newest

    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    values = {"lr": 1e-3, "weight_decay": 0.01, "ema_decay": ema_decay, "optimizer": optimizer, **(flags or {})}
    config = Config(dataset_path="unused", timeout_minutes=2.0, **values)
    examples = random_examples(
        lengths, captions, segment_frames=SEGMENT, new_tokens=config.selection.new_rows, model=model
    )
    order = Order(
        seed=1,
        epochs=epochs,  # of 9: 81 rows, which are ten steps of 8 and one of a single row
        global_batch=GLOBAL_BATCH,
        segment_frames=SEGMENT,
        codebooks=examples.shape.codebooks,
        channels=examples.shape.audio_channels,
        caption_drop_rate=0.3,
        melody_drop_rate=0.4 if examples.shape.melody else 0.0,
        frames=examples.codes.frames,
    )
    of_model = (order.codebooks, SEGMENT, order.channels)
    micro = -(-GLOBAL_BATCH // (world_size * accumulation))
    plan = plan_for(
        strategy,
        world_size=world_size,
        micro_batch=micro,
        accumulation=accumulation,
        precision=precision,
        nodes=nodes,
        offload=offload,
        checkpointing=checkpointing,
        ema=ema_decay is not None,
        eight_bit_moments=optimizer == "adamw8bit",
        compiled=compiled,
        gathers_once=gathers_once,
        reduces_once=reduces_once,
    )
    cut = cut_for(order, micro_batch=micro, accumulation=accumulation, world_size=world_size, row_places=6)
    accelerator = build_accelerator(plan, engine_settings(config), Path("."))
    losses, norms, counts = [], [], []
    with Ranks(timeout_seconds=150 if compiled else 60) as ranks:  # compiling may take a minute on busy cores
        engine = Engine(accelerator, ranks, open_model(model), plan, engine_settings(config))
        checkpoint = newest(Path(folder)) if folder else None
        start = 0
        if checkpoint is not None:
            engine.load(checkpoint)
            start = checkpoint.step
        if watch is not None:
            watch(engine)
        gradient_bytes = _gradient_bytes_of(engine.backend)
        frozen = _frozen_values(engine.backend)
        saver = Saver(Path(folder), rank=ranks.rank, world_size=world_size) if folder else None
        for step in range(start, min(start + count, order.steps)):
            rows = rows_of_step(order, step)
            shares = micro_batches(rows, cut, ranks.rank)
            counts.append([len(share) for share in shares])
            cells = valid_cells(rows, *of_model)
            batches = [examples.batch(share) for share in shares]
            if mean_of_means:
                cells = valid_cells(shares[0], *of_model) * world_size * accumulation
            result = engine.step(batches, cells, step=step, learning_rate=config.lr)
            losses.append(result.loss)
            norms.append(result.grad_norm)
            if watch is not None:
                watch(engine)
            if saver is not None and step + 1 == save_at:
                saver.save(step + 1, engine.state(), HEADER)
                saver.wait()
                ranks.wait("saved")
        return Numbers(
            losses=losses,
            norms=norms,
            optimizer_bytes=engine.backend.optimizer_bytes(),
            weight_bytes=engine.backend.weight_bytes(),
            gradient_bytes=max(gradient_bytes, default=0),
            frozen=len(frozen),
            moved=[name for name, now in _frozen_values(engine.backend).items() if not torch.equal(now, frozen[name])],
            graphs=torch._dynamo.utils.counters["stats"]["unique_graphs"],
            dtensors=_dtensors_of(engine.backend),
            row_counts=counts,
        )


@cache
def undisturbed(
    strategy: str = "single", world_size: int = 1, accumulation: int = 1, *, model: str = "debug"
) -> list[Numbers]:
    """Of each rank, over all 11 steps with the plainest settings; made once for all tests that compare with it."""
    return run_ranks(world_size, steps, strategy, accumulation, count=11, model=model)


def part_of(whole: Numbers, first: int, last: int) -> Numbers:
    """Losses and norms of the steps after the first `first` and up to `last`."""
    return Numbers(losses=whole.losses[first:last], norms=whole.norms[first:last])


def _gradient_bytes_of(backend: Any) -> list[int]:
    """A list that grows by the bytes of gradients that the rank holds at the end of each step's backward."""
    found, finish = [], backend.finish

    def measured(learning_rate: float) -> Any:
        found.append(backend.gradient_bytes())
        return finish(learning_rate)

    backend.finish = measured
    return found


def _dtensors_of(backend: Any) -> int:
    optimizer = getattr(backend, "_optimizer", None)  # ZeRO's steps on flat tensors of its own
    held = [] if optimizer is None else [*optimizer.state, *(v for s in optimizer.state.values() for v in s.values())]
    return sum(isinstance(values, DTensor) for values in held)


def _frozen_values(backend: Any) -> dict[str, torch.Tensor]:
    """Copies of what this rank holds of the frozen parameters, wherever the strategy keeps it."""
    held: dict[str, torch.Tensor] = {}
    for module in backend.model.modules():
        for encoder in getattr(module, "_outside", ()):  # T5 in the loop
            held |= {f"T5 {name}": parameter.detach().clone() for name, parameter in encoder.named_parameters()}
    for name, parameter in backend.model.named_parameters():
        if not parameter.requires_grad:
            local = getattr(parameter, "ds_tensor", parameter).detach()
            held[name] = (local.to_local() if hasattr(local, "to_local") else local).clone()
    return held


def differences(found: Numbers, reference: Numbers) -> tuple[float, float]:
    """Largest difference of losses, and largest relative one of gradient norms."""
    losses, norms = np.array(found.losses), np.array(found.norms)
    wanted_losses, wanted_norms = np.array(reference.losses), np.array(reference.norms)
    return float(abs(losses - wanted_losses).max()), float((abs(norms - wanted_norms) / wanted_norms).max())
