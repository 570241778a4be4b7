"""Why a plan is as it is, in words."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

from trainer.plan.allowed_layouts import (
    ROOMY_SHARE,
    EstimatedLayout,
    Job,
    largest_micro_batch,
    tried_layouts,
)
from trainer.plan.communication import traffic
from trainer.plan.exchange import exchanges, plain
from trainer.plan.layout import Checkpointing, Layout
from trainer.plan.memory import GIB, expected_bytes
from trainer.plan.request import Request
from trainer.plan.strategies import Cluster
from trainer.plan.wanted_layouts import wanted_layouts
from trainer.spec.shapes import Shape
from trainer.spec.trainable import count

CHECKPOINTING: dict[Checkpointing, str] = {False: "no", True: "full", "selective": "selective"}


def reasons_of(cluster: Cluster, job: Job, tried: Sequence[EstimatedLayout]) -> Iterator[str]:
    """Why the last of the layouts that were tried is taken and not one before it, which did not fit."""
    taken = tried[-1]
    yield from _compile_reasons(cluster, job.request, taken.layout)
    yield from _memory_reasons(cluster, job, tried)
    yield from _exchange_reasons(cluster, job.shape, taken)
    yield from _sound_reasons(cluster, job, taken)
    yield from _selection_reasons(job.shape, job.request)


def filler_reasons(global_batch: int, layout: Layout) -> Iterator[str]:
    fillers = layout.world_size * layout.accumulation * layout.micro_batch - global_batch
    if fillers:
        yield f"{fillers} filler rows of weight 0 per step, because {global_batch} clips do not split evenly"


def bytes_while_sampling(shape: Shape, layout: Layout, request: Request) -> int:
    """What a process of this layout needs while it makes sounds, its reserve included."""
    workload = replace(layout.workload, samples=request.samples)
    memory = expected_bytes(shape, replace(layout, workload=workload))
    return memory.samples + memory.reserve


def _compile_reasons(cluster: Cluster, request: Request, layout: Layout) -> Iterator[str]:
    if layout.compiled:
        yield f"layers are compiled from --compile {request.compile}: the first step takes up to a minute longer"
    elif cluster.device == "cuda" and request.compile == "auto" and not cluster.compiles:
        yield "layers are not compiled: torch.compile does not work here; steps take about a tenth longer"


def _memory_reasons(cluster: Cluster, job: Job, tried: Sequence[EstimatedLayout]) -> Iterator[str]:
    """What was changed because memory is short or plenty, and what a more wanted layout would have needed."""
    taken = tried[-1]
    within_flags = next((one for one in tried if one.layout.micro_batch <= job.batch_size), taken)
    if cluster.gpu_memory_bytes is None:
        yield "nothing is refused for memory, because the device's is unknown"
    elif refused := _refused(within_flags, tried):
        yield (
            f"{refused.layout.strategy} with micro-batch {refused.layout.micro_batch} and"
            f" {CHECKPOINTING[refused.layout.gradient_checkpointing]} checkpointing would take"
            f" {_of_limit(cluster, refused)}"
        )
    yield from _micro_batch_reasons(cluster, job, taken.layout, within_flags.layout)
    if job.request.gradient_checkpointing:
        yield "activation checkpointing from --gradient_checkpointing"
    elif taken.reason:
        yield taken.reason
    elif taken.layout.gradient_checkpointing == "selective" and taken.layout.micro_batch > job.batch_size:
        yield (
            f"selective checkpointing, so that micro-batch {taken.layout.micro_batch} fits: faster than a smaller one"
            " without"
        )
    elif taken.layout.gradient_checkpointing:
        little = taken.layout.gradient_checkpointing == "selective"
        what, longer = ("selective", "some percent") if little else ("activation", "about a third")
        yield f"{what} checkpointing because memory is short: steps take {longer} longer"


def _refused(within_flags: EstimatedLayout, tried: Sequence[EstimatedLayout]) -> EstimatedLayout | None:
    """The layout to name as one that does not fit: the first whose micro-batch the flags had by themselves; where that
    fits, the last that was tried before it; None where there is none."""
    taken = tried[-1]
    if plain(within_flags.layout) != plain(taken.layout):
        return within_flags
    before = [one for one in tried if plain(one.layout) != plain(taken.layout)]
    return before[-1] if before else None


def _micro_batch_reasons(cluster: Cluster, job: Job, taken: Layout, within_flags: Layout) -> Iterator[str]:
    """Why the micro-batch is not that of the flags."""
    if taken.micro_batch < within_flags.micro_batch:
        yield f"micro-batch {taken.micro_batch} because memory is short; the global batch stays"
    elif taken.micro_batch > job.batch_size:
        yield (
            f"micro-batch {taken.micro_batch}, above --batch_size's default of {job.batch_size}, within"
            f" {ROOMY_SHARE * 100:.0f} % of {_gib(cluster.gpu_memory_bytes or 0)} GiB"
        )
    clips = math.ceil(job.global_batch / cluster.world_size)
    careless = replace(job, request=replace(job.request, dropout=False))
    if job.request.dropout and clips > job.batch_size < largest_micro_batch(cluster, careless):
        yield f"micro-batches of {job.batch_size} at most, because with dropout the numbers depend on them"


def _exchange_reasons(cluster: Cluster, shape: Shape, taken: EstimatedLayout) -> Iterator[str]:
    """What gathering weights or summing gradients once a step saves and costs, and why it is not done where it is not.

    Nothing where the strategy leaves no choice.
    """
    layout = taken.layout
    ways = list(exchanges(plain(layout)))
    if layout != ways[-1]:
        done = ["weights are gathered once a step"] * layout.gathers_once
        done += ["gradients are summed once a step"] * layout.reduces_once
        saved = traffic(shape, ways[-1]).by_gpu - traffic(shape, layout).by_gpu
        cost = taken.memory.total - expected_bytes(shape, ways[-1]).total
        memory = f"for {_gib(cost)} GiB of memory" if cost >= 0.05 * GIB else "for no more memory"
        yield f"{' and '.join(done)}: {saved / 1e9:.1f} GB less for each GPU to send in a step, {memory}"
    weights, gradients = "weights are gathered for every forward and backward pass", "gradients are summed after every"
    for other, what, kept in (
        (replace(layout, gathers_once=True), weights, "keeping them"),
        (replace(layout, reduces_once=True), f"{gradients} micro-batch", "keeping whole ones"),
    ):
        if other == layout or other not in ways:
            continue
        if cluster.gpu_memory_bytes is None:
            yield f"{what}: whether {kept} would fit is not known"
        else:
            needing = replace(taken, layout=other, memory=expected_bytes(shape, other))
            yield f"{what}, because {kept} would need {_of_limit(cluster, needing)}"


def _of_limit(cluster: Cluster, estimated: EstimatedLayout) -> str:
    """What it needs of what it may take: "72.1 of 68.0 GiB (85 % of 80.0)"."""
    has = cluster.gpu_memory_bytes or 0
    share = f" ({estimated.share * 100:.0f} % of {_gib(has)})" if estimated.share < 1 else ""
    return f"{_gib(estimated.memory.total)} of {_gib(round(estimated.share * has))} GiB{share}"


def _gib(number_of_bytes: int) -> str:
    return f"{number_of_bytes / GIB:.1f}"


def _sound_reasons(cluster: Cluster, job: Job, taken: EstimatedLayout) -> Iterator[str]:
    """What was changed because sounds would not fit beside the layout that the run would have without them."""
    request = job.request
    if request.workload.samples is None:
        return
    silent = replace(request, workload=replace(request.workload, samples=None))
    fitting = tried_layouts(cluster, wanted_layouts(cluster, replace(job, request=silent)))[-1]
    layout = replace(fitting.layout, workload=request.workload)
    if layout != taken.layout:
        needed = bytes_while_sampling(job.shape, layout, request) / GIB
        yield (
            f"{layout.strategy} with micro-batch {layout.micro_batch} would fit but for the sounds of --sample_every,"
            f" for which it would need {needed:.1f} GiB"
        )


def _selection_reasons(shape: Shape, request: Request) -> Iterator[str]:
    workload = request.workload
    counts = count(shape, workload.selection)
    if not workload.selection.everything:
        yield (
            f"trained is {workload.selection.describe()}: {counts.trained / 1e6:.4g} of"
            f" {(shape.parameters + counts.added) / 1e6:.4g} M parameters"
        )
    if workload.base_bits is not None:
        yield f"{counts.in_layers / 1e6:.4g} M frozen parameters in {workload.base_bits} bits from --base_bits"
