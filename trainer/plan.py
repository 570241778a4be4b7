"""How a run is laid out on the hardware it finds: a pure decision, made before anything is allocated.

A strategy comes from its name or from the model's size. Where memory is short, first the micro-batch
shrinks, then activations are recomputed, then more is sharded; what still does not fit is refused, with
what would.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Literal

from trainer.errors import ConfigError, MemoryShortError
from trainer.memory import GIB, Layout, Memory, Precision, Strategy, expected_bytes
from trainer.shapes import FRAME_RATE_HZ, Shape

# Above this many parameters a copy of the weights on every GPU is too much: between medium and large.
FULL_SHARD_PARAMETERS = 2_500_000_000
DEEPSPEED: tuple[Strategy, ...] = ("zero2", "zero3")
FP16: tuple[Strategy, ...] = ("single", "ddp")
MOST_GPUS_SUGGESTED = 64


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """What a run has to work with; on a CPU, `gpus_per_node` counts processes.

    gpu_memory_bytes   of the smallest GPU; None where it is unknown or a CPU: nothing is refused then
    host_memory_bytes  of a node; None for unknown
    """

    nodes: int
    gpus_per_node: int
    device: Literal["cpu", "cuda"]
    gpu_memory_bytes: int | None
    host_memory_bytes: int | None
    supports_bf16: bool

    @property
    def world_size(self) -> int:
        return self.nodes * self.gpus_per_node


@dataclass(frozen=True, kw_only=True)
class BatchFlags:
    """The batch flags as given; a flag that was not typed may give way to one that was."""

    batch_size: int
    grad_acc: int
    global_batch: int | None
    grad_acc_typed: bool


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the user asks of the layout.

    strategy_named_by       what named it, in words; no meaning for auto
    segment_frames          frames of the longest crop
    deepspeed_available     whether it is installed where the run will be
    """

    strategy: Literal["auto"] | Strategy = "auto"
    strategy_named_by: str = "--strategy"
    offload_optimizer: bool = False
    offload_optimizer_typed: bool = False
    mixed_precision: Literal["auto"] | Precision = "auto"
    gradient_checkpointing: bool = False
    gradient_checkpointing_typed: bool = False
    segment_frames: int
    deepspeed_available: bool = True


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The layout, what it should cost, and the reason of each part in words."""

    strategy: Strategy
    nodes: int
    world_size: int
    offload_optimizer: bool
    global_batch: int
    micro_batch: int
    accumulation: int
    mixed_precision: Precision
    gradient_checkpointing: bool
    memory: Memory
    gpu_memory_bytes: int | None
    reasons: tuple[str, ...]

    def to_dict(self) -> dict[str, object]:
        return asdict(self)

    def describe(self) -> str:
        """The plan as lines for the console."""
        machines = f" on {self.nodes} nodes" if self.nodes > 1 else ""
        has = "" if self.gpu_memory_bytes is None else f" of {self.gpu_memory_bytes / GIB:.1f}"
        lines = [
            f"strategy {self.strategy}{' with the optimizer offloaded' if self.offload_optimizer else ''},"
            f" {self.world_size} process(es){machines}, precision {self.mixed_precision},"
            f" activation checkpointing {'on' if self.gradient_checkpointing else 'off'}",
            f"global batch {self.global_batch} = {self.world_size} x {self.accumulation} x {self.micro_batch}"
            " (processes x accumulation x micro-batch, fillers of weight 0 included)",
            f"expected memory of each process: {self.memory.total / GIB:.1f}{has} GiB",
            f"  {self.memory.describe()}",
        ]
        return "\n".join([*lines, *(f"  - {reason}" for reason in self.reasons)])


@dataclass(frozen=True, kw_only=True)
class _Candidate:
    """A strategy that may be taken, and why."""

    strategy: Strategy
    offload: bool
    reason: str


@dataclass(frozen=True, kw_only=True)
class _Trial:
    """One layout and what it costs."""

    candidate: _Candidate
    layout: Layout
    memory: Memory


def make_plan(
    cluster: Cluster,
    shape: Shape,
    batch: BatchFlags,
    options: Options,
    resumed_global_batch: int | None = None,
) -> Plan:
    """The plan for this cluster, model and these flags.

    A resumed run keeps the checkpoint's global batch; micro-batch and accumulation are derived anew.

    Raises ConfigError where flags contradict each other, the checkpoint or the hardware, MemoryShortError
    where nothing that the flags allow fits the GPUs.
    """
    global_batch, batch_reason = _global_batch(cluster, batch, resumed_global_batch)
    precision, precision_reason = _precision(cluster, options.mixed_precision)
    candidates = _candidates(cluster, shape, options, precision)
    first: _Trial | None = None
    for trial in _trials(cluster, shape, batch, options, global_batch, precision, candidates):
        first = first or trial
        if _fits(cluster, trial.memory):
            break
    else:
        raise MemoryShortError(_refusal(cluster, shape, batch, options, global_batch, trial.memory))
    assert first is not None
    layout = trial.layout
    return Plan(
        strategy=layout.strategy,
        nodes=cluster.nodes,
        world_size=cluster.world_size,
        offload_optimizer=layout.offload_optimizer,
        global_batch=global_batch,
        micro_batch=layout.micro_batch,
        accumulation=layout.accumulation,
        mixed_precision=precision,
        gradient_checkpointing=layout.gradient_checkpointing,
        memory=trial.memory,
        gpu_memory_bytes=cluster.gpu_memory_bytes,
        reasons=(
            trial.candidate.reason,
            *_memory_reasons(cluster, options, first, trial),
            batch_reason,
            *_filler_reasons(cluster, global_batch, layout),
            precision_reason,
        ),
    )


def _candidates(cluster: Cluster, shape: Shape, options: Options, precision: Precision) -> list[_Candidate]:
    """The strategies to try in order, each sharding more than the one before."""
    if options.offload_optimizer and cluster.device == "cpu":
        raise ConfigError("--offload_optimizer 1 has no effect on a CPU: its optimizer is in host memory anyway")
    if options.strategy != "auto":
        return [_named(cluster, options, precision, options.strategy)]
    return _of_one_process(cluster, options, precision) if cluster.world_size == 1 else _of_several(
        cluster, shape, options, precision
    )


def _named(cluster: Cluster, options: Options, precision: Precision, strategy: Strategy) -> _Candidate:
    named, world_size = f"{strategy}, named by {options.strategy_named_by},", cluster.world_size
    if strategy == "single" and world_size > 1:
        raise ConfigError(f"{named} is for one process, and {world_size} were started: use ddp, zero2 or fsdp")
    if strategy == "hsdp" and world_size == 1:
        raise ConfigError(f"{named} shards over the GPUs of a node, and there is one process: use single or fsdp")
    if strategy in DEEPSPEED and not options.deepspeed_available:
        raise ConfigError(f"{named} needs DeepSpeed, which is not installed: pip install deepspeed, or use fsdp")
    if precision == "fp16" and strategy not in FP16:
        raise ConfigError(f"{named} does not run in fp16: use --mixed_precision bf16 or no, or --strategy ddp")
    if options.offload_optimizer and strategy not in DEEPSPEED:
        raise ConfigError(f"{named} cannot offload the optimizer: use zero2 or zero3, or --offload_optimizer 0")
    alone = "; on one node the same as fsdp" if strategy == "hsdp" and cluster.nodes == 1 else ""
    reason = f"strategy {strategy} from {options.strategy_named_by}{alone}"
    return _Candidate(strategy=strategy, offload=options.offload_optimizer, reason=reason)


def _of_one_process(cluster: Cluster, options: Options, precision: Precision) -> list[_Candidate]:
    if options.offload_optimizer:
        _refuse_offload_without(options, precision)
        return [_Candidate(strategy="zero2", offload=True, reason="zero2 on one GPU, because it can offload")]
    single = _Candidate(strategy="single", offload=False, reason="one process: nothing is sharded")
    may_offload = cluster.device == "cuda" and options.deepspeed_available and precision != "fp16"
    if options.offload_optimizer_typed or not may_offload:
        return [single]
    reason = "the optimizer is offloaded because memory is short, by zero2, which can do it on one GPU"
    return [single, _Candidate(strategy="zero2", offload=True, reason=reason)]


def _of_several(cluster: Cluster, shape: Shape, options: Options, precision: Precision) -> list[_Candidate]:
    size = f"{shape.parameters / 1e9:.2f} B parameters on {cluster.world_size} processes"
    if options.offload_optimizer:
        _refuse_offload_without(options, precision)
        reason = "because it can offload"
        return [_Candidate(strategy=name, offload=True, reason=f"{name}, {reason}") for name in DEEPSPEED]
    if precision == "fp16":
        return [_Candidate(strategy="ddp", offload=False, reason="ddp, the one strategy on several GPUs with fp16")]
    if shape.parameters > FULL_SHARD_PARAMETERS:
        return [_Candidate(strategy="fsdp", offload=False, reason=f"{size}: fsdp, every part sharded")]
    if not options.deepspeed_available:
        return [_Candidate(strategy="fsdp", offload=False, reason=f"{size}: fsdp, as DeepSpeed is not installed")]
    return [
        _Candidate(strategy="zero2", offload=False, reason=f"{size}: zero2, gradients and optimizer sharded"),
        _Candidate(strategy="fsdp", offload=False, reason=f"{size}: fsdp, because zero2 does not fit"),
    ]


def _refuse_offload_without(options: Options, precision: Precision) -> None:
    if not options.deepspeed_available:
        raise ConfigError("--offload_optimizer 1 needs DeepSpeed, which is not installed: pip install deepspeed")
    if precision == "fp16":
        raise ConfigError("--offload_optimizer 1 does not run in fp16: use --mixed_precision bf16 or no")


def _trials(
    cluster: Cluster,
    shape: Shape,
    batch: BatchFlags,
    options: Options,
    global_batch: int,
    precision: Precision,
    candidates: list[_Candidate],
) -> Iterator[_Trial]:
    """Every layout that the flags allow, the most wanted first."""
    checkpointing = [options.gradient_checkpointing]
    if checkpointing == [False] and not options.gradient_checkpointing_typed:
        checkpointing.append(True)
    for candidate in candidates:
        for recompute in checkpointing:
            for micro_batch, accumulation in _splits(global_batch, cluster.world_size, batch.batch_size):
                layout = Layout(
                    strategy=candidate.strategy,
                    shards=cluster.gpus_per_node if candidate.strategy == "hsdp" else cluster.world_size,
                    precision=precision,
                    micro_batch=micro_batch,
                    accumulation=accumulation,
                    frames=options.segment_frames,
                    gradient_checkpointing=recompute,
                    offload_optimizer=candidate.offload,
                    on_gpu=cluster.device == "cuda",
                )
                yield _Trial(candidate=candidate, layout=layout, memory=expected_bytes(shape, layout))


def _splits(global_batch: int, world_size: int, most: int) -> Iterator[tuple[int, int]]:
    """Micro-batch and accumulation, large micro-batches first, each with as few fillers as its accumulation allows."""
    share = math.ceil(global_batch / world_size)
    micro_batch = min(most, share)
    while micro_batch >= 1:
        accumulation = math.ceil(share / micro_batch)
        micro_batch = math.ceil(share / accumulation)
        yield micro_batch, accumulation
        micro_batch -= 1


def _fits(cluster: Cluster, memory: Memory) -> bool:
    """Whether the GPU, and for what is offloaded the host, has the memory; unknown memory suffices."""
    host = cluster.host_memory_bytes
    on_gpu = cluster.gpu_memory_bytes is None or memory.total <= cluster.gpu_memory_bytes
    return on_gpu and (host is None or memory.host * cluster.gpus_per_node <= host)


def _memory_reasons(cluster: Cluster, options: Options, first: _Trial, taken: _Trial) -> Iterator[str]:
    """What was changed because memory is short, and what the first wish would have taken."""
    if cluster.gpu_memory_bytes is None:
        where = "on a CPU" if cluster.device == "cpu" else "because the GPU's memory is unknown"
        yield f"nothing is refused for memory {where}"
    elif first is not taken:
        yield (
            f"{first.layout.strategy} with micro-batch {first.layout.micro_batch}"
            f"{'' if first.layout.gradient_checkpointing else ' and no checkpointing'} would take"
            f" {first.memory.total / GIB:.1f} of {cluster.gpu_memory_bytes / GIB:.1f} GiB"
        )
    if taken.layout.micro_batch < first.layout.micro_batch:
        yield f"micro-batch {taken.layout.micro_batch} because memory is short; the global batch stays"
    if options.gradient_checkpointing:
        yield "activation checkpointing from --gradient_checkpointing"
    elif taken.layout.gradient_checkpointing:
        yield "activation checkpointing because memory is short: steps take about a third longer"


def _filler_reasons(cluster: Cluster, global_batch: int, layout: Layout) -> Iterator[str]:
    fillers = cluster.world_size * layout.accumulation * layout.micro_batch - global_batch
    if fillers:
        yield f"{fillers} filler rows of weight 0 a step, because {global_batch} clips do not split evenly"


def _refusal(
    cluster: Cluster, shape: Shape, batch: BatchFlags, options: Options, global_batch: int, least: Memory
) -> str:
    """What does not fit by part, and each single change that makes it fit."""
    assert cluster.gpu_memory_bytes is not None or cluster.host_memory_bytes is not None
    if cluster.gpu_memory_bytes is None or least.total <= cluster.gpu_memory_bytes:
        given = f"{(cluster.host_memory_bytes or 0) / GIB:.1f} GiB of host memory"
        needed = f"{least.host * cluster.gpus_per_node / GIB:.1f}"
    else:
        given, needed = f"a GPU of {cluster.gpu_memory_bytes / GIB:.1f} GiB", f"{least.total / GIB:.1f}"
    changes = list(_changes(cluster, shape, batch, options, global_batch))
    return (
        f"{shape.name} does not fit {given} on {cluster.world_size} GPU(s): with micro-batch 1 it needs {needed}"
        f" GiB ({least.describe()}). What would fit: {'; or '.join(changes) if changes else 'larger GPUs'}"
    )


def _changes(
    cluster: Cluster, shape: Shape, batch: BatchFlags, options: Options, global_batch: int
) -> Iterator[str]:
    """Single changes of flags or hardware under which there is a plan, in words."""

    def works(changed: Options, on: Cluster = cluster) -> bool:
        try:
            make_plan(on, shape, batch, changed, global_batch)
        except (ConfigError, MemoryShortError):
            return False
        return True

    if options.gradient_checkpointing_typed and not options.gradient_checkpointing:
        recomputing = replace(options, gradient_checkpointing=True)
        if works(recomputing):
            yield "--gradient_checkpointing 1"
    if options.strategy != "auto":
        automatic = replace(options, strategy="auto")
        if works(automatic):
            yield "--strategy auto"
    offloading = replace(options, offload_optimizer=True, offload_optimizer_typed=True, strategy="auto")
    if not options.offload_optimizer and works(offloading):
        yield f"--offload_optimizer 1{'' if options.strategy == 'auto' else ' --strategy auto'}"
    seconds = [s for s in (20, 15, 10, 5) if s * FRAME_RATE_HZ < options.segment_frames]
    for less in seconds:
        if works(replace(options, segment_frames=less * FRAME_RATE_HZ)):
            yield f"--segment_seconds {less}"
            break
    gpus = _gpus_that_fit(cluster, options, works)
    if gpus is not None:
        yield f"{gpus} such GPUs"


def _gpus_that_fit(cluster: Cluster, options: Options, works: Works) -> int | None:
    """The least number of GPUs in all, more than now, on which there is a plan; None up to the most suggested."""
    strategy = "auto" if options.strategy == "single" else options.strategy
    for gpus in range(cluster.world_size + 1, MOST_GPUS_SUGGESTED + 1):
        more = replace(cluster, nodes=1, gpus_per_node=gpus, host_memory_bytes=None)
        if works(replace(options, strategy=strategy), more):
            return gpus
    return None


def _global_batch(cluster: Cluster, batch: BatchFlags, resumed: int | None) -> tuple[int, str]:
    product = batch.batch_size * batch.grad_acc * cluster.world_size
    if batch.global_batch is not None and batch.grad_acc_typed and batch.global_batch != product:
        raise ConfigError(
            f"--global_batch {batch.global_batch} contradicts --batch_size {batch.batch_size} x --grad_acc"
            f" {batch.grad_acc} x {cluster.world_size} process(es) = {product}: leave out --grad_acc"
        )
    if resumed is not None:
        if batch.global_batch is not None and batch.global_batch != resumed:
            raise ConfigError(
                f"--global_batch {batch.global_batch} contradicts the checkpoint's {resumed}:"
                " leave it out to resume, or choose another --output_dir"
            )
        return resumed, f"global batch {resumed} from the checkpoint"
    if batch.global_batch is not None:
        return batch.global_batch, f"global batch {batch.global_batch} from --global_batch"
    processes = f" x {cluster.world_size} processes" if cluster.world_size > 1 else ""
    return product, (
        f"global batch {product} = --batch_size {batch.batch_size} x --grad_acc {batch.grad_acc}{processes}"
    )


def _precision(cluster: Cluster, wanted: str) -> tuple[Precision, str]:
    if wanted == "auto":
        if cluster.device == "cuda" and cluster.supports_bf16:
            return "bf16", "bf16 because the GPU has it; weights, optimizer and loss stay float32"
        return "no", "float32 because there is no GPU with bf16"
    if wanted == "fp16" and cluster.device == "cpu":
        raise ConfigError("--mixed_precision fp16 needs a GPU: use bf16 or no")
    if wanted == "bf16" and cluster.device == "cuda" and not cluster.supports_bf16:
        raise ConfigError("--mixed_precision bf16: this GPU has no bf16; use fp16 or no")
    return wanted, f"precision {wanted} from --mixed_precision"  # type: ignore[return-value]
