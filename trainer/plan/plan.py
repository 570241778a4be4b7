"""How a run is laid out on the hardware it finds: a pure decision, made before anything is allocated.

Where memory is short, first what costs little is recomputed, then the micro-batch shrinks, then whole layers are
recomputed, then more is sharded; what still does not fit is refused, with what would.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product

from trainer.errors import ConfigError, MemoryShortError
from trainer.plan.memory import GIB, Checkpointing, Layout, Memory, Precision, Strategy, expected_bytes
from trainer.plan.request import BatchFlags, Options
from trainer.plan.strategies import Candidate, Cluster, candidates, is_compiled
from trainer.spec.shapes import FRAME_RATE_HZ, Shape
from trainer.spec.trainable import count, selection_of

MOST_GPUS_SUGGESTED = 64
SECONDS_SUGGESTED = (20, 15, 10, 5)
RANK_SUGGESTED = 16
CHECKPOINTING: dict[Checkpointing, str] = {False: "off", True: "on", "selective": "selective"}


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
    gradient_checkpointing: Checkpointing
    compiled: bool
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
            f" activation checkpointing {CHECKPOINTING[self.gradient_checkpointing]}{', compiled' * self.compiled}",
            f"global batch {self.global_batch} = {self.world_size} x {self.accumulation} x {self.micro_batch}"
            " (processes x accumulation x micro-batch, fillers of weight 0 included)",
            f"expected memory of each process: {self.memory.total / GIB:.1f}{has} GiB",
            f"  {self.memory.describe()}",
        ]
        return "\n".join([*lines, *(f"  - {reason}" for reason in self.reasons)])


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
    wish = _Wish(shape=shape, batch_size=batch.batch_size, global_batch=global_batch, options=options)
    trials = list(_trials(cluster, wish, precision))
    taken = next((trial for trial in trials if _fits(cluster, trial.memory)), None)
    if taken is None:
        raise MemoryShortError(_refusal(cluster, wish, min(trials, key=lambda trial: trial.memory.total)))
    layout = taken.layout
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
        compiled=layout.compiled,
        memory=taken.memory,
        gpu_memory_bytes=cluster.gpu_memory_bytes,
        reasons=(
            taken.candidate.reason,
            *_compile_reasons(cluster, options, layout),
            *_memory_reasons(cluster, options, trials[0], taken),
            *_selection_reasons(shape, options),
            batch_reason,
            *_filler_reasons(cluster, global_batch, layout),
            precision_reason,
        ),
    )


@dataclass(frozen=True, kw_only=True)
class _Wish:
    """What is to be trained, whatever the cluster."""

    shape: Shape
    batch_size: int
    global_batch: int
    options: Options


@dataclass(frozen=True, kw_only=True)
class _Trial:
    """One layout, why it is tried, and what it costs."""

    candidate: Candidate
    layout: Layout
    memory: Memory


def _trials(cluster: Cluster, wish: _Wish, precision: Precision) -> Iterator[_Trial]:
    """Every layout that the flags allow, the most wanted first."""
    options = wish.options
    counts = count(wish.shape, options.selection)
    splits = list(_splits(wish.global_batch, cluster.world_size, wish.batch_size))
    needs_compiler = options.compile == "1" or options.gradient_checkpointing == "selective"
    for candidate in candidates(cluster, wish.shape, options, precision):
        if candidate.strategy == "zero3" and options.strategy == "auto" and needs_compiler:
            continue
        compiled = is_compiled(cluster, options, candidate.strategy)
        for recompute, (micro_batch, accumulation) in _ways(options, compiled, splits):
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
                counts=counts,
                averages=options.averages,
                eight_bit=options.eight_bit,
                base_bits=options.base_bits,
                compiled=compiled,
            )
            yield _Trial(candidate=candidate, layout=layout, memory=expected_bytes(wish.shape, layout))


def _ways(
    options: Options, compiled: bool, splits: Sequence[tuple[int, int]]
) -> Iterator[tuple[Checkpointing, tuple[int, int]]]:
    """What is recomputed, and how the batch is split, the fastest first (measured on an H100, docs/benchmarks.md).

    Selective recomputing costs a few percent, half the micro-batch more than that, and recomputing whole layers most.
    """
    if options.gradient_checkpointing or options.gradient_checkpointing_typed:
        yield from product([options.gradient_checkpointing], splits)
        return
    little: list[Checkpointing] = [False, "selective"] if compiled else [False]
    yield from ((recompute, split) for split in splits for recompute in little)
    yield from product([True], splits)


def _splits(global_batch: int, world_size: int, most: int) -> Iterator[tuple[int, int]]:
    """Micro-batch and accumulation, large micro-batches first, each as small as its accumulation allows.

    One is left out where another of at least half its size computes fewer rows: 8 clips a process are
    2 x 4, not 3 x 3 with a filler.
    """
    share = math.ceil(global_batch / world_size)
    accumulations = {math.ceil(share / micro_batch) for micro_batch in range(1, min(most, share) + 1)}
    splits = [(math.ceil(share / accumulation), accumulation) for accumulation in sorted(accumulations)]
    for micro_batch, accumulation in splits:
        rows = [size * times for size, times in splits if micro_batch <= 2 * size <= 2 * micro_batch]
        if micro_batch * accumulation == min(rows):
            yield micro_batch, accumulation


def _fits(cluster: Cluster, memory: Memory) -> bool:
    """Whether the GPU, and for what is offloaded the host, has the memory; unknown memory suffices."""
    return _fits_gpu(cluster, memory) and (
        cluster.host_memory_bytes is None or memory.host * cluster.gpus_per_node <= cluster.host_memory_bytes
    )


def _fits_gpu(cluster: Cluster, memory: Memory) -> bool:
    return cluster.gpu_memory_bytes is None or memory.total <= cluster.gpu_memory_bytes


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
        longer = "some percent" if taken.layout.gradient_checkpointing == "selective" else "about a third"
        yield f"activation checkpointing because memory is short: steps take {longer} longer"


def _compile_reasons(cluster: Cluster, options: Options, layout: Layout) -> Iterator[str]:
    if layout.compiled:
        yield f"layers are compiled from --compile {options.compile}: the first step takes up to a minute longer"
    elif cluster.device == "cuda" and options.compile == "auto" and not cluster.compiles:
        yield "layers are not compiled: torch.compile does not work here; steps take about a tenth longer"


def _selection_reasons(shape: Shape, options: Options) -> Iterator[str]:
    counts = count(shape, options.selection)
    if not options.selection.everything:
        yield (
            f"trained is {options.selection.describe()}: {counts.trained / 1e6:.4g} of"
            f" {(shape.parameters + counts.added) / 1e6:.4g} M parameters"
        )
    if options.base_bits is not None:
        yield f"{counts.in_layers / 1e6:.4g} M frozen parameters in {options.base_bits} bits from --base_bits"


def _filler_reasons(cluster: Cluster, global_batch: int, layout: Layout) -> Iterator[str]:
    fillers = cluster.world_size * layout.accumulation * layout.micro_batch - global_batch
    if fillers:
        yield f"{fillers} filler rows of weight 0 a step, because {global_batch} clips do not split evenly"


def _refusal(cluster: Cluster, wish: _Wish, least: _Trial) -> str:
    """What does not fit, by part, and each single change with which there is a plan."""
    if _fits_gpu(cluster, least.memory):
        needed = least.memory.host * cluster.gpus_per_node / GIB
        lack = f"offloading needs {needed:.1f} GiB of host memory, and a node has {_gib(cluster.host_memory_bytes)}"
    else:
        lack = f"at the least it needs {_gib(least.memory.total)} of {_gib(cluster.gpu_memory_bytes)} GiB a GPU"
    layout = least.layout
    tried = f"{layout.strategy}{' with offload' if layout.offload_optimizer else ''}, micro-batch {layout.micro_batch}"
    checkpointing = "with" if layout.gradient_checkpointing else "without"
    changes = "; or ".join(_changes(cluster, wish)) or "only larger GPUs"
    return (
        f"{wish.shape.name} does not fit {cluster.world_size} GPU(s): {lack} ({tried}, {checkpointing} activation"
        f" checkpointing: {least.memory.describe()}). What would fit: {changes}"
    )


def _changes(cluster: Cluster, wish: _Wish) -> Iterator[str]:
    """Single changes of flags or hardware under which there is a plan, in words."""
    options = wish.options
    if options.gradient_checkpointing_typed and _works(cluster, wish, gradient_checkpointing=True):
        yield "--gradient_checkpointing 1"
    if options.strategy != "auto" and _works(cluster, wish, strategy="auto"):
        yield "--strategy auto"
    if not options.offload_optimizer and _works(cluster, wish, offload_optimizer=True, strategy="auto"):
        yield f"--offload_optimizer 1{'' if options.strategy == 'auto' else ' --strategy auto'}"
    adapters = selection_of(lora_rank=RANK_SUGGESTED)
    if options.selection.everything and _works(cluster, wish, selection=adapters):
        yield f"--lora_rank {RANK_SUGGESTED}, which trains adapters alone"
    elif options.selection.everything and _works(cluster, wish, selection=adapters, base_bits=4):
        yield f"--lora_rank {RANK_SUGGESTED} --base_bits 4, which trains adapters beside a base of 4 bits"
    frozen = options.selection.lora or options.selection.new_rows
    if frozen and options.base_bits != 4 and _works(cluster, wish, base_bits=4):
        yield "--base_bits 4"
    if cluster.world_size == 1 and not options.eight_bit and _works(cluster, wish, eight_bit=True, strategy="auto"):
        yield "--optimizer adamw8bit"
    if options.averages and _works(cluster, wish, averages=False):
        yield "no --ema_decay"
    for seconds in SECONDS_SUGGESTED:
        frames = seconds * FRAME_RATE_HZ
        if frames < options.segment_frames and _works(cluster, wish, segment_frames=frames):
            yield f"--segment_seconds {seconds}"
            break
    strategy = "auto" if options.strategy == "single" else options.strategy
    for gpus in range(cluster.world_size + 1, MOST_GPUS_SUGGESTED + 1):
        more = replace(cluster, nodes=1, gpus_per_node=gpus, host_memory_bytes=None)
        if _works(more, wish, strategy=strategy):
            yield f"{gpus} such GPUs"
            break


def _works(cluster: Cluster, wish: _Wish, **changes: object) -> bool:
    """Whether there is a plan with these fields of the options changed."""
    changed = replace(wish, options=replace(wish.options, **changes))  # type: ignore[arg-type]
    try:
        precision, _ = _precision(cluster, changed.options.mixed_precision)
        return any(_fits(cluster, trial.memory) for trial in _trials(cluster, changed, precision))
    except ConfigError:
        return False


def _gib(count: int | None) -> str:
    return "unknown" if count is None else f"{count / GIB:.1f}"


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
