"""Micro-batches beyond the flag's default, and how often weights and gradients travel: what memory allows, and why."""

from __future__ import annotations

import itertools
import json
import random
import re
from dataclasses import replace

import pytest

from scripts.plan_table import cell
from tests.plan.test_plan import SHARDING, asked, asked_by, batch, cpus, gpus
from trainer.errors import MemoryShortError
from trainer.flags.config import Config
from trainer.plan.communication import traffic
from trainer.plan.layout import Checkpointing, Layout
from trainer.plan.memory import GIB, expected_bytes
from trainer.plan.plan import Plan, make_plan
from trainer.plan.strategies import Cluster
from trainer.spec.shapes import KNOWN
from trainer.spec.trainable import selection_of

LORA = selection_of(lora_rank=16)


def plan(
    cluster: Cluster,
    model: str = "small",
    *,
    typed: bool = False,
    global_batch: int | None = None,
    compiles: bool = True,
    **changes: object,
) -> Plan:
    """The plan of a user who typed --batch_size 4, or left it out."""
    flags = replace(batch(global_batch=global_batch), batch_size_typed=typed)
    on_cpu = {"device": "cpu"} if cluster.device == "cpu" else {}
    return make_plan(replace(cluster, compiles=compiles), KNOWN[model], flags, asked(**on_cpu, **changes))


def ways(layout: Layout) -> list[Layout]:
    """Every way in which the engine can gather and sum, all else equal."""
    gathers = [False, True] if layout.strategy in ("fsdp", "hsdp") and layout.world_size > 1 else [False]
    sums = layout.strategy in ("fsdp", "hsdp", "zero2") and layout.world_size > 1 and layout.accumulation > 1
    sums = sums and not layout.offload_optimizer
    return [
        replace(layout, gathers_once=gather, reduces_once=reduce)
        for gather, reduce in itertools.product(gathers, [False, True] if sums else [False])
    ]


def least_bytes(model: str, layout: Layout, micro_batch: int, recompute: Checkpointing) -> int:
    """Memory of the way that needs the least, of 8 clips that are split so."""
    accumulation = 8 // micro_batch
    other = replace(layout, micro_batch=micro_batch, accumulation=accumulation, gradient_checkpointing=recompute)
    return min(expected_bytes(KNOWN[model], way).total for way in ways(other))


def drawn(seed: int, number: int) -> list[tuple[Cluster, str, dict[str, object]]]:
    """Clusters, models and flags at random."""
    draw = random.Random(seed)
    asks: list[dict[str, object]] = [
        {},
        {},
        {"strategy": "fsdp"},
        {"strategy": "hsdp"},
        {"strategy": "zero2"},
        {"mixed_precision": "no"},
        {"global_batch": 96},
        {"global_batch": 960, "strategy": "fsdp"},
        {"ema": True},
        {"selection": LORA, "strategy": "fsdp"},
        {"compiles": False},
        {"gradient_checkpointing": True},
    ]
    return [
        (
            gpus(draw.choice([2, 4, 8]), draw.choice([12, 16, 24, 32, 40, 48, 64, 80, 141]), nodes=draw.choice([1, 2])),
            draw.choice(["small", "medium", "large", "melody"]),
            draw.choice(asks),
        )
        for _ in range(number)
    ]


def test_a_plan_fits_and_moves_no_more_bytes_than_any_other_way_that_fits() -> None:
    seen = set()
    for cluster, model, changes in drawn(0, 250):
        try:
            made = plan(cluster, model, **changes)
        except MemoryShortError:
            continue
        limit = (cluster.gpu_memory_bytes or 0) * (1 if made.micro_batch <= 4 else 0.85)
        assert made.memory == expected_bytes(KNOWN[model], made.layout) and made.memory.total <= limit
        own = traffic(KNOWN[model], made.layout).by_gpu
        for other in ways(made.layout):
            if expected_bytes(KNOWN[model], other).total <= limit:
                assert own <= traffic(KNOWN[model], other).by_gpu, (made.layout, other)
        assert made.layout in ways(made.layout) and made.micro_batch <= 16
        seen.add((made.strategy, made.layout.gathers_once, made.layout.reduces_once, made.micro_batch > 4))
    # What was drawn shows each way, and micro-batches of more clips than 4.
    for strategy in ("fsdp", "hsdp"):
        assert {one[1:3] for one in seen if one[0] == strategy} >= {(True, True), (True, False), (False, False)}
    assert {one[2] for one in seen if one[0] == "zero2"} == {True, False}
    assert {one[0] for one in seen if one[3]} >= {"fsdp", "hsdp", "zero2"}


def test_no_way_to_send_less_costs_clips_or_recomputing() -> None:
    """Clips and recomputing are those of the first that fits in any way."""
    seen = set()
    for cluster, model, changes in drawn(1, 150):
        if "global_batch" in changes or "gradient_checkpointing" in changes:
            continue
        try:
            made = plan(cluster, model, typed=True, **changes)
        except MemoryShortError:
            continue
        little: list[Checkpointing] = [False, "selective"] if made.compiled else [False]
        order: list[tuple[int, Checkpointing]] = list(itertools.product([4, 2, 1], little))
        order += [(4, True), (2, True), (1, True)]
        fitting = (
            (micro_batch, recompute)
            for micro_batch, recompute in order
            if least_bytes(model, made.layout, micro_batch, recompute) <= (cluster.gpu_memory_bytes or 0)
        )
        assert next(fitting) == (made.micro_batch, made.gradient_checkpointing)
        seen.add((made.micro_batch, made.gradient_checkpointing))
    assert len(seen) >= 6


def test_a_wider_micro_batch_refuses_nothing_that_fitted_and_keeps_the_steps_clips() -> None:
    wider = 0
    for cluster, model, changes in drawn(2, 120):
        try:
            typed = plan(cluster, model, typed=True, **changes)
        except MemoryShortError:
            continue
        free = plan(cluster, model, **changes)
        assert free.global_batch == typed.global_batch
        assert SHARDING.index(free.strategy) <= SHARDING.index(typed.strategy)
        if free.strategy == typed.strategy:
            assert free.micro_batch >= typed.micro_batch
            assert (free.gradient_checkpointing is True) <= (typed.gradient_checkpointing is True)
        wider += free.micro_batch > typed.micro_batch
    assert wider > 20


def test_up_to_16_clips_within_85_percent_of_a_known_memory() -> None:
    made = plan(gpus(1, 80), "small", global_batch=64)
    assert (made.micro_batch, made.accumulation) == (16, 4)
    assert plan(gpus(1, 80), "small").micro_batch == 8  # of 8 clips by default
    total = plan(gpus(1, 80), "small").memory.total / GIB
    within = plan(gpus(1, total / 0.849), "small")
    assert (within.micro_batch, within.accumulation, within.gradient_checkpointing) == (8, 1, False)
    assert "micro-batch 8, above --batch_size's default of 4, within 85 % of" in within.describe()
    beyond = plan(gpus(1, total / 0.851), "small")
    assert (beyond.micro_batch, beyond.gradient_checkpointing) == (8, "selective")
    assert "so that micro-batch 8 fits" in beyond.describe() and "no checkpointing would take" in beyond.describe()
    eager = plan(gpus(1, total / 0.851), "small", compiles=False)
    assert (eager.micro_batch, eager.accumulation, eager.gradient_checkpointing) == (4, 2, False)


@pytest.mark.parametrize(
    ("cluster", "changes"),
    [
        (cpus(1), {}),
        (replace(cpus(1), gpu_memory_bytes=500 * GIB, host_memory_bytes=600 * GIB), {}),
        (gpus(1, None), {}),
        (gpus(1, 80), {"dropout": True}),
        (gpus(1, 80), {"typed": True}),
    ],
    ids=["cpu", "cpu with memory", "unknown memory", "dropout", "typed"],
)
def test_4_clips_stay_the_most_of_a_micro_batch_elsewhere(cluster: Cluster, changes: dict[str, object]) -> None:
    made = plan(cluster, "small", **changes)
    assert (made.micro_batch, made.accumulation) == (4, 2)
    told = any("with dropout the numbers depend on them" in reason for reason in made.reasons)
    assert told == ("dropout" in changes)


def test_flags_of_dropout_reach_the_plan() -> None:
    assert asked_by("--dropout", "0.1").dropout
    assert asked_by("--lora_rank", "4", "--lora_dropout", "0.1").dropout
    assert not asked_by("--lora_rank", "4").dropout


def test_a_typed_batch_size_may_take_all_memory() -> None:
    needed = expected_bytes(KNOWN["small"], plan(gpus(1, 80), "small").layout).total / GIB
    flags = batch(8, 1)
    assert make_plan(replace(gpus(1, needed + 0.1), compiles=True), KNOWN["small"], flags, asked()).micro_batch == 8


def test_where_nothing_can_be_saved_weights_and_gradients_travel_as_they_must() -> None:
    neither = [
        plan(gpus(1, 80), "small", strategy="fsdp"),
        plan(gpus(8, 80), "small", strategy="ddp"),
        plan(gpus(8, 80), "small", strategy="zero3", typed=True),
        plan(gpus(8, 80), "small", strategy="zero2"),  # 8 x 1: gradients are complete after the one micro-batch
        plan(gpus(8, 80), "small", strategy="zero2", typed=True, offload_optimizer=True),
        plan(gpus(8, None), "large"),  # of unknown memory as little is taken as can be
    ]
    assert not any(made.layout.gathers_once or made.layout.reduces_once for made in neither)
    alone = plan(gpus(8, 141), "large", global_batch=64)
    assert alone.accumulation == 1 and alone.layout.gathers_once and not alone.layout.reduces_once


def test_the_plan_tells_what_is_sent_less_and_what_it_costs() -> None:
    """large has 3.257 billion weights: on 8 GPUs 7/8 of 2 bytes each are sent to gather, and of 4 bytes to sum."""
    made = plan(gpus(8, 80), "large", typed=True)
    reason = next(one for one in made.reasons if one.startswith("weights are gathered once a step and gradients"))
    saved, cost = map(float, re.findall(r"(\d+\.\d) G", reason))
    assert saved == pytest.approx(3.257 * 7 / 8 * (3 * 2 + 4), rel=0.01)  # 3 gathers less of 4, 1 sum less of 2
    frugal = replace(made.layout, gathers_once=False, reduces_once=False)
    assert cost == pytest.approx((made.memory.total - expected_bytes(KNOWN["large"], frugal).total) / GIB, abs=0.05)
    assert "between processes: weights gathered once a step, gradients summed once a step" in made.describe()
    stored = json.loads(json.dumps(made.to_dict()))
    assert stored["gathers_once"] is stored["reduces_once"] is True
    assert stored["exchange"] == "weights gathered once a step, gradients summed once a step"


def test_the_plan_tells_what_would_have_been_needed_to_send_less() -> None:
    made = plan(gpus(8, 24), "large", typed=True)
    assert not made.layout.gathers_once and not made.layout.reduces_once
    for field, start in (("gathers_once", "weights are gathered for every"), ("reduces_once", "gradients are summed")):
        reason = next(one for one in made.reasons if one.startswith(start))
        needed = expected_bytes(KNOWN["large"], replace(made.layout, **{field: True})).total / GIB
        assert f"would need {needed:.1f} of 24.0 GiB" in reason and needed > 24
    assert "between processes" not in plan(gpus(1, 80), "small").describe()
    crossing = plan(gpus(8, 40, nodes=2), "large", typed=True, strategy="hsdp").describe()
    assert "gradients summed after every micro-batch (once a step between machines)" in crossing
    assert all(len(line) <= 150 for line in crossing.splitlines())


def test_a_cell_of_the_table_names_the_way() -> None:
    config = Config(dataset_path="music")
    for gib, marks in ((24, ""), (40, "**g**"), (80, "**g**")):
        shown = cell(KNOWN["large"], config, 8, gib)
        assert ("**g**" in shown, "**r**" in shown) == ("g" in marks, "r" in marks), shown
    assert "**r**" in cell(KNOWN["medium"], config, 8, 40)
