"""Bytes that the GPUs of a run send to each other in an optimizer step: formulas of the model's shape and the layout.

What is counted are the tensors given to the collectives, times what a ring makes of them. One convention holds
everywhere: the bytes that one GPU sends, on average over the GPUs of the group. For a tensor of S bytes, whole, and n
GPUs these are S (n-1)/n for an all-gather, a reduce-scatter, a reduce to one GPU and a broadcast, and twice that for an
all-reduce (Patarasuk and Yuan 2009, "Bandwidth optimal all-reduce algorithms"; the same factors are in NVIDIA's
nccl-tests, doc/PERFORMANCE.md). In a reduce or a broadcast, every GPU but one sends all of S. A GPU receives as much
as it sends.

Which collectives there are, by the sources of DeepSpeed 0.19.8, torch 2.13 and accelerate 1.15:

ddp     torch/nn/parallel/distributed.py and its Reducer in C++ all-reduce the float32 gradients, in buckets without
        padding, in the backward pass of the step's last micro-batch (no_sync in those before).
zero2   deepspeed/runtime/zero/stage_1_and_2.py. average_tensor takes each bucket of gradients apart by the GPUs that
        own the pieces; allreduce_no_retain and allreduce_bucket send each piece to its owner: dist.reduce, in float32
        (communication_data_type in trainer/engine/accelerator.py), without padding. That is with
        use_multi_rank_bucket_allreduce off; on, as it is by default, the whole bucket is all-reduced. After the step,
        all_gather_dp_groups (deepspeed/runtime/utils.py) calls dist.all_gather_into_tensor on the flat weights in the
        precision of the computation, padded to a multiple of 2 x GPUs (nccl_start_alignment_factor).
zero3   deepspeed/runtime/zero/partition_parameters.py, all_gather_coalesced: each parameter in the precision of the
        computation, padded to a multiple of the GPUs, once in the forward and once in the backward pass. Only what is
        fetched ahead across the turn from forward to backward is gathered once, up to as many values as may be whole
        at once (stage3_max_live_parameters; fetch_sub_module and __params_to_release in
        partitioned_param_coordinator.py). stage3.py, __avg_scatter_grads, and reduce_scatter_coalesced: the gradients
        in float32, padded alike, in every micro-batch.
fsdp    torch/distributed/fsdp/_fully_shard/_fsdp_collectives.py. foreach_all_gather: the weights of a unit (a layer, or
        all outside the layers) in the precision of the computation (param_dtype). foreach_reduce: reduce-scatter of a
        unit's gradients in float32 (reduce_dtype). Both with each tensor's first dimension padded to a multiple of the
        GPUs (_get_dim0_padded_size in _fsdp_common.py). The unit outside the layers stays whole from a forward pass
        to its backward pass, where layers are gathered again: accelerate/utils/fsdp_utils.py, fsdp2_prepare_model,
        leaves the root to torch, which keeps it (FSDPState._lazy_init).
hsdp    as fsdp among the GPUs of a machine; then foreach_reduce all-reduces each GPU's shard of the float32 gradients
        among the machines, once a step (set_requires_all_reduce).

Frozen weights are gathered as trained ones are, and have no gradients. Frozen layers at the bottom, below which nothing
is trained, have no backward pass either and are gathered for the forward pass alone; but FSDP fetches one layer ahead
(FSDPParamGroup._backward_prefetch), so that it gathers the uppermost of them for nothing.

The few bytes by which the engine sums losses and norms, and DeepSpeed looks for overflows, are left out.
tests/ranks/test_bytes_moved.py compares the formulas with what the libraries give to gloo.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from trainer.plan.layout import FLOAT32, Layout
from trainer.spec.shapes import Shape
from trainer.spec.trainable import (
    ATTENTION,
    ATTENTIONS,
    EMBEDDINGS,
    HEADS,
    MELODY_PROJECTION,
    PROJECTION,
    SELF,
    TEXT_PROJECTION,
    Selection,
)

ZERO2_ALIGNMENT = 2  # values per GPU to whose multiple ZeRO-2 pads: nccl_start_alignment_factor
# The most parameters that ZeRO-3 may keep gathered: two layers of `large` (67 M each), its embeddings and heads.
# trainer/engine/accelerator.py gives it to DeepSpeed as stage3_max_live_parameters.
ZERO_LIVE_PARAMETERS = 200_000_000


@dataclass(frozen=True, kw_only=True)
class Sent:
    """Bytes of one kind of collective in an optimizer step.

    by_gpu   what one GPU sends, wherever the receiver is
    within   what a GPU sends to another GPU of its machine: the same, but 0 where every receiver is elsewhere
    across   what one machine sends to other machines. A ring over all GPUs enters and leaves each machine once, so that
             this is what one GPU sends; in a group that has one GPU of each machine, it is that of all its GPUs
    overlaps whether it goes on while the GPU computes
    """

    by_gpu: int = 0
    within: int = 0
    across: int = 0
    overlaps: bool = True


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """What is sent in an optimizer step, by kind.

    gathered  weights, gathered for forward and backward passes
    reduced   gradients; under hsdp within the machines
    spread    gradients under hsdp, among the machines
    returned  updated weights, from the GPUs that own them to all (zero2)
    """

    gathered: Sent = Sent()
    reduced: Sent = Sent()
    spread: Sent = Sent()
    returned: Sent = Sent()

    @property
    def kinds(self) -> dict[str, Sent]:
        """All kinds by name."""
        names = ("gathered", "reduced", "spread", "returned")
        return {name: getattr(self, name) for name in names}

    @property
    def by_gpu(self) -> int:
        """Bytes that one GPU sends."""
        return sum(sent.by_gpu for sent in self.kinds.values())

    @property
    def within(self) -> int:
        """Bytes that a GPU sends to another GPU of its machine."""
        return sum(sent.within for sent in self.kinds.values())

    @property
    def across(self) -> int:
        """Bytes that one machine sends to others."""
        return sum(sent.across for sent in self.kinds.values())


@dataclass(frozen=True, kw_only=True)
class Tensors:
    """Equal parameters of a model.

    layer    of the decoder that they are in; None outside the layers
    rows     first dimension of each
    columns  the product of the others
    count    how many there are
    """

    layer: int | None
    rows: int
    columns: int = 1
    count: int = 1
    trained: bool

    @property
    def values(self) -> int:
        return self.rows * self.columns * self.count

    def padded_rows(self, shards: int) -> int:
        """Values where the first dimension is padded to a multiple of `shards`."""
        return _up(self.rows, shards) * self.columns * self.count

    def padded(self, shards: int) -> int:
        """Values where each tensor as a whole is padded to a multiple of `shards`."""
        return _up(self.rows * self.columns, shards) * self.count


def traffic(shape: Shape, layout: Layout) -> Traffic:
    """What the processes of this layout send in an optimizer step; nothing where there is one process."""
    if layout.world_size == 1:
        return Traffic()
    tensors = _tensors(shape, layout.workload.selection)
    match layout.strategy:
        case "single":
            return Traffic()
        case "ddp":
            gradients = FLOAT32 * sum(tensors_.values for tensors_ in tensors if tensors_.trained)
            return Traffic(reduced=_ring(layout, 2 * gradients))
        case "zero2":
            return _zero2(layout, sum(tensors_.values for tensors_ in tensors if tensors_.trained))
        case "zero3":
            return _zero3(layout, tensors)
        case "fsdp" | "hsdp":
            return _fsdp(shape, layout)


@lru_cache(maxsize=64)  # a plan asks for the traffic of many layouts of one model
def _tensors(shape: Shape, selection: Selection) -> tuple[Tensors, ...]:
    return tuple(tensors_of(shape, selection))


def _zero2(layout: Layout, trained: int) -> Traffic:
    """Without overlap_comm, reduces run in the stream of the computation, and nothing is computed beside them."""
    times = 1 if layout.reduces_once else layout.accumulation
    weights = layout.compute_bytes * _up(trained, ZERO2_ALIGNMENT * layout.world_size)
    return Traffic(
        reduced=_ring(layout, times * FLOAT32 * trained, overlaps=False),
        returned=_ring(layout, weights, overlaps=False),
    )


def _zero3(layout: Layout, tensors: tuple[Tensors, ...]) -> Traffic:
    first = _first_with_gradients(layout.workload.selection)
    weights = sum(each.padded(layout.world_size) for each in tensors)
    again = sum(each.padded(layout.world_size) for each in tensors if each.layer is None or each.layer >= first)
    again -= min(again, ZERO_LIVE_PARAMETERS)
    gradients = FLOAT32 * sum(each.padded(layout.world_size) for each in tensors if each.trained)
    return Traffic(
        gathered=_ring(layout, layout.accumulation * layout.compute_bytes * (weights + again)),
        reduced=_ring(layout, layout.accumulation * gradients),
    )


def _fsdp(shape: Shape, layout: Layout) -> Traffic:
    weights, again, trained = _fsdp_values(shape, layout.workload.selection, layout.shards)
    gathered = weights if layout.gathers_once else layout.accumulation * (weights + again)
    gradients = FLOAT32 * trained
    reductions = 1 if layout.reduces_once else layout.accumulation
    hybrid = layout.strategy == "hsdp" and layout.nodes > 1
    return Traffic(
        gathered=_ring(layout, layout.compute_bytes * gathered),
        reduced=_ring(layout, reductions * gradients),
        spread=_among_machines(layout, gradients // layout.shards) if hybrid else Sent(),
    )


@lru_cache(maxsize=64)
def _fsdp_values(shape: Shape, selection: Selection, shards: int) -> tuple[int, int, int]:
    """Values with their padding: of all weights, of those that the backward pass gathers again, of gradients."""
    first = _first_with_gradients(selection) - 1
    padded = [(each, each.padded_rows(shards)) for each in _tensors(shape, selection)]
    again = sum(values for each, values in padded if each.layer is not None and each.layer >= first)
    return sum(values for _, values in padded), again, sum(values for each, values in padded if each.trained)


def _first_with_gradients(selection: Selection) -> int:
    """The lowest layer through which gradients go: 0 but where nothing below, or beside it, is trained.

    All layers attend to the projected text, or have it in front, so that a trained projection needs gradients from
    layer 0 on; so do adapters and a new word.
    """
    if selection.lora or selection.new_rows or not {EMBEDDINGS, PROJECTION} <= set(selection.frozen_parts):
        return 0
    return next(layer for layer in itertools.count() if layer not in selection.frozen_layers)


def _ring(layout: Layout, size: int, *, overlaps: bool = True) -> Sent:
    """What a ring over all GPUs that share the shards sends of tensors of so many bytes in all, each once."""
    by_gpu = size * (layout.shards - 1) // layout.shards
    gpus = layout.world_size // layout.nodes
    crosses = layout.nodes > 1 and layout.shards > gpus
    return Sent(by_gpu=by_gpu, within=by_gpu if gpus > 1 else 0, across=by_gpu if crosses else 0, overlaps=overlaps)


def _among_machines(layout: Layout, size: int) -> Sent:
    """What an all-reduce of so many bytes sends, in groups of one GPU of each machine."""
    by_gpu = 2 * size * (layout.nodes - 1) // layout.nodes
    return Sent(by_gpu=by_gpu, across=by_gpu * layout.shards)


def tensors_of(shape: Shape, selection: Selection) -> Iterator[Tensors]:
    """The parameters of the wrapped model: the language model's, adapters, and new rows of T5's embedding.

    A T5 in the loop is not wrapped: every process has a whole one.
    """
    alone = bool(selection.lora or selection.new_rows)  # whether nothing of the language model itself is trained
    for layer in range(shape.layers):
        trained = not alone and layer not in selection.frozen_layers
        attentions = 2 if shape.cross_attention else 1
        norms = 2 * (attentions + 1)
        yield Tensors(layer=layer, rows=shape.width, columns=shape.width, count=4 * attentions, trained=trained)
        yield Tensors(layer=layer, rows=shape.ffn, columns=shape.width, trained=trained)
        yield Tensors(layer=layer, rows=shape.width, columns=shape.ffn, trained=trained)
        yield Tensors(layer=layer, rows=shape.width, count=norms, trained=trained)
    trains = {part: not alone and part not in selection.frozen_parts for part in (EMBEDDINGS, HEADS, PROJECTION)}
    yield _outside(shape.codes + 1, shape.width, trains[EMBEDDINGS], count=shape.codebooks)
    yield _outside(shape.codes, shape.width, trains[HEADS], count=shape.codebooks)
    yield _outside(shape.width, 1, trains[HEADS], count=2)  # the last norm
    for inputs in (shape.text_width, shape.chroma_bins):
        if inputs:
            yield _outside(shape.width, inputs, trains[PROJECTION])
            yield _outside(shape.width, 1, trains[PROJECTION])
    if selection.new_rows:
        yield _outside(selection.new_rows, shape.text_width, True)
    yield from _adapters(shape, selection)


def _outside(rows: int, columns: int, trained: bool, *, count: int = 1) -> Tensors:
    return Tensors(layer=None, rows=rows, columns=columns, count=count, trained=trained)


def _adapters(shape: Shape, selection: Selection) -> Iterator[Tensors]:
    """The two matrices of every adapter: rank x inputs, and outputs x rank."""
    lora = selection.lora
    if lora is None:
        return
    inputs_outputs = {"fc1": (shape.width, shape.ffn), "fc2": (shape.ffn, shape.width)}
    for kind in ATTENTIONS if shape.cross_attention else (SELF,):
        inputs_outputs |= {f"{kind}.{name}": (shape.width, shape.width) for name in ATTENTION}
    places: list[tuple[int | None, int, int]] = [
        (layer, *sizes) for layer in range(shape.layers) for name, sizes in inputs_outputs.items() if lora.adapts(name)
    ]
    outside = {TEXT_PROJECTION: shape.text_width, MELODY_PROJECTION: shape.chroma_bins}
    places += [(None, inputs, shape.width) for name, inputs in outside.items() if lora.adapts(name)]
    for layer, inputs, outputs in places:
        yield Tensors(layer=layer, rows=lora.rank, columns=inputs, trained=True)
        yield Tensors(layer=layer, rows=outputs, columns=lora.rank, trained=True)


def _up(number: int, step: int) -> int:
    """The least multiple of `step` that is no smaller than `number`."""
    return -(-number // step) * step
