"""Bytes that each process of a training run holds on its GPU, by part, as formulas of the model's shape and the layout.

The formulas describe what trainer/engine configures. tests/plan/test_memory.py compares them with the formulas that
ZeRO and DeepSpeed publish, and with what autograd and the optimizers really keep.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from trainer.plan.activations import activations_of
from trainer.plan.layout import FLOAT32, HALF, Layout, Workload
from trainer.plan.sampling import sampling_bytes
from trainer.spec.encoding import encoding_pass
from trainer.spec.shapes import Shape
from trainer.spec.trainable import Counts, count

GIB = 2**30

MOMENTS = 2 * FLOAT32  # bytes per trained parameter of AdamW's two moments
# With 8 bits each moment is a code of one byte, and a float32 scale for each block of 256. Source: bitsandbytes 0.50.
EIGHT_BIT_MOMENTS = 2 * (1 + FLOAT32 / 256)
# Bytes per value of a base in 4 bits: NF4, a byte for each block of 64 values, and a float32 for each 256 such blocks.
# A base in 8 bits has a code of one byte per value, and a float32 for each row of the matrix. Source: bitsandbytes
# 0.50; tests/engine/test_quantized_base.py compares both with the bytes that it allocates.
FOUR_BITS = 0.5 + 1 / 64 + FLOAT32 / (64 * 256)

# trainer/engine/accelerator.py gives this to DeepSpeed as reduce_bucket_size and allgather_bucket_size. There are two
# buckets: under zero3 because of overlap_comm, one fills while the other is reduced; under zero2 the second is what
# DeepSpeed copies together of the first for one destination, which may be all of it.
ZERO_BUCKET_ELEMENTS = 50_000_000
ZERO_BUCKETS = 2
GATHERED_LAYERS = 2  # which full sharding holds whole at once: the layer at work, and the next, fetched ahead

# What CUDA and cuBLAS hold outside PyTorch, and the share of its own memory that PyTorch's allocator loses to
# fragmentation. Both are assumed, not measured: on the safe side of what is commonly seen.
CONTEXT_BYTES = GIB
# What NCCL holds for each communicator. Reports from machines with 8 GPUs and NVLink tell of 1.06 GB with one
# (NVIDIA/nccl#1685), 1.6 GB with one and 6 GB with three or more (NVIDIA/nccl#864).
COMMUNICATOR_BYTES = GIB
FRAGMENTATION = 0.06

# What EnCodec's first layers hold of a pass while encoding, in tensors of its samples times the channels of its first
# convolution, in float32: a residual block's input, the padded copy, outputs; the rest is room for the convolution's
# own. PyTorch recorded 3.6 on a CPU (2026-11-27); tests/data/test_codec.py holds it to this.
CODEC_TENSORS = 4
CODEC_RATE_HZ = 32_000
CODEC_CONTEXT_SECONDS = 0.08  # of audio on both sides of a window, trainer/data/codec_windows.py
CPU_VIEWS = 4  # --code_views; of more, a CPU needs more


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one process on its device, by part.

    weights      of the trained model, and of a T5 in the loop
    optimizer    moments, the moving average of the weights, and under zero2 and zero3 the float32 master weights
    buffers      copies that a strategy works with: casts, buckets, gathered layers
    activations  of one micro-batch of the longest clips, with its logits
    reserve      CUDA's and NCCL's own memory, and the allocator's losses; 0 on a CPU
    checkpoint   the copy from which a checkpoint is written, where the device's memory is the host's; 0 on a GPU
    codec        EnCodec, T5 and their largest pass while encoding, when none of the parts above is there yet
    samples      all that is there while sounds are made between steps, a checkpoint's copy included; 0 without
                 --sample_every
    host         what offloading puts into host memory instead
    reused       what gradients take over from activations. With one micro-batch per step there are no gradients before
                 the backward pass, and they grow while activations are freed: not all of both is there at once. Where
                 zero2 reduces once for a step, no activations are left when buckets and reduced gradients come
    """

    weights: int
    gradients: int
    optimizer: int
    buffers: int
    activations: int
    reserve: int
    codec: int
    host: int
    reused: int = 0
    checkpoint: int = 0
    samples: int = 0

    @property
    def states(self) -> int:
        """Weights, gradients and optimizer: what is there between micro-batches."""
        return self.weights + self.gradients + self.optimizer

    @property
    def allocated(self) -> int:
        """What PyTorch allocates at its peak while training: torch.cuda.max_memory_allocated."""
        return self.states + self.buffers + self.activations - self.reused

    @property
    def total(self) -> int:
        """What the device must have: for training, for encoding or for making sounds, whichever needs most."""
        return max(self.allocated + self.checkpoint, self.codec, self.samples) + self.reserve

    def describe(self) -> str:
        """The parts in GiB, as one line."""
        parts = [f"{name} {_gib(getattr(self, name))}" for name in PARTS]
        host = f"; {_gib(self.host)} in host memory" if self.host else ""
        copy = f", a checkpoint's copy {_gib(self.checkpoint)}" if self.checkpoint else ""
        reused = f", less {_gib(self.reused)} that gradients take over from activations" if self.reused else ""
        sounds = f"; {_gib(self.samples)} while making sounds" if self.samples else ""
        return f"{', '.join(parts)}{copy}{reused}; codec while encoding {_gib(self.codec)}{sounds}{host} (GiB)"


PARTS = ("weights", "gradients", "optimizer", "buffers", "activations", "reserve")


def expected_bytes(shape: Shape, layout: Layout) -> Memory:
    """What one process holds at its peak, by part.

    Raises ConfigError where the workload freezes layers that the shape has not, or leaves nothing to train.
    """
    counts = count(shape, layout.workload.selection)
    weights, gradients, optimizer = _states(shape, layout, counts)
    optimizer += _ema(layout, counts)
    host = 0
    if layout.offload_optimizer:
        # DeepSpeed 0.19: what is accumulated in float32 beside bf16 weights stays on the GPU under ZeRO-2.
        stays = layout.strategy == "zero2" and layout.mixed_precision != "no"
        host = gradients + optimizer + HALF * _share(counts.trained, layout)
        gradients, optimizer = (gradients if stays else 0), 0
    buffers = _buffers(shape, layout, counts)
    activations = activations_of(shape, layout)
    reused = 0
    if layout.strategy == "zero2" and layout.reduces_once:
        reused = min(gradients + buffers, activations.peak)
        gradients += FLOAT32 * counts.trained  # whole until they are reduced, in float32 under bf16 too
    # Not under ddp and ZeRO, whose gradients have buffers of their own; under FSDP it was not measured.
    if layout.strategy == "single" and layout.accumulation == 1:
        reused = min(gradients, buffers + activations.peak - activations.working)
    weights += FLOAT32 * counts.text_encoder
    codec = FLOAT32 * (shape.frozen + CODEC_TENSORS * _codec_pass_samples(shape, layout) * shape.codec_channels)
    checkpoint = 0 if layout.on_gpu else _checkpoint_copy(layout, counts)
    sounds = 0
    if layout.workload.samples is not None:
        staying = weights + optimizer + _kept_between_steps(layout, gradients) + checkpoint
        sounds = staying + sampling_bytes(shape, layout, counts, layout.workload.samples)
    allocated = max(weights + gradients + optimizer + buffers + activations.peak - reused, codec, sounds)
    outside = CONTEXT_BYTES + COMMUNICATOR_BYTES * layout.communicators
    return Memory(
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        buffers=buffers,
        activations=activations.peak,
        reserve=round(outside + FRAGMENTATION * allocated) if layout.on_gpu else 0,
        codec=codec,
        host=host,
        reused=reused,
        checkpoint=checkpoint,
        samples=sounds,
    )


def _codec_pass_samples(shape: Shape, layout: Layout) -> int:
    """Samples of all views and channels that go through EnCodec at once. They share the seconds of a window, on a CPU
    the channels alone; the audio on both sides of it comes with each."""
    size = encoding_pass(on_gpu=layout.on_gpu, views=CPU_VIEWS, channels=shape.audio_channels)
    rows = size.windows * CPU_VIEWS * shape.audio_channels
    context = CODEC_CONTEXT_SECONDS if layout.on_gpu else 0
    return round(rows * (size.window_seconds + context) * CODEC_RATE_HZ)


def bytes_to_be_free(memory: Memory, layout: Layout) -> int:
    """What a process's GPU must have free when it has met the others, before it has allocated anything.

    By then CUDA holds its own memory, and NCCL that of the first communicator.
    """
    held = CONTEXT_BYTES + (COMMUNICATOR_BYTES if layout.communicators else 0)
    return memory.total - held


def gathered_parameters(shape: Shape) -> int:
    """How many parameters full sharding holds whole at once: layers at work, and all outside the layers."""
    return min(shape.layers, GATHERED_LAYERS) * shape.layer_parameters + shape.rest_parameters


def _share(parameters: int, layout: Layout) -> int:
    """How many of so many parameters one process holds where they are sharded."""
    return math.ceil(parameters / layout.shards)


def _states(shape: Shape, layout: Layout, counts: Counts) -> tuple[int, int, int]:
    """Bytes of weights, gradients and optimizer of one process, as they are without offloading."""
    compute = layout.compute_bytes
    parameters = shape.parameters + counts.added
    share, share_of_weights = _share(counts.trained, layout), _share(parameters, layout)
    # Torch's strategies hold frozen linear layers in the precision of the computation.
    saved = (FLOAT32 - compute) * counts.frozen_linear
    match layout.strategy:
        case "single" | "ddp":
            moments = EIGHT_BIT_MOMENTS if layout.workload.eight_bit_moments else MOMENTS
            saved += round(counts.in_layers * (compute - _base_bytes(shape, layout)))
            return FLOAT32 * parameters - saved, FLOAT32 * counts.trained, math.ceil(moments * counts.trained)
        case "zero2":  # also in float32 DeepSpeed keeps a master copy of its own partition
            return compute * parameters, FLOAT32 * share, (FLOAT32 + MOMENTS) * share
        case "zero3":
            return compute * share_of_weights, FLOAT32 * share, (FLOAT32 + MOMENTS) * share
        case "fsdp" | "hsdp":
            # Until gradients are reduced once, at the last micro-batch, those of the ones before are whole. A shard's
            # gradient takes the place of a whole one. What hsdp sums within a node alone has the size of a shard.
            whole = layout.reduces_once and layout.accumulation > 1
            gradients = FLOAT32 * (counts.trained if whole else share)
            return FLOAT32 * share_of_weights - saved // layout.shards, gradients, MOMENTS * share


def _kept_between_steps(layout: Layout, gradients: int) -> int:
    """Bytes that a strategy keeps beside weights and optimizer once a step is done.

    DDP's buckets, of which the gradients are views, stay; so do ZeRO-3's partitions of the gradients (DeepSpeed 0.19),
    and the bucket in which it reduces them. The other strategies free gradients and buffers; so do fsdp and hsdp what
    they keep whole within a step.
    """
    match layout.strategy:
        case "single" | "zero2" | "fsdp" | "hsdp":
            return 0
        case "ddp":
            return gradients
        case "zero3":
            return gradients + FLOAT32 * ZERO_BUCKET_ELEMENTS


def _ema(layout: Layout, counts: Counts) -> int:
    """Bytes of the moving average of the trained weights: float32, sharded wherever the moments are."""
    if not layout.workload.ema:
        return 0
    sharded = layout.strategy not in ("single", "ddp")
    return FLOAT32 * (_share(counts.trained, layout) if sharded else counts.trained)


def _checkpoint_copy(layout: Layout, counts: Counts) -> int:
    """Bytes of what one process saves, of which it makes a float32 copy so that training may go on meanwhile: its share
    of the trained weights, their moments and their average. Under ddp, and between nodes under hsdp, processes share
    what they have in common."""
    return _saved_bytes_of_a_value(layout.workload) * math.ceil(counts.trained / layout.world_size)


def checkpoint_bytes(shape: Shape, workload: Workload) -> int:
    """Bytes of a checkpoint on disk: trained weights, moments and average in float32, whatever the layout."""
    return _saved_bytes_of_a_value(workload) * count(shape, workload.selection).trained


def _saved_bytes_of_a_value(workload: Workload) -> int:
    return (FLOAT32 + MOMENTS) + (FLOAT32 if workload.ema else 0)


def _buffers(shape: Shape, layout: Layout, counts: Counts) -> int:
    """Bytes of the copies that a strategy works with. DDP's buckets are none: gradients are views of them
    (gradient_as_bucket_view in trainer/engine/accelerator.py)."""
    compute = layout.compute_bytes
    match layout.strategy:
        case "single" | "ddp":  # autocast keeps each trained matrix's cast until the backward pass has used it
            cast = shape.cast_parameters - counts.frozen_linear + counts.added
            if layout.gradient_checkpointing == "selective":
                cast = math.ceil(cast / shape.layers)  # casts are made again for each layer
            return (compute * cast if layout.autocast else 0) + _restored_base(shape, layout)
        case "zero2":
            return _zero_buckets(layout) + _float32_sum(layout, counts)
        case "zero3":
            return _zero_buckets(layout) + compute * gathered_parameters(shape)
        case "fsdp" | "hsdp":
            # The gradients of the largest unit in the precision of the computation, and their float32 copy, which is
            # what is reduced.
            reduced = (compute + FLOAT32) * min(shape.largest_unit, counts.trained)
            whole = shape.parameters + counts.added
            gathered = whole if layout.gathers_once else gathered_parameters(shape)
            return compute * gathered + reduced


def _base_bytes(shape: Shape, layout: Layout) -> float:
    """Bytes per value of a frozen linear layer in the decoder's layers."""
    if layout.workload.base_bits is None:
        return layout.compute_bytes
    return FOUR_BITS if layout.workload.base_bits == 4 else 1 + FLOAT32 / shape.width


def _restored_base(shape: Shape, layout: Layout) -> int:
    """Bytes that a product with a base of 4 or 8 bits works with: its largest matrix in the precision of the
    computation, and for 4 bits the float32 scales of its blocks of 64."""
    if layout.workload.base_bits is None:
        return 0
    scales = FLOAT32 / 64 if layout.workload.base_bits == 4 else 0
    return round(shape.width * shape.ffn * (layout.compute_bytes + scales))


def _zero_buckets(layout: Layout) -> int:
    """Bytes of DeepSpeed's buckets of gradients, and of the float32 copy of what is being reduced."""
    copy = FLOAT32 if layout.mixed_precision != "no" else 0
    return (ZERO_BUCKETS * layout.compute_bytes + copy) * ZERO_BUCKET_ELEMENTS


def _float32_sum(layout: Layout, counts: Counts) -> int:
    """Bytes of the second partition of gradients that ZeRO-2 has in float32, to which it adds each micro-batch's, where
    it reduces each (DeepSpeed 0.19, all_grad_tensors)."""
    if layout.mixed_precision != "no" or layout.accumulation == 1 or layout.reduces_once:
        return 0
    return FLOAT32 * _share(counts.trained, layout)


def _gib(number_of_bytes: int) -> str:
    return f"{number_of_bytes / GIB:.2f}"
