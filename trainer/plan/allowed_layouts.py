"""Every layout that the flags allow on a cluster, with its expected memory, the most wanted first.

Where memory is short, a layout gives up speed in this order: what costs little is recomputed, then the micro-batch
shrinks, then whole layers are recomputed, then more is sharded. Within one of these, weights and gradients travel
between processes as seldom as memory allows. Where the rates of the hardware are known, trainer/plan/wanted_layouts.py
puts before the first that fits what should be much faster.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product

from trainer.errors import ConfigError
from trainer.plan.communication import traffic
from trainer.plan.exchange import exchanges
from trainer.plan.layout import Checkpointing, Layout, Precision
from trainer.plan.memory import Memory, expected_bytes
from trainer.plan.request import Request
from trainer.plan.strategies import Candidate, Cluster, candidates, is_compiled
from trainer.spec.shapes import Shape
from trainer.spec.trainable import count

# Where --batch_size was not typed: the most clips of a micro-batch, which is as many as were measured on a GPU
# (docs/benchmarks.md), and the share of the GPU's memory in which more clips than --batch_size's default must fit. A
# plan's memory was within 7 % of one GPU's peak and was not measured on several, and nobody asked for these clips.
MOST_CLIPS = 16
ROOMY_SHARE = 0.85


@dataclass(frozen=True, kw_only=True)
class Job:
    """A model to train on any cluster, in steps of `global_batch` clips.

    batch_size        the most clips of a micro-batch; where it was not typed, the most that may take all memory
    batch_size_typed  whether it was
    """

    shape: Shape
    request: Request
    batch_size: int
    global_batch: int
    batch_size_typed: bool = True


@dataclass(frozen=True, kw_only=True)
class EstimatedLayout:
    """A layout, the strategy that it has with the reason to try it, and what one process of it needs.

    share   of the GPU's memory that it may take
    reason  in words, where it goes before another that would be taken by the order of allowed_layouts
    """

    candidate: Candidate
    layout: Layout
    memory: Memory
    share: float
    reason: str = ""


def allowed_layouts(cluster: Cluster, job: Job) -> Iterator[EstimatedLayout]:
    """Every layout that the flags allow, whether it fits or not, the most wanted first.

    Those that differ only in when weights and gradients travel are there if they fit, and if none does, the one of them
    that needs the least memory.

    Raises ConfigError where the flags allow none on this cluster.
    """
    request = job.request
    precision, _ = precision_of(cluster, request.mixed_precision)
    count(job.shape, request.workload.selection)  # so that what this model cannot train is refused before any strategy
    splits = list(_splits(job.global_batch, cluster.world_size, largest_micro_batch(cluster, job)))
    needs_compiler = request.compile == "1" or request.gradient_checkpointing == "selective"
    for candidate in candidates(cluster, job.shape, request, precision):
        if candidate.strategy == "zero3" and request.strategy == "auto" and needs_compiler:
            continue
        compiled = is_compiled(cluster, request, candidate.strategy)
        for recompute, (micro_batch, accumulation) in _fastest_first(request, compiled, splits):
            plain = Layout(
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
            share = 1.0 if micro_batch <= job.batch_size else ROOMY_SHARE
            ways = [
                EstimatedLayout(
                    candidate=candidate, layout=layout, memory=expected_bytes(job.shape, layout), share=share
                )
                for layout in exchanges(plain)
            ]
            yield from _by_bytes_sent(cluster, job.shape, ways)


def _by_bytes_sent(cluster: Cluster, shape: Shape, ways: Sequence[EstimatedLayout]) -> Sequence[EstimatedLayout]:
    """Of layouts that differ in when weights and gradients travel, those that fit, from the fewest bytes sent to the
    most; where none does, the one that needs the least memory.

    ways  as `exchanges` gives them. Where memory is unknown the last is taken, which keeps nothing whole
    """
    if cluster.gpu_memory_bytes is None:
        return ways[-1:]
    fitting = [one for one in ways if fits(cluster, one)]
    if not fitting:
        return [min(ways, key=lambda one: one.memory.total)]
    return sorted(fitting, key=lambda one: traffic(shape, one.layout).by_gpu) if len(fitting) > 1 else fitting


def tried_layouts(cluster: Cluster, layouts: Iterable[EstimatedLayout]) -> list[EstimatedLayout]:
    """The layouts up to the first that fits, which comes last; all of them where none does."""
    tried = []
    for estimated in layouts:
        tried.append(estimated)
        if fits(cluster, estimated):
            break
    return tried


def largest_micro_batch(cluster: Cluster, job: Job) -> int:
    """The most clips that a micro-batch may have, if they fit.

    More than --batch_size has by default where nobody typed it, the GPU's memory is known, and nothing is dropped at
    random, since numbers depend on the micro-batch then.
    """
    known = cluster.device == "cuda" and cluster.gpu_memory_bytes is not None
    if known and not job.batch_size_typed and not job.request.dropout:
        return max(job.batch_size, MOST_CLIPS)
    return job.batch_size


def fits(cluster: Cluster, estimated: EstimatedLayout) -> bool:
    """Whether its share of the GPU, and for what is offloaded the host, has the memory; unknown memory suffices."""
    return fits_gpu(cluster, estimated) and (
        cluster.host_memory_bytes is None
        or estimated.memory.host * cluster.gpus_per_node <= cluster.host_memory_bytes
    )


def fits_gpu(cluster: Cluster, estimated: EstimatedLayout) -> bool:
    """Whether its share of the smallest GPU has the memory; unknown memory suffices."""
    if cluster.gpu_memory_bytes is None:
        return True
    return estimated.memory.total <= estimated.share * cluster.gpu_memory_bytes


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
    layers most. Frames per second on an H100 (docs/benchmarks.md): large 24,800 with 9 clips and little recomputed,
    23,000 with 5 and nothing; medium 40,000 with 16 and little, 38,500 with 8 and nothing; small 142,000 and 110,000.
    Of few clips per process, the larger micro-batch is often the only one of a step, and gradients then travel once. A
    typed --gradient_checkpointing leaves no choice.
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
