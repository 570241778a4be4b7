"""The plan of a run on the hardware that it finds: a pure decision, made before anything is allocated."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace

from trainer.errors import ConfigError, MemoryShortError
from trainer.plan.allowed_layouts import EstimatedLayout, Job, fits, precision_of
from trainer.plan.layout import Checkpointing, Layout, Precision, Strategy
from trainer.plan.memory import GIB, Memory, expected_bytes
from trainer.plan.refusal import LISTEN, refusal, refusal_of_samples
from trainer.plan.request import BatchFlags, Request
from trainer.plan.strategies import Cluster
from trainer.plan.time import StepTime, step_time
from trainer.plan.wanted_layouts import wanted_layouts
from trainer.spec.shapes import Shape
from trainer.spec.trainable import count

# What a CPU trains in bearable time: `debug`, and models made for trying things out. `small` has four times as many.
MOST_PARAMETERS_ON_A_CPU = 100_000_000
CHECKPOINTING_IN_WORDS: dict[Checkpointing, str] = {False: "off", True: "on", "selective": "selective"}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The layout, what one process of it should need, and the reason of each decision in words.

    global_batch      clips per optimizer step, of all processes together
    gpu_memory_bytes  of the smallest GPU, on CPUs what a process may use of the host's memory; None where it is unknown
    sampling_bytes    what a process needs while it makes sounds: with --sample_every it does, else it would
    time              what a full step should take; None where nothing is known of the hardware's rates
    """

    layout: Layout
    global_batch: int
    memory: Memory
    gpu_memory_bytes: int | None
    reasons: tuple[str, ...]
    sampling_bytes: int = 0
    time: StepTime | None = None

    # The layout's fields that most parts of a run read.
    @property
    def strategy(self) -> Strategy:
        return self.layout.strategy

    @property
    def nodes(self) -> int:
        return self.layout.nodes

    @property
    def world_size(self) -> int:
        return self.layout.world_size

    @property
    def micro_batch(self) -> int:
        return self.layout.micro_batch

    @property
    def accumulation(self) -> int:
        return self.layout.accumulation

    @property
    def mixed_precision(self) -> Precision:
        return self.layout.mixed_precision

    @property
    def gradient_checkpointing(self) -> Checkpointing:
        return self.layout.gradient_checkpointing

    @property
    def compiled(self) -> bool:
        return self.layout.compiled

    @property
    def offload_optimizer(self) -> bool:
        return self.layout.offload_optimizer

    @property
    def samples_fit(self) -> bool:
        """Whether sounds can be made beside the run, by --sample_every; unknown memory suffices."""
        return self.gpu_memory_bytes is None or self.sampling_bytes <= self.gpu_memory_bytes

    def to_dict(self) -> dict[str, object]:
        """All of the plan in one flat dict of JSON values, the layout's fields and its workload's among the plan's own.

        plan.json holds it, and the processes of a run compare it.
        """
        layout = asdict(self.layout)
        workload = layout.pop("workload")
        own = {name: value for name, value in asdict(self).items() if name != "layout"}
        return {**layout, **own, **workload, "samples_fit": self.samples_fit}

    def describe(self) -> str:
        """The plan as lines for the console."""
        machines = f" on {self.nodes} nodes" if self.nodes > 1 else ""
        recompute = CHECKPOINTING_IN_WORDS[self.gradient_checkpointing]
        has = "" if self.gpu_memory_bytes is None else f" of {self.gpu_memory_bytes / GIB:.1f}"
        lines = [
            f"strategy {self.strategy}{' with the optimizer offloaded' if self.offload_optimizer else ''},"
            f" {self.world_size} process(es){machines}, precision {self.mixed_precision},"
            f" activation checkpointing {recompute}{', compiled' * self.compiled}",
            f"global batch {self.global_batch} = {self.world_size} x {self.accumulation} x {self.micro_batch}"
            " (processes x accumulation x micro-batch, fillers of weight 0 included)",
            f"expected memory of each process: {self.memory.total / GIB:.1f}{has} GiB",
            f"  {self.memory.describe()}",
            *self._time_in_words(),
            f"--sample_every: {self.sampling_bytes / GIB:.1f}{has} GiB while making sounds: {self._samples_in_words()}",
        ]
        return "\n".join([*lines, *(f"  - {reason}" for reason in self.reasons)])

    def _time_in_words(self) -> list[str]:
        if self.time is not None:
            return [f"expected time of a step: {self.time.describe()}"]
        unknown = "expected time of a step: unknown, as the GPU's rates are; a dry run takes a name: --gpu_name H100"
        return [unknown] if self.layout.on_gpu else []

    def _samples_in_words(self) -> str:
        if self.gpu_memory_bytes is None:
            return "whether that fits is not known"
        return "fits" if self.samples_fit else f"does not fit; of a checkpoint, {LISTEN} makes them"


def make_plan(
    cluster: Cluster,
    shape: Shape,
    batch: BatchFlags,
    request: Request,
    resumed_global_batch: int | None = None,
) -> Plan:
    """The plan for this cluster, model and these flags: of the layouts that fit, the most wanted.

    A resumed run keeps the checkpoint's global batch; micro-batch and accumulation are derived anew.

    Raises ConfigError where flags contradict each other, the checkpoint or the hardware, or where the run fits and the
    sounds of --sample_every do not, MemoryShortError where nothing that the flags allow fits the GPUs.
    """
    _refuse_unasked_cpu(cluster, shape, request)
    global_batch, batch_reason = _global_batch(cluster, batch, resumed_global_batch)
    _, precision_reason = precision_of(cluster, request.mixed_precision)
    job = Job(shape=shape, request=request, batch_size=batch.batch_size, global_batch=global_batch)
    allowed = wanted_layouts(cluster, job)
    taken = next((estimated for estimated in allowed if fits(cluster, estimated.memory)), None)
    if taken is None:
        if message := refusal_of_samples(cluster, job):
            raise ConfigError(message)
        raise MemoryShortError(refusal(cluster, job, min(allowed, key=lambda estimated: estimated.memory.total)))
    return Plan(
        layout=taken.layout,
        global_batch=global_batch,
        memory=taken.memory,
        gpu_memory_bytes=cluster.gpu_memory_bytes,
        reasons=(
            taken.candidate.reason,
            *_compile_reasons(cluster, request, taken.layout),
            *_memory_reasons(cluster, request, allowed[0], taken),
            *_sound_reasons(cluster, job, taken),
            *_selection_reasons(shape, request),
            batch_reason,
            *_filler_reasons(global_batch, taken.layout),
            precision_reason,
        ),
        sampling_bytes=_sampling_bytes(shape, taken.layout, request),
        time=step_time(shape, taken.layout, cluster),
    )


def _sampling_bytes(shape: Shape, layout: Layout, request: Request) -> int:
    """What a process of this layout needs while it makes sounds, its reserve included."""
    workload = replace(layout.workload, samples=request.samples)
    memory = expected_bytes(shape, replace(layout, workload=workload))
    return memory.samples + memory.reserve


def _refuse_unasked_cpu(cluster: Cluster, shape: Shape, request: Request) -> None:
    """Raise ConfigError where a run that nobody meant for a CPU would be on one, and take days there."""
    if cluster.device == "cuda" or request.device == "cpu":
        return
    why = cluster.unused_gpu or "torch finds no NVIDIA GPU in this machine"
    if request.device == "cuda":
        raise ConfigError(f"--device cuda: {why}")
    if shape.parameters > MOST_PARAMETERS_ON_A_CPU:
        raise ConfigError(
            f"{shape.name} has {shape.parameters / 1e6:.0f} million parameters and would be trained on the CPU, where a"
            f" step takes minutes: {why}. To train it on the CPU all the same, add --device cpu"
        )


def _global_batch(cluster: Cluster, batch: BatchFlags, resumed: int | None) -> tuple[int, str]:
    """Clips per optimizer step, and where the number comes from in words."""
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


def _compile_reasons(cluster: Cluster, request: Request, layout: Layout) -> Iterator[str]:
    if layout.compiled:
        yield f"layers are compiled from --compile {request.compile}: the first step takes up to a minute longer"
    elif cluster.device == "cuda" and request.compile == "auto" and not cluster.compiles:
        yield "layers are not compiled: torch.compile does not work here; steps take about a tenth longer"


def _memory_reasons(
    cluster: Cluster, request: Request, wanted: EstimatedLayout, taken: EstimatedLayout
) -> Iterator[str]:
    """What was changed because memory is short, and what the most wanted layout would have needed."""
    if cluster.gpu_memory_bytes is None:
        yield "nothing is refused for memory, because the device's is unknown"
    elif wanted is not taken:
        yield (
            f"{wanted.layout.strategy} with micro-batch {wanted.layout.micro_batch}"
            f"{'' if wanted.layout.gradient_checkpointing else ' and no checkpointing'} would take"
            f" {wanted.memory.total / GIB:.1f} of {cluster.gpu_memory_bytes / GIB:.1f} GiB"
        )
    if taken.layout.micro_batch < wanted.layout.micro_batch:
        yield f"micro-batch {taken.layout.micro_batch} because memory is short; the global batch stays"
    if request.gradient_checkpointing:
        yield "activation checkpointing from --gradient_checkpointing"
    elif taken.layout.gradient_checkpointing:
        longer = "some percent" if taken.layout.gradient_checkpointing == "selective" else "about a third"
        yield f"activation checkpointing because memory is short: steps take {longer} longer"


def _sound_reasons(cluster: Cluster, job: Job, taken: EstimatedLayout) -> Iterator[str]:
    """What was changed because sounds would not fit beside the layout that the run would have without them."""
    request = job.request
    if request.workload.samples is None:
        return
    silent = replace(request, workload=replace(request.workload, samples=None))
    layouts = wanted_layouts(cluster, replace(job, request=silent))
    layout = replace(next(one.layout for one in layouts if fits(cluster, one.memory)), workload=request.workload)
    if layout != taken.layout:
        needed = _sampling_bytes(job.shape, layout, request) / GIB
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


def _filler_reasons(global_batch: int, layout: Layout) -> Iterator[str]:
    fillers = layout.world_size * layout.accumulation * layout.micro_batch - global_batch
    if fillers:
        yield f"{fillers} filler rows of weight 0 per step, because {global_batch} clips do not split evenly"
