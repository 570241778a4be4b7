"""What a refused run is told: what does not fit, by part, and each single change with which there is a plan."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from trainer.errors import ConfigError
from trainer.plan.allowed_layouts import EstimatedLayout, Job, allowed_layouts, fits, fits_gpu
from trainer.plan.host_memory import bytes_of_a_process
from trainer.plan.layout import Samples
from trainer.plan.memory import GIB, expected_bytes
from trainer.plan.request import Request
from trainer.plan.strategies import Cluster
from trainer.spec.shapes import FRAME_RATE_HZ, KNOWN, Shape
from trainer.spec.trainable import selection_of

MOST_GPUS_SUGGESTED = 64
SECONDS_SUGGESTED = (20, 15, 10, 5)
RANK_SUGGESTED = 16
LISTEN = "python scripts/generate.py --model OUTPUT_DIR/checkpoints/step-N --prompt TEXT"


def refusal(cluster: Cluster, job: Job, least: EstimatedLayout) -> str:
    """The message of a run of which no layout fits; `least` is the one that needs the least GPU memory."""
    if fits_gpu(cluster, least):
        needed = least.memory.host * cluster.gpus_per_node / GIB
        lack = f"offloading needs {needed:.1f} GiB of host memory, and a node has {_gib(cluster.host_memory_bytes)}"
    elif cluster.device == "cpu":
        lack = (
            f"at the least a process needs {_gib(least.memory.total)} GiB, and may use {_gib(cluster.gpu_memory_bytes)}"
            f" of the {_gib(cluster.host_memory_bytes)} GiB of host memory"
        )
    else:
        lack = f"at the least it needs {_gib(least.memory.total)} of {_gib(cluster.gpu_memory_bytes)} GiB a GPU"
    layout = least.layout
    tried = f"{layout.strategy}{' with offload' if layout.offload_optimizer else ''}, micro-batch {layout.micro_batch}"
    checkpointing = "with" if layout.gradient_checkpointing else "without"
    if cluster.device == "cpu":
        where, larger = f"{cluster.world_size} process(es) on CPUs", "only more memory"
        changes = [*_changes_of_flags(cluster, job), *_fewer_processes(cluster, job), *_smaller_models(cluster, job)]
    else:
        where, larger = f"{cluster.world_size} GPU(s)", "only larger GPUs"
        changes = [*_changes_of_flags(cluster, job), *_more_gpus(cluster, job)]
    return (
        f"{job.shape.name} does not fit {where}: {lack} ({tried}, {checkpointing} activation"
        f" checkpointing: {least.memory.describe()}). What would fit: {'; or '.join(changes) or larger}"
    )


def refusal_of_samples(cluster: Cluster, job: Job) -> str:
    """The message of a run that fits but for the sounds of --sample_every; empty where something else is in the way."""
    request, samples = job.request, job.request.workload.samples
    if samples is None:
        return ""
    silent = allowed_layouts(cluster, replace(job, request=_with_samples(request, None)))
    fitting = [estimated.layout for estimated in silent if fits(cluster, estimated)]
    if not fitting:
        return ""
    with_sounds = [expected_bytes(job.shape, replace(layout, workload=request.workload)) for layout in fitting]
    needed = min(memory.samples + memory.reserve for memory in with_sounds)
    shorter = [seconds for seconds in SECONDS_SUGGESTED if seconds * FRAME_RATE_HZ < samples.sound_frames]
    changes = [
        f"use --sample_seconds {seconds}, or leave"
        for seconds in shorter
        if is_possible(cluster, job, _with_samples(request, samples.lasting(seconds * FRAME_RATE_HZ)))
    ]
    return (
        f"--sample_every does not fit beside this run, which fits without it: while making sounds "
        f"{'a process' if cluster.device == 'cpu' else 'a GPU'} needs {_gib(needed)} GiB, most of it for a copy of the"
        f" model, and has {_gib(cluster.gpu_memory_bytes)}. So {changes[0] if changes else 'leave'} --sample_every out"
        f" and make sounds of the checkpoints: {LISTEN} (--device cpu where the GPU is too small for the model)"
    )


def _with_samples(request: Request, samples: Samples | None) -> Request:
    return replace(request, workload=replace(request.workload, samples=samples))


def _changes_of_flags(cluster: Cluster, job: Job) -> Iterator[str]:
    """Single changes of flags under which there is a plan, in words."""
    request, workload = job.request, job.request.workload

    def works(**changes: object) -> bool:
        return is_possible(cluster, job, replace(request, **changes))  # type: ignore[arg-type]

    def works_with_workload(strategy: str = request.strategy, **changes: object) -> bool:
        return works(strategy=strategy, workload=replace(workload, **changes))  # type: ignore[arg-type]

    if request.gradient_checkpointing_typed and works(gradient_checkpointing=True):
        yield "--gradient_checkpointing 1"
    if request.strategy != "auto" and works(strategy="auto"):
        yield "--strategy auto"
    if not request.offload_optimizer and works(offload_optimizer=True, strategy="auto"):
        yield f"--offload_optimizer 1{'' if request.strategy == 'auto' else ' --strategy auto'}"
    adapters = selection_of(lora_rank=RANK_SUGGESTED)
    if workload.selection.everything and works_with_workload(selection=adapters):
        yield f"--lora_rank {RANK_SUGGESTED}, which trains adapters alone"
    elif workload.selection.everything and works_with_workload(selection=adapters, base_bits=4):
        yield f"--lora_rank {RANK_SUGGESTED} --base_bits 4, which trains adapters beside a base of 4 bits"
    frozen = workload.selection.lora or workload.selection.new_rows
    if frozen and workload.base_bits != 4 and works_with_workload(base_bits=4):
        yield "--base_bits 4"
    one_gpu_of_32_bits = cluster.world_size == 1 and not workload.eight_bit_moments
    if one_gpu_of_32_bits and works_with_workload("auto", eight_bit_moments=True):
        yield "--optimizer adamw8bit"
    if workload.ema and works_with_workload(ema=False):
        yield "no --ema_decay"
    for seconds in SECONDS_SUGGESTED:
        frames = seconds * FRAME_RATE_HZ
        if frames < workload.segment_frames and works_with_workload(segment_frames=frames):
            yield f"--segment_seconds {seconds}"
            break


def _more_gpus(cluster: Cluster, job: Job) -> Iterator[str]:
    """The least number of such GPUs, on one node, with which there is a plan."""
    request = job.request if job.request.strategy != "single" else replace(job.request, strategy="auto")
    for gpus in range(cluster.world_size + 1, MOST_GPUS_SUGGESTED + 1):
        more = replace(cluster, nodes=1, gpus_per_node=gpus, host_memory_bytes=None)
        if is_possible(more, job, request):
            yield f"{gpus} such GPUs"
            break


def _fewer_processes(cluster: Cluster, job: Job) -> Iterator[str]:
    """That one process for each machine would do, where it would: processes of a machine share its memory."""
    if cluster.gpus_per_node > 1 and cluster.host_memory_bytes is not None:
        share = bytes_of_a_process(cluster.host_memory_bytes, 1)
        request = replace(job.request, strategy="auto")
        if is_possible(replace(cluster, gpus_per_node=1, gpu_memory_bytes=share), job, request):
            yield f"one process for each machine{'' if job.request.strategy == 'auto' else ', --strategy auto'}"


def _smaller_models(cluster: Cluster, job: Job) -> Iterator[str]:
    """The largest model with which there is a plan, of those that are smaller and of the same kind."""
    smaller = [s for s in KNOWN.values() if s.parameters < job.shape.parameters and _is_like(s, job.shape)]
    for shape in sorted(smaller, key=lambda shape: -shape.parameters):
        if is_possible(cluster, replace(job, shape=shape), job.request):
            yield f"--model_id {shape.name}"
            break


def _is_like(one: Shape, other: Shape) -> bool:
    """Whether both read a melody or neither, and both are stereo or neither."""
    return (one.melody, one.audio_channels) == (other.melody, other.audio_channels)


def is_possible(cluster: Cluster, job: Job, request: Request) -> bool:
    """Whether there is a plan on this cluster for the same job with this request."""
    try:
        layouts = allowed_layouts(cluster, replace(job, request=request))
        return any(fits(cluster, estimated) for estimated in layouts)
    except ConfigError:
        return False


def _gib(number_of_bytes: int | None) -> str:
    return "unknown" if number_of_bytes is None else f"{number_of_bytes / GIB:.1f}"
