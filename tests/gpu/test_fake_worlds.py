"""One rank's share of a large world: what it holds is what the plan says. Without a GPU for the debug model alone."""

from __future__ import annotations

import pytest
import torch

from tests.gpu.fake_world import Share, World, share
from tests.gpu.one_card import gib, say_figure
from tests.ranks.harness import RankProcesses
from trainer.spec.shapes import KNOWN

pytestmark = pytest.mark.timeout(600)
LITTLE = {"compiled": True, "gradient_checkpointing": "selective"}
ONCE = {"gathers_once": True, "reduces_once": True}
WORLDS = [
    World(model="large", strategy="fsdp", ranks=8, micro_batch=4, **LITTLE),  # type: ignore[arg-type]
    World(model="large", strategy="fsdp", ranks=64, micro_batch=4, **LITTLE),  # type: ignore[arg-type]
    World(model="medium", strategy="zero2", ranks=8, micro_batch=4, **LITTLE),  # type: ignore[arg-type]
    World(model="large", strategy="hsdp", ranks=16, nodes=2, micro_batch=4, **LITTLE),  # type: ignore[arg-type]
    World(model="large", strategy="fsdp", ranks=8, micro_batch=4, **LITTLE, **ONCE),  # type: ignore[arg-type]
    World(model="large", strategy="hsdp", ranks=16, nodes=2, micro_batch=4, **LITTLE, **ONCE),  # type: ignore[arg-type]
    World(model="medium", strategy="zero2", ranks=8, micro_batch=4, reduces_once=True, **LITTLE),  # type: ignore[arg-type]
]
MOMENTS = 8  # bytes per parameter: two in float32
MASTERS = 4  # besides, under ZeRO, which holds whole weights to compute with


def of_one_rank(world: World) -> Share:
    """`share` in a process of its own, which on a GPU imports everything itself."""
    environments = [{}] if torch.cuda.is_available() else []
    [(kind, value)] = RankProcesses(1, share, (world,), {}, environments).results(500)
    assert kind == "returned", value
    return value


@pytest.mark.gpu
@pytest.mark.full
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("world", [pytest.param(world, id=str(world)) for world in WORLDS])
def test_a_rank_of_a_large_world_needs_what_the_plan_says(world: World) -> None:
    if world.strategy == "zero2":
        pytest.importorskip("deepspeed")
    found = of_one_rank(world)
    say_figure(
        f"peak {gib(found.peak_bytes)} of planned {gib(found.planned_bytes)}; host {1e3 * found.host_seconds:.0f} ms"
        f" of a step of {1e3 * found.step_seconds:.0f} ms without communication"
    )
    assert found.peak_bytes == pytest.approx(found.planned_bytes, rel=0.10)


SMALL = [
    World(model="debug", strategy="fsdp", ranks=8, frames=60, precision="no"),
    World(model="debug", strategy="hsdp", ranks=8, nodes=2, frames=60, precision="no"),
    World(model="debug", strategy="fsdp", ranks=8, frames=60, precision="no", **ONCE),  # type: ignore[arg-type]
    World(model="debug", strategy="hsdp", ranks=16, nodes=2, frames=60, precision="no", **ONCE),  # type: ignore[arg-type]
    World(model="debug", strategy="zero2", ranks=8, frames=60, precision="no"),
    World(model="debug", strategy="zero2", ranks=8, frames=60, precision="no", reduces_once=True),
]
LONGER = SMALL[2:]


@pytest.mark.parametrize(
    "world",
    [pytest.param(world, marks=[pytest.mark.full] * (world in LONGER), id=str(world)) for world in SMALL],
)
def test_a_rank_of_a_small_models_world_holds_its_share(world: World) -> None:
    zero = world.strategy == "zero2"
    if zero:
        pytest.importorskip("deepspeed")
    found = of_one_rank(world)
    shards, parameters = world.ranks // world.nodes, KNOWN["debug"].parameters
    say_figure(f"weights {found.weight_bytes} bytes, moments {found.optimizer_bytes}")
    assert found.weight_bytes == pytest.approx(4 * parameters / (1 if zero else shards), rel=0.02)
    assert found.optimizer_bytes == pytest.approx((MOMENTS + MASTERS * zero) * parameters / shards, rel=0.02)
