"""The plan of a run on the hardware that it finds: a pure decision, made before anything is allocated."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from trainer.errors import ConfigError, MemoryShortError
from trainer.plan.allowed_layouts import Job, fits, precision_of, tried_layouts
from trainer.plan.exchange import exchange_in_words
from trainer.plan.layout import CHECKPOINTING_IN_WORDS, Checkpointing, Layout, Precision, Strategy
from trainer.plan.memory import GIB, Memory
from trainer.plan.reasons import bytes_while_sampling, filler_reasons, reasons_of
from trainer.plan.refusal import LISTEN, refusal, refusal_of_samples
from trainer.plan.request import BatchFlags, Request
from trainer.plan.strategies import Cluster
from trainer.plan.time import StepTime, step_time
from trainer.plan.wanted_layouts import wanted_layouts
from trainer.spec.shapes import Shape

# What a CPU trains in bearable time: `debug`, and models made for trying things out. `small` has four times as many.
MOST_PARAMETERS_ON_A_CPU = 100_000_000


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
        said = {"exchange": exchange_in_words(self.layout), "samples_fit": self.samples_fit}
        return {**layout, **own, **workload, **said}

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
            *self._exchange_lines(),
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

    def _exchange_lines(self) -> list[str]:
        words = exchange_in_words(self.layout)
        return [f"between processes: {words}"] if words else []

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
    job = Job(
        shape=shape,
        request=request,
        batch_size=batch.batch_size,
        batch_size_typed=batch.batch_size_typed,
        global_batch=global_batch,
    )
    tried = tried_layouts(cluster, wanted_layouts(cluster, job))
    taken = tried[-1]
    if not fits(cluster, taken):
        if message := refusal_of_samples(cluster, job):
            raise ConfigError(message)
        raise MemoryShortError(refusal(cluster, job, min(tried, key=lambda estimated: estimated.memory.total)))
    return Plan(
        layout=taken.layout,
        global_batch=global_batch,
        memory=taken.memory,
        gpu_memory_bytes=cluster.gpu_memory_bytes,
        reasons=(
            taken.candidate.reason,
            *reasons_of(cluster, job, tried),
            batch_reason,
            *filler_reasons(global_batch, taken.layout),
            precision_reason,
        ),
        sampling_bytes=bytes_while_sampling(shape, taken.layout, request),
        time=step_time(shape, taken.layout, cluster),
    )


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
