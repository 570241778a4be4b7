"""The bytes that GPUs send in a step: published sizes, all kinds of models, what is not trained, several machines."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from scripts.traffic_table import FILE, by_the_libraries_defaults, page
from trainer.plan.communication import tensors_of, traffic
from trainer.plan.layout import Layout, Workload
from trainer.spec.shapes import KNOWN
from trainer.spec.trainable import EVERYTHING, Selection, count, selection_of

GIGA = 1e9
ONCE = {"gathers_once": True, "reduces_once": True}
SHARDING = ("zero2", "zero3", "fsdp", "hsdp")


def layout(strategy: Any, *, selection: Selection = EVERYTHING, **fields: Any) -> Layout:
    """8 GPUs of one machine, bf16, two micro-batches in a step, unless it is said."""
    values = {
        "workload": Workload(segment_frames=1500, selection=selection),
        "world_size": 8,
        "on_gpu": True,
        "mixed_precision": "bf16",
        "micro_batch": 4,
        "accumulation": 2,
    }
    return Layout(strategy=strategy, **values | fields)


# Worked out by hand from 0.42, 1.84 and 3.26 billion parameters: float32 gradients, bf16 weights, 7/8 of each.
@pytest.mark.parametrize(
    "strategy,fields,expected",
    [
        ("ddp", {}, (2.9, 12.9, 22.8)),
        ("zero2", {}, (3.7, 16.1, 28.5)),
        ("zero2", {"reduces_once": True}, (2.2, 9.7, 17.1)),
        ("zero2", {"accumulation": 1}, (2.2, 9.7, 17.1)),
        ("fsdp", {}, (5.9, 25.7, 45.6)),
        ("fsdp", ONCE, (2.2, 9.7, 17.1)),
    ],
)
def test_the_published_sizes_send_what_was_worked_out_by_hand(strategy, fields, expected):
    found = [traffic(KNOWN[name], layout(strategy, **fields)).by_gpu / GIGA for name in ("small", "medium", "large")]
    assert found == pytest.approx(expected, rel=0.02)


def test_deepspeeds_default_sends_more_for_zero2():
    found = [
        by_the_libraries_defaults(KNOWN[name], layout("zero2")).by_gpu / GIGA for name in ("small", "medium", "large")
    ]
    assert found == pytest.approx((6.6, 29.0, 51.3), rel=0.01)


@pytest.mark.parametrize(
    "selection",
    [
        EVERYTHING,
        selection_of(lora_rank=8),
        selection_of(new_rows=3),
        selection_of("layers.0-1,embeddings"),
        selection_of("heads,projection"),
    ],
    ids=Selection.describe,
)
@pytest.mark.parametrize("name", KNOWN)
def test_the_tensors_are_all_parameters_of_the_model(name, selection):
    shape, counts = KNOWN[name], count(KNOWN[name], selection)
    tensors = list(tensors_of(shape, selection))
    assert sum(each.values for each in tensors) == shape.parameters + counts.added
    assert sum(each.values for each in tensors if each.trained) == counts.trained


def test_adapters_of_a_melody_model_may_be_on_its_projections():
    targets = "q_proj,enc_to_dec_proj,audio_enc_to_dec_proj"
    selection = selection_of(lora_rank=4, lora_targets=targets)
    tensors = [each for each in tensors_of(KNOWN["melody"], selection) if each.trained]
    assert sum(each.values for each in tensors) == count(KNOWN["melody"], selection).trained
    assert sum(each.layer is None for each in tensors) == 4


@pytest.mark.parametrize("strategy", ["ddp", *SHARDING])
@pytest.mark.parametrize("selection", [selection_of(lora_rank=8), selection_of("layers.0-23")], ids=["lora", "freeze"])
def test_frozen_weights_have_no_gradients_and_are_gathered_all_the_same(strategy, selection):
    shape = KNOWN["large"]
    whole, part = (traffic(shape, layout(strategy, selection=each)) for each in (EVERYTHING, selection))
    counts = count(shape, selection)
    share = counts.trained / shape.parameters
    assert part.reduced.by_gpu == pytest.approx(share * whole.reduced.by_gpu, rel=2e-3)
    assert part.returned.by_gpu == pytest.approx(share * whole.returned.by_gpu, rel=2e-3)
    added = counts.added / shape.parameters
    assert part.gathered.by_gpu == pytest.approx((1 + added) * whole.gathered.by_gpu, rel=2e-3)


def test_layers_below_all_that_is_trained_are_gathered_for_the_forward_pass_alone():
    shape = KNOWN["large"]
    below = selection_of("embeddings,projection,layers.0-23")
    weights = 2 * 7 / 8 * shape.parameters  # bytes of all, once
    layers = 2 * 7 / 8 * shape.layer_parameters
    rest = 2 * 7 / 8 * shape.rest_parameters
    found = traffic(shape, layout("fsdp", selection=below, accumulation=1)).gathered.by_gpu
    assert found == pytest.approx(weights + 25 * layers, rel=1e-3)  # 24 trained, and one fetched ahead for nothing
    found = traffic(shape, layout("zero3", selection=below, accumulation=1)).gathered.by_gpu
    assert found == pytest.approx(weights + 24 * layers + rest - 2 * 7 / 8 * 200e6, rel=1e-3)


def test_one_process_sends_nothing():
    for strategy in ("single", "zero2"):  # zero2 on one GPU offloads
        assert traffic(KNOWN["large"], layout(strategy, world_size=1)).by_gpu == 0


@pytest.mark.parametrize("strategy,accumulation", [("fsdp", 1), ("fsdp", 4), ("zero2", 1), ("zero2", 4)])
def test_what_is_done_once_does_not_depend_on_the_number_of_micro_batches(strategy, accumulation):
    of_two = traffic(KNOWN["medium"], layout(strategy, **ONCE))
    assert traffic(KNOWN["medium"], layout(strategy, accumulation=accumulation, **ONCE)) == of_two


def test_padding_is_sent_too():
    """Embeddings have 2049 rows: on 8 GPUs 2056 are gathered, and on 2 GPUs 2050."""
    shape = KNOWN["debug"]
    for gpus in (2, 8):
        rows = 4 * (-(-2049 // gpus) * gpus - 2049) * shape.width
        found = traffic(shape, layout("fsdp", world_size=gpus, **ONCE)).reduced.by_gpu
        assert found == 4 * (shape.parameters + rows) * (gpus - 1) // gpus


def test_a_ring_over_two_machines_crosses_each_border_once():
    """Played through for 6 GPUs, three of each machine: what each sends, and what leaves each machine."""
    values = np.arange(6 * 12, dtype=np.float64).reshape(6, 12)  # of each GPU, 12 values in 6 chunks
    reduced, sent = reduce_in_a_ring(values)
    assert np.array_equal(reduced, values.sum(0).reshape(6, 2)), "the ring does not sum"
    assert sent.tolist() == [10] * 6  # (6 - 1) / 6 of 12
    shape, two = KNOWN["debug"], layout("ddp", world_size=6, nodes=2)
    found = traffic(shape, two)
    assert found.by_gpu == 2 * 4 * shape.parameters * 10 // 12
    assert found.across == found.within == found.by_gpu  # GPU 2 sends to GPU 3, and GPU 5 to GPU 0
    alone = traffic(shape, layout("ddp", world_size=2, nodes=2))
    assert (alone.within, alone.across) == (0, alone.by_gpu)


def reduce_in_a_ring(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A reduce-scatter among len(values) GPUs, each of which sends to the next one: the chunks, and what each sent."""
    gpus = len(values)
    held = values.reshape(gpus, gpus, -1).copy()
    sent = np.zeros(gpus, dtype=np.int64)
    for turn in range(gpus - 1):
        chunks = [(gpu - turn - 1) % gpus for gpu in range(gpus)]
        messages = [held[gpu, chunk].copy() for gpu, chunk in enumerate(chunks)]
        for gpu, (chunk, message) in enumerate(zip(chunks, messages, strict=True)):
            held[(gpu + 1) % gpus, chunk] += message
            sent[gpu] += message.size
    return np.stack([held[gpu, gpu] for gpu in range(gpus)]), sent


def test_hsdp_gathers_within_machines_and_sends_shards_between_them():
    shape = KNOWN["large"]
    across = layout("fsdp", world_size=16, nodes=2)
    hybrid, full = (traffic(shape, replace(across, strategy=name)) for name in ("hsdp", "fsdp"))
    one_machine = traffic(shape, layout("fsdp"))
    assert (hybrid.gathered, hybrid.reduced) == (one_machine.gathered, one_machine.reduced)
    assert hybrid.spread.by_gpu == pytest.approx(4 * shape.parameters / 8, rel=1e-3)  # 2 (2-1)/2 of an eighth
    assert hybrid.across == 8 * hybrid.spread.by_gpu and hybrid.spread.within == 0
    assert hybrid.across < full.across / 3
    assert traffic(shape, layout("hsdp")) == one_machine


def test_the_page_is_what_the_script_writes():
    assert FILE.read_text(encoding="utf-8") == page(), "python scripts/traffic_table.py writes it anew"
