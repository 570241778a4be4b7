"""Every layout that the flags allow on a cluster, with its expected memory, the most wanted first.

Where memory is short, a layout gives up speed in this order: what costs little is recomputed, then the micro-batch
shrinks, then whole layers are recomputed, then more is sharded.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

from trainer.errors import ConfigError
from trainer.plan.layout import Checkpointing, Layout, Precision
from trainer.plan.memory import Memory, expected_bytes
from trainer.plan.request import Request
from trainer.plan.strategies import Candidate, Cluster, candidates, is_compiled
from trainer.spec.shapes import Shape
from trainer.spec.trainable import count


@dataclass(frozen=True, kw_only=True)
class Job:
    """A model to train on any cluster, in steps of `global_batch` clips and micro-batches of at most `batch_size`."""

    shape: Shape
    request: Request
    batch_size: int
    global_batch: int


@dataclass(frozen=True, kw_only=True)
class EstimatedLayout:
    """A layout, the strategy that it has with the reason to try it, and what one process of it needs."""

    candidate: Candidate
    layout: Layout
    memory: Memory


def allowed_layouts(cluster: Cluster, job: Job) -> Iterator[EstimatedLayout]:
    """Every layout that the flags allow, whether it fits or not, the most wanted first.

    Raises ConfigError where the flags allow none on this cluster.
    """
    request = job.request
    precision, _ = precision_of(cluster, request.mixed_precision)
    count(job.shape, request.workload.selection)  # so that what this model cannot train is refused before any strategy
    splits = list(_splits(job.global_batch, cluster.world_size, job.batch_size))
    needs_compiler = request.compile == "1" or request.gradient_checkpointing == "selective"
    for candidate in candidates(cluster, job.shape, request, precision):
        if candidate.strategy == "zero3" and request.strategy == "auto" and needs_compiler:
            continue
        compiled = is_compiled(cluster, request, candidate.strategy)
        for recompute, (micro_batch, accumulation) in _fastest_first(request, compiled, splits):
            layout = Layout(
                workload=request.workload,
                strategy=candidate.strategy,
                nodes=cluster.nodes,
                world_size=cluster.world_size,
                on_gpu=cluster.device == "cuda",
                mixed_precision=precision,
                micro_batch=micro_batch,
                accumulation=accumulation,
                gradient_checkpointing=recompute,
                offload_optimizer=candidate.offload,
                compiled=compiled,
            )
            yield EstimatedLayout(candidate=candidate, layout=layout, memory=expected_bytes(job.shape, layout))


def fits(cluster: Cluster, memory: Memory) -> bool:
    """Whether the GPU, and for what is offloaded the host, has the memory; unknown memory suffices."""
    return fits_gpu(cluster, memory) and (
        cluster.host_memory_bytes is None or memory.host * cluster.gpus_per_node <= cluster.host_memory_bytes
    )


def fits_gpu(cluster: Cluster, memory: Memory) -> bool:
    """Whether the smallest GPU has the memory; unknown memory suffices."""
    return cluster.gpu_memory_bytes is None or memory.total <= cluster.gpu_memory_bytes


def precision_of(cluster: Cluster, wanted: str) -> tuple[Precision, str]:
    """The precision of the computation where `--mixed_precision` is `wanted`, and the reason in words.

    Raises ConfigError for one that the hardware has not.
    """
    if wanted == "auto":
        if cluster.device == "cuda" and cluster.supports_bf16:
            return "bf16", "bf16 because the GPU has it; weights, optimizer and loss stay float32"
        return "no", "float32 because there is no GPU with bf16"
    if wanted == "fp16" and cluster.device == "cpu":
        raise ConfigError("--mixed_precision fp16 needs a GPU: use bf16 or no")
    if wanted == "bf16" and cluster.device == "cuda" and not cluster.supports_bf16:
        raise ConfigError("--mixed_precision bf16: this GPU has no bf16; use fp16 or no")
    return wanted, f"precision {wanted} from --mixed_precision"  # type: ignore[return-value]


def _fastest_first(
    request: Request, compiled: bool, splits: Sequence[tuple[int, int]]
) -> Iterator[tuple[Checkpointing, tuple[int, int]]]:
    """What is recomputed, and how the batch is split, the fastest first.

    Selective recomputing costs a few percent of a step, half the micro-batch more than that, and recomputing whole
    layers most: measured on an H100 (docs/benchmarks.md). A typed --gradient_checkpointing leaves no choice.
    """
    if request.gradient_checkpointing or request.gradient_checkpointing_typed:
        yield from product([request.gradient_checkpointing], splits)
        return
    little: list[Checkpointing] = [False, "selective"] if compiled else [False]
    yield from ((recompute, split) for split in splits for recompute in little)
    yield from product([True], splits)


def _splits(global_batch: int, world_size: int, most: int) -> Iterator[tuple[int, int]]:
    """Micro-batch and accumulation, large micro-batches first, each as small as its accumulation allows.

    A split is left out where another, of at least half its micro-batch, computes fewer rows: 8 clips per process are
    2 x 4, not 3 x 3 with a filler.
    """
    clips = math.ceil(global_batch / world_size)  # per process
    accumulations = {math.ceil(clips / micro_batch) for micro_batch in range(1, min(most, clips) + 1)}
    splits = [(math.ceil(clips / accumulation), accumulation) for accumulation in sorted(accumulations)]
    for micro_batch, accumulation in splits:
        rows = [size * times for size, times in splits if micro_batch <= 2 * size <= 2 * micro_batch]
        if micro_batch * accumulation == min(rows):
            yield micro_batch, accumulation
