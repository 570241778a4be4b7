"""Bytes that a training run holds on each GPU, by part: published formulas, and the model of our own engine.

P is the number of parameters, N of GPUs over which a part is sharded. Gradients and optimizer state are held for the
trained ones alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from trainer.spec.shapes import Shape
from trainer.spec.trainable import Counts

Strategy = Literal["single", "ddp", "zero2", "zero3", "fsdp", "hsdp"]
Precision = Literal["no", "bf16", "fp16"]
# Whether the backward pass recomputes nothing, each layer, or of compiled layers what is no matrix product.
Checkpointing = Literal[False, True, "selective"]

GIB = 2**30
FLOAT32, HALF = 4, 2
MOMENTS = 2 * FLOAT32  # AdamW's two, a parameter
# A value of a base in 4 bits: NF4, a byte for each block of 64, and a float32 for each 256 of those. In 8 bits a code,
# and a float32 for each row of them. Source: bitsandbytes 0.50; held by tests/test_base_bits.py.
FOUR_BITS = 0.5 + 1 / 64 + FLOAT32 / (64 * 256)
EIGHT_BIT_MOMENTS = 2 * (1 + FLOAT32 / 256)  # codes, and a float32 for each block of 256 (bitsandbytes 0.50)

# What trainer/engine configures; the estimate below holds for these.
DDP_BUCKET_MIB = 25  # torch's default; gradients are views of the buckets
ZERO_BUCKET_ELEMENTS = 50_000_000  # reduce_bucket_size and allgather_bucket_size
ZERO_BUCKETS = 2  # overlap_comm: one fills while the other is reduced
GATHERED_LAYERS = 2  # full sharding: the layer at work and the prefetched one

# Activations kept for the backward pass, in values a frame and layer, times the width. Counted from what
# autograd saves in transformers 5.23's MusicgenDecoderLayer with a fused attention kernel, which
# tests/test_memory.py repeats. A residual value has the residual's precision, any other the compute precision.
LAYER_RESIDUALS = 3  # inputs of the three LayerNorms
LAYER_VALUES = 9  # normed inputs 3, q k v 3, attention's output, cross-attention's q and output
LAYER_FFN_VALUES = 2  # before and after GELU, times the ffn's width
AUTOCAST_EXTRA_VALUES = 2  # autocast casts the input of q, k and v once for each
COMPILED_EXTRA_VALUES = -1  # the compiler joins these casts, and one more (torch 2.11 on an H100 and 2.13 on a CPU)
# Selective: a layer's input, and the results of its products: q, k, v, attention's output and its projection, the
# cross-attention's q, output and projection; before GELU. On an H100 28.3 bytes a value of the width, 28 by this count.
SELECTIVE_RESIDUALS, SELECTIVE_VALUES, SELECTIVE_FFN_VALUES = 1, 8, 1
# What the backward pass of one layer holds beside them: gradients at the ffn's width, and of the residual.
BACKWARD_FFN_VALUES = 2
BACKWARD_RESIDUALS = 3

# What a T5 in the loop keeps a layer and caption, in float32: values a token, times the width, and a table of scores a
# head. Counted like the above, with frozen weights; for T5-base, and captions of 128 tokens, which few exceed.
T5_LAYERS, T5_HEADS, T5_TOKENS, T5_VALUES = 12, 12, 128, 10

# What CUDA, cuBLAS and NCCL hold outside PyTorch, and the share that its allocator loses to fragmentation.
# To be measured by GPU and driver; these are on the safe side of what is commonly seen.
CONTEXT_BYTES = GIB
FRAGMENTATION = 0.06

# While encoding, one pass is 4 views of 10 s at 32 kHz, float32; EnCodec's first layers hold about 5 such
# tensors of all channels at once.
CODEC_PASS_SAMPLES = 4 * 10 * 32_000
CODEC_TENSORS = 5


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What of a plan decides its memory.

    shards  GPUs that share sharded state: the world, or one node's for hsdp
    frames  of the longest clip
    counts  what is trained; None for the whole model
    averages  whether an average of the weights is kept (--ema_decay)
    eight_bit  whether moments have 8 bits (--optimizer adamw8bit)
    base_bits  of frozen linear layers in the decoder's layers (--base_bits)
    compiled  whether the decoder's layers are compiled
    """

    strategy: Strategy
    shards: int
    precision: Precision
    micro_batch: int
    accumulation: int
    frames: int
    gradient_checkpointing: Checkpointing
    offload_optimizer: bool
    on_gpu: bool
    counts: Counts | None = None
    averages: bool = False
    eight_bit: bool = False
    base_bits: Literal[4, 8] | None = None
    compiled: bool = False


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one process on its device, by part; `host` is what offloading puts into host memory.

    optimizer    moments, the average of the weights, and under zero2 and zero3 the float32 master weights
    buffers      copies that a strategy works with: casts, buckets, gathered layers
    activations  of one micro-batch at the longest clip, with its logits
    reserve      CUDA's own memory and the allocator's losses; 0 on a CPU
    codec        EnCodec, T5 and their largest pass, before any of the parts above exists
    reused       what gradients take over from activations: with one micro-batch a step there are none before the
                 backward pass, and these grow as those are freed
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
        """What the GPU must have: training or encoding, whichever needs more."""
        return max(self.allocated, self.codec) + self.reserve

    def describe(self) -> str:
        """The parts in GiB, as one line."""
        parts = [f"{name} {_gib(getattr(self, name))}" for name in PARTS]
        host = f"; {_gib(self.host)} in host memory" if self.host else ""
        reused = f", less {_gib(self.reused)} that gradients take over from activations" if self.reused else ""
        return f"{', '.join(parts)}{reused}; codec while encoding {_gib(self.codec)}{host} (GiB)"


PARTS = ("weights", "gradients", "optimizer", "buffers", "activations", "reserve")


def zero_paper_bytes(parameters: int, gpus: int, stage: Literal[0, 1, 2, 3]) -> float:
    """Model states a GPU as the ZeRO paper counts them, 2 + 2 + 12 bytes a parameter.

    16-bit weights, 16-bit gradients, and float32 master and moments; stage 1 shards the last, stage 2 also
    gradients, stage 3 everything. Source: arXiv 1910.02054, figure 1.
    """
    weights, gradients, optimizer = 2.0 * parameters, 2.0 * parameters, 12.0 * parameters
    return (
        weights / (gpus if stage >= 3 else 1)
        + gradients / (gpus if stage >= 2 else 1)
        + optimizer / (gpus if stage >= 1 else 1)
    )


def deepspeed_zero2_bytes(parameters: int, gpus: int, *, offload: bool = False) -> float:
    """Model states a GPU as DeepSpeed documents them for ZeRO-2: 4P + 16P/N, or 2P with the optimizer offloaded.

    Source: DeepSpeed, docs/code-docs/source/memory.rst. (0.19.8's own estimate function says 2P + 18P/N.)
    """
    return 2.0 * parameters if offload else 4.0 * parameters + 16.0 * parameters / gpus


def deepspeed_zero3_bytes(parameters: int, gpus: int, largest_layer: int, *, offload: bool = False) -> float:
    """Model states a GPU as DeepSpeed documents them for ZeRO-3: 18P/N (offloaded: 2P/N) + 4 x largest layer.

    Source: DeepSpeed, docs/code-docs/source/memory.rst.
    """
    return (2.0 if offload else 18.0) * parameters / gpus + 4.0 * largest_layer


def expected_bytes(shape: Shape, layout: Layout) -> Memory:
    """What one process of our engine holds at its peak, by part."""
    weights, gradients, optimizer = _states(shape, layout)
    optimizer += _average(shape, layout)
    host = 0
    if layout.offload_optimizer:
        # DeepSpeed 0.19: what is accumulated in float32 beside bf16 weights stays on the GPU under ZeRO-2.
        stays = layout.strategy == "zero2" and layout.precision != "no"
        host = gradients + optimizer + HALF * math.ceil(_counts(shape, layout).trained / layout.shards)
        gradients, optimizer = (gradients if stays else 0), 0
    buffers = _buffers(shape, layout)
    kept, working = _frame_bytes(shape, layout)
    frames = layout.micro_batch * layout.frames
    activations = frames * (kept + max(working, _logits_bytes(shape, layout)))
    activations += layout.micro_batch * _text_bytes(shape, layout)
    reused = 0
    if layout.strategy == "single" and layout.accumulation == 1:
        reused = min(gradients, buffers + activations - frames * working)
    weights += FLOAT32 * _counts(shape, layout).text_encoder
    codec = FLOAT32 * (shape.frozen + CODEC_TENSORS * CODEC_PASS_SAMPLES * shape.codec_channels)
    allocated = max(weights + gradients + optimizer + buffers + activations - reused, codec)
    return Memory(
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        buffers=buffers,
        activations=activations,
        reserve=round(CONTEXT_BYTES + FRAGMENTATION * allocated) if layout.on_gpu else 0,
        codec=codec,
        host=host,
        reused=reused,
    )


def gathered_parameters(shape: Shape) -> int:
    """How many parameters full sharding holds whole at once: layers at work, and all outside the layers."""
    return min(shape.layers, GATHERED_LAYERS) * shape.layer_parameters + shape.rest_parameters


def _states(shape: Shape, layout: Layout) -> tuple[int, int, int]:
    """Weights, gradients and optimizer of one process, nothing offloaded."""
    counts, compute = _counts(shape, layout), _compute_bytes(layout)
    whole = shape.parameters + counts.added
    share, of_weights = math.ceil(counts.trained / layout.shards), math.ceil(whole / layout.shards)
    shrunk = (FLOAT32 - compute) * counts.frozen_linear
    match layout.strategy:
        case "single" | "ddp":
            moments = EIGHT_BIT_MOMENTS if layout.eight_bit else MOMENTS
            shrunk += round(counts.in_layers * (compute - _base_bytes(shape, layout)))
            return FLOAT32 * whole - shrunk, FLOAT32 * counts.trained, math.ceil(moments * counts.trained)
        case "zero2":  # also in float32 DeepSpeed keeps a master copy of its own partition
            return compute * whole, FLOAT32 * share, (FLOAT32 + MOMENTS) * share
        case "zero3":
            return compute * of_weights, FLOAT32 * share, (FLOAT32 + MOMENTS) * share
        case "fsdp" | "hsdp":
            return FLOAT32 * of_weights - shrunk // layout.shards, FLOAT32 * share, MOMENTS * share


def _counts(shape: Shape, layout: Layout) -> Counts:
    return layout.counts or Counts(trained=shape.parameters)


def _average(shape: Shape, layout: Layout) -> int:
    """The average of the weights, float32, spread as the moments are."""
    if not layout.averages:
        return 0
    shards = 1 if layout.strategy in ("single", "ddp") else layout.shards
    return FLOAT32 * math.ceil(_counts(shape, layout).trained / shards)


def _buffers(shape: Shape, layout: Layout) -> int:
    counts, compute = _counts(shape, layout), _compute_bytes(layout)
    match layout.strategy:
        case "single" | "ddp":  # autocast keeps each trained matrix's cast until the backward pass has used it
            cast = shape.cast_parameters - counts.frozen_linear + counts.added
            if layout.gradient_checkpointing == "selective":
                cast = math.ceil(cast / shape.layers)  # made again for each layer
            casts = compute * cast if layout.precision != "no" else 0
            return casts + _unrounded(shape, layout)
        case "zero2":
            return _zero_buckets(layout) + _float32_sum(shape, layout)
        case "zero3":
            return _zero_buckets(layout) + _gathered(shape, layout)
        case "fsdp" | "hsdp":
            # A unit's gradients in the compute precision, and their float32 copy for the reduction.
            reduced = (compute + FLOAT32) * min(shape.largest_unit, counts.trained)
            return _gathered(shape, layout) + reduced


def _base_bytes(shape: Shape, layout: Layout) -> float:
    """Of one value of a frozen linear layer."""
    if layout.base_bits is None:
        return _compute_bytes(layout)
    return FOUR_BITS if layout.base_bits == 4 else 1 + FLOAT32 / shape.width


def _unrounded(shape: Shape, layout: Layout) -> int:
    """What one product with a base of 4 or 8 bits works with: its largest matrix in the compute precision, and of
    4 bits the scales in float32."""
    if layout.base_bits is None:
        return 0
    scales = FLOAT32 / 64 if layout.base_bits == 4 else 0
    return round(shape.width * shape.ffn * (_compute_bytes(layout) + scales))


def _zero_buckets(layout: Layout) -> int:
    """The gradients' buckets, and the float32 copy of the one being reduced."""
    copy = FLOAT32 if layout.precision != "no" else 0
    return (ZERO_BUCKETS * _compute_bytes(layout) + copy) * ZERO_BUCKET_ELEMENTS


def _float32_sum(shape: Shape, layout: Layout) -> int:
    """In float32 ZeRO-2 adds each micro-batch's partition to a second one (DeepSpeed 0.19, all_grad_tensors)."""
    if layout.precision != "no" or layout.accumulation == 1:
        return 0
    return FLOAT32 * math.ceil(_counts(shape, layout).trained / layout.shards)


def _gathered(shape: Shape, layout: Layout) -> int:
    """Whole parameters in the compute precision."""
    return _compute_bytes(layout) * gathered_parameters(shape)


def _frame_bytes(shape: Shape, layout: Layout) -> tuple[int, int]:
    """Of one frame of one clip: what the layers keep, and what the backward pass of one layer works with besides."""
    extra = 0
    if _autocast(layout):
        extra = COMPILED_EXTRA_VALUES if layout.compiled else AUTOCAST_EXTRA_VALUES
    layer = _layer_bytes(shape, layout, LAYER_RESIDUALS, LAYER_VALUES + extra, LAYER_FFN_VALUES)
    compute, residual = _compute_bytes(layout), _residual_bytes(layout)
    backward = compute * BACKWARD_FFN_VALUES * shape.ffn + residual * BACKWARD_RESIDUALS * shape.width
    if not layout.gradient_checkpointing:
        return shape.layers * layer, backward
    kept = residual * shape.width
    if layout.gradient_checkpointing == "selective":
        kept = _layer_bytes(shape, layout, SELECTIVE_RESIDUALS, SELECTIVE_VALUES, SELECTIVE_FFN_VALUES)
    return shape.layers * kept, layer + backward


def _layer_bytes(shape: Shape, layout: Layout, residuals: int, values: int, ffn_values: int) -> int:
    """Of one frame in one layer; without cross-attention there is one residual less, if there are several, and three
    values."""
    if not shape.cross_attention:
        residuals, values = max(1, residuals - 1), values - 3
    compute, residual = _compute_bytes(layout), _residual_bytes(layout)
    return compute * (values * shape.width + ffn_values * shape.ffn) + residual * residuals * shape.width


def _text_bytes(shape: Shape, layout: Layout) -> int:
    """Activations of one caption in a T5 in the loop, float32; 0 where its states are cached."""
    if not _counts(shape, layout).text_encoder:
        return 0
    return FLOAT32 * T5_LAYERS * T5_TOKENS * (T5_VALUES * shape.text_width + T5_HEADS * T5_TOKENS)


def _logits_bytes(shape: Shape, layout: Layout) -> int:
    """The final norm and the heads' inputs; every codebook's float32 log-probabilities, kept for the backward pass, and
    what one codebook's cross entropy holds beside them: two gradients in float32, one in the compute precision."""
    compute, residual = _compute_bytes(layout), _residual_bytes(layout)
    inputs = residual * shape.width + compute * shape.width * (shape.codebooks if _autocast(layout) else 1)
    one_codebook = 2 * FLOAT32 + (compute if layout.precision != "no" else 0)
    return inputs + shape.codes * (shape.codebooks * FLOAT32 + one_codebook)


def _autocast(layout: Layout) -> bool:
    return layout.strategy in ("single", "ddp") and layout.precision != "no"


def _compute_bytes(layout: Layout) -> int:
    return FLOAT32 if layout.precision == "no" else HALF


def _residual_bytes(layout: Layout) -> int:
    """Under autocast embeddings, norms and with them the residual stream stay float32."""
    return FLOAT32 if _autocast(layout) else _compute_bytes(layout)


def _gib(count: int) -> str:
    return f"{count / GIB:.2f}"
