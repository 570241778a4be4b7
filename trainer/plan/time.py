"""Seconds that an optimizer step should take, from FLOPs, bytes and rates of the hardware.

Five things take time, each by a formula: matrix products, at the rate that one large product reaches; everything
between them, at the rate of the GPU's memory; the host, which tells the GPU what to do; the update; and collectives, as
far as nothing is computed beside them. The few constants were fitted to the steps measured on an H100 and an H200
(docs/benchmarks.md, "On an H100"; tests/plan/test_time.py has the rows, and holds the formulas to them).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from trainer.plan.communication import Sent, traffic
from trainer.plan.layout import FLOAT32, HALF, Layout
from trainer.plan.rates import NETWORK_SHARE, USUAL_NETWORK_GBPS, Gpu, Link, gpu_of
from trainer.plan.strategies import Cluster
from trainer.spec.flops import clip_flops
from trainer.spec.shapes import Shape
from trainer.spec.trainable import count

USUAL_TEXT_TOKENS = 32  # of a caption; some 20 words. They are a hundredth of a text model's step
# Bytes that go through the GPU's memory for each place, layer and value of width, forward and backward, between the
# products: norms, GELU, dropout, residuals and their gradients. Fitted. In float32 twice as many, assumed.
EAGER_BYTES, COMPILED_BYTES = 535, 450
SELECTIVE_BYTES = 40  # and besides, where a compiler makes again what is cheap
RECOMPUTED = 4 / 3  # a second forward pass beside a forward and a backward pass, which costs twice as much
# Bytes for each parameter and micro-batch: weights are cast to bf16, read twice, and their gradients added up.
WEIGHT_BYTES = 16
# Bytes for each value that is updated: gradient, weight and two moments are read, all but the gradient written, and the
# gradient read before that for its norm.
UPDATE_BYTES, UPDATE_BYTES_8_BIT, EMA_BYTES = 32, 20, 12
UPDATE_SHARE = 0.75  # of the memory's rate, while updating; fitted
# A host needs so long to tell the GPU the forward and backward pass of a layer, whatever the micro-batch; fitted to
# small with 8 clips. It is of the machine's processor, and the least time of a micro-batch.
HOST_SECONDS_OF_A_LAYER = 0.0042
# An offloaded optimizer, assumed: of host memory, what one process's AdamW reaches (60 million values in 0.04 s on one
# thread, docs/benchmarks.md, are 42 GB/s), and 16 lanes of PCIe 4, which the processes of a machine do not share.
HOST_BYTES_PER_SECOND, PCIE_BYTES_PER_SECOND = 40e9, 0.75 * 31.5e9
FORWARD, BACKWARD = 1 / 3, 2 / 3  # of a micro-batch's time


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of one optimizer step of full-length crops on the slowest process, and where they come from.

    compute        of forward and backward passes, what is computed a second time included
    update         of the norm, clipping and AdamW
    communication  of all collectives
    exposed        the part of `communication` that nothing is computed beside
    source         of the rates, in words: measured ones with their date, others as assumed
    least_compute  the part of `compute` that also the shortest clips take: the host needs it to issue the passes
    """

    compute: float
    update: float
    communication: float
    exposed: float
    source: str
    least_compute: float = 0.0

    @property
    def seconds(self) -> float:
        """Of the whole step."""
        return self.compute + self.update + self.exposed

    def describe(self) -> str:
        """The time in words, with its parts."""
        parts = [f"computing {_in_words(self.compute)}", f"update {_in_words(self.update)}"]
        parts += [f"waiting for other GPUs {_in_words(self.exposed)}"] * (self.communication > 0)
        return f"{_in_words(self.seconds)} s for clips of full length ({', '.join(parts)}; rates: {self.source})"


def step_time(
    shape: Shape,
    layout: Layout,
    cluster: Cluster,
    *,
    frames: int | None = None,
    text_tokens: int = USUAL_TEXT_TOKENS,
) -> StepTime | None:
    """What an optimizer step of this layout should take on this cluster; None on CPUs and on GPUs of unknown rates.

    frames       of each clip; None: of the longest crop
    text_tokens  of each caption
    """
    gpu = gpu_of(cluster.gpu_name)
    if gpu is None or not layout.on_gpu:
        return None
    micro_batch = _micro_batch_seconds(shape, layout, gpu, frames or layout.workload.segment_frames, text_tokens)
    communication, exposed = _waiting(shape, layout, cluster, gpu, micro_batch)
    return StepTime(
        compute=layout.accumulation * micro_batch,
        update=_update_seconds(shape, layout, gpu),
        communication=communication,
        exposed=exposed,
        source=_source(layout, cluster, gpu),
        least_compute=layout.accumulation * _host_seconds(shape, layout),
    )


def link_gb_per_second(cluster: Cluster) -> float | None:
    """GB/s that each of the cluster's GPUs should send in a ring over all of them; None for GPUs of unknown rates."""
    gpu = gpu_of(cluster.gpu_name)
    if gpu is None:
        return None
    within = [gpu.link.bytes_per_second / 1e9] * (cluster.gpus_per_node > 1)
    across = [_network_bytes_per_second(cluster) / 1e9] * (cluster.nodes > 1)
    return min([*within, *across], default=None)


def _micro_batch_seconds(shape: Shape, layout: Layout, gpu: Gpu, frames: int, text_tokens: int) -> float:
    """Of the forward and backward pass of one micro-batch: of the GPU, or of the host where that is slower."""
    selection = layout.workload.selection
    flops = clip_flops(shape, frames, text_tokens, selection)
    # Where weights are frozen, gradients are missing among the products and between them alike.
    needed = flops / clip_flops(shape, frames, text_tokens)
    each = COMPILED_BYTES if layout.compiled else EAGER_BYTES
    each += SELECTIVE_BYTES if layout.gradient_checkpointing == "selective" else 0
    places = shape.prefix_places(text_tokens) + frames
    between = needed * each * shape.layers * shape.width * places * layout.compute_bytes / HALF
    again = RECOMPUTED if layout.gradient_checkpointing is True else 1.0
    of_clips = layout.micro_batch * again
    memory = of_clips * between + _weight_bytes(shape, layout)
    products = of_clips * flops / gpu.flops_per_second(layout.mixed_precision)
    return max(products + memory / _memory_rate(gpu), _host_seconds(shape, layout))


def _host_seconds(shape: Shape, layout: Layout) -> float:
    """What the host needs to issue the forward and backward pass of a micro-batch."""
    again = RECOMPUTED if layout.gradient_checkpointing is True else 1.0
    return HOST_SECONDS_OF_A_LAYER * shape.layers * again


def _weight_bytes(shape: Shape, layout: Layout) -> float:
    """What goes through memory for the weights in a micro-batch, whatever its number of clips."""
    workload = layout.workload
    counts = count(shape, workload.selection)
    frozen = 0.0
    if workload.base_bits is not None:  # made into a matrix of 2 bytes a value, forward and backward
        frozen = 2 * counts.in_layers * (workload.base_bits / 8 + 2 * HALF)
    return WEIGHT_BYTES * counts.trained + frozen


def _update_seconds(shape: Shape, layout: Layout, gpu: Gpu) -> float:
    """Of the norm and AdamW, on what this process owns of the trained weights."""
    workload = layout.workload
    shards = layout.shards if layout.strategy not in ("single", "ddp") else 1
    owned = count(shape, workload.selection).trained / shards
    average = EMA_BYTES * workload.ema
    if layout.offload_optimizer:  # gradients come in float32, and weights go back in the compute precision
        moved = owned * (FLOAT32 + layout.compute_bytes)
        return owned * (UPDATE_BYTES + average) / HOST_BYTES_PER_SECOND + moved / PCIE_BYTES_PER_SECOND
    each = UPDATE_BYTES_8_BIT if workload.eight_bit_moments else UPDATE_BYTES
    return owned * (each + average) / (UPDATE_SHARE * _memory_rate(gpu))


def _waiting(shape: Shape, layout: Layout, cluster: Cluster, gpu: Gpu, micro_batch: float) -> tuple[float, float]:
    """Seconds of all collectives of a step, and those of them beside which nothing is computed.

    micro_batch  seconds of its forward and backward pass
    """
    kinds = traffic(shape, layout).kinds
    sent = {name: _sent_seconds(kind, cluster, gpu.link) for name, kind in kinds.items()}
    beside = {name: seconds * kinds[name].overlaps for name, seconds in sent.items()}
    exposed = sum(seconds - beside[name] for name, seconds in sent.items())
    exposed += beside["returned"]  # after the step there is nothing to be computed
    units = shape.layers + 1
    for forward, backward in _passes(layout, beside):
        for seconds, window in ((forward, FORWARD * micro_batch), (backward, BACKWARD * micro_batch)):
            # At least the first unit's weights, or the last unit's gradients, are waited for.
            exposed += max(seconds - window, seconds / units)
    return sum(sent.values()), exposed


def _passes(layout: Layout, beside: dict[str, float]) -> Iterator[tuple[float, float]]:
    """For each micro-batch of a step, the seconds of collectives beside its forward and beside its backward pass."""
    times = layout.accumulation
    at_once = layout.strategy == "ddp" or layout.reduces_once
    for number in range(times):
        first, last = number == 0, number == times - 1
        gathered = beside["gathered"] * first if layout.gathers_once else beside["gathered"] / (2 * times)
        reduced = beside["reduced"] * last if at_once else beside["reduced"] / times
        backward = reduced + beside["spread"] * last
        yield gathered, backward if layout.gathers_once else backward + gathered


def _sent_seconds(sent: Sent, cluster: Cluster, link: Link) -> float:
    """Of a collective: within the machine and between machines its parts go on at once."""
    return max(sent.within / link.bytes_per_second, sent.across / _network_bytes_per_second(cluster))


def _memory_rate(gpu: Gpu) -> float:
    return 1e9 * gpu.gb_per_second


def _network_bytes_per_second(cluster: Cluster) -> float:
    return NETWORK_SHARE * _network_gbps(cluster) * 1e9 / 8


def _network_gbps(cluster: Cluster) -> float:
    return USUAL_NETWORK_GBPS if cluster.network_gbps is None else cluster.network_gbps


def _source(layout: Layout, cluster: Cluster, gpu: Gpu) -> str:
    parts = [gpu.source()]
    if cluster.gpus_per_node > 1:
        parts.append(f"{gpu.link.name} assumed")
    if layout.nodes > 1:
        assumed = ", assumed" if cluster.network_gbps is None else ""
        parts.append(f"a network of {_network_gbps(cluster):g} Gbit/s{assumed}")
    return ", ".join(parts)


def _in_words(seconds: float) -> str:
    if seconds < 0.0005:
        return "under 0.001"
    return f"{seconds:.2f}" if seconds >= 0.1 else f"{seconds:.3f}"
