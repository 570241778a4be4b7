"""Parameters, gradients and optimizer state really are sharded, as the plan says."""

from __future__ import annotations

import pytest

from tests.plans import plan_for
from tests.ranks.cases import undisturbed

PARAMETERS = 2_689_408  # debug's decoder and projection

# Bytes of float32 a parameter on each of N ranks: weights, gradients, optimizer (masters apart from weights, moments).
BYTES = {
    "ddp": (4, 4, 8, lambda n: (1, 1, 1)),
    "zero2": (4, 4, 12, lambda n: (1, n, n)),
    "zero3": (4, 4, 12, lambda n: (n, n, n)),
    "fsdp": (4, 4, 8, lambda n: (n, n, n)),
}


CASES = [(strategy, world_size) for strategy in BYTES for world_size in (2, 4)]
QUICK = {("zero2", 2), ("fsdp", 2)}


@pytest.mark.parametrize(
    "strategy,world_size",
    [case if case in QUICK else pytest.param(*case, marks=pytest.mark.full) for case in CASES],
)
def test_each_rank_holds_its_share(strategy, world_size):
    *per_parameter, shards = BYTES[strategy]
    expected = [PARAMETERS * each / n for each, n in zip(per_parameter, shards(world_size), strict=True)]
    found = undisturbed(strategy, world_size)
    for numbers in found:
        held = (numbers.weight_bytes, numbers.gradient_bytes, numbers.optimizer_bytes)
        for part, bytes_, wanted in zip(("weights", "gradients", "optimizer"), held, expected, strict=True):
            assert bytes_ == pytest.approx(wanted, rel=0.05), part
    memory = plan_for(strategy, world_size=world_size, micro_batch=8 // world_size).memory
    for part, wanted in zip(("weights", "gradients", "optimizer"), expected, strict=True):
        assert getattr(memory, part) == pytest.approx(wanted, rel=0.05), f"the plan's {part}"
    if strategy != "ddp":
        total = per_parameter[2] * PARAMETERS
        assert max(numbers.optimizer_bytes for numbers in found) <= 1.05 * total / world_size


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.full)])
def test_adamw_steps_on_plain_tensors(world_size):
    """An operation on a DTensor costs the host several times as much, for each of hundreds of parameters."""
    assert [numbers.dtensors for numbers in undisturbed("fsdp", world_size)] == [0] * world_size
