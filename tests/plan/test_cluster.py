"""All ranks plan for what every one of them has, and for the memory that NCCL takes where there are several."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.plan.test_plan import gpus, plan
from trainer.plan.memory import FRAGMENTATION, GIB, bytes_to_be_free
from trainer.plan.strategies import Cluster, common_cluster


def found(**changes: object) -> Cluster:
    return replace(gpus(4, 80, host_gib=500), **{"compiles": True, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "changes",
    [
        {"gpu_memory_bytes": 80 * GIB - 1},
        {"host_memory_bytes": 400 * GIB},
        {"compiles": False},
        {"supports_bf16": False},
    ],
)
def test_ranks_that_differ_plan_for_the_least_whichever_rank_has_it(changes: dict[str, object]) -> None:
    least = found(**changes)
    for rank in range(4):
        clusters = [found()] * 4
        clusters[rank] = least
        assert common_cluster(clusters) == least


def test_memory_that_one_rank_does_not_know_is_unknown() -> None:
    assert common_cluster([found(), found(gpu_memory_bytes=None)]).gpu_memory_bytes is None


@pytest.mark.parametrize(
    ("strategy", "nodes", "communicators"),
    [("ddp", 1, 1), ("fsdp", 1, 1), ("fsdp", 2, 1), ("zero2", 1, 2), ("zero3", 2, 2), ("hsdp", 1, 1), ("hsdp", 2, 4)],
)
def test_each_communicator_takes_a_gibibyte_of_every_gpu(strategy: str, nodes: int, communicators: int) -> None:
    made = plan(gpus(4, None, nodes=nodes), strategy=strategy)
    libraries = made.memory.reserve - FRAGMENTATION * max(made.memory.allocated, made.memory.codec)
    assert libraries == pytest.approx((1 + communicators) * GIB, abs=1)
    # When the processes have met, CUDA and the first communicator have theirs already.
    assert bytes_to_be_free(made.memory, made.layout) == made.memory.total - 2 * GIB


@pytest.mark.parametrize("strategy", ["single", "zero2", "zero3", "fsdp"])
def test_one_process_pays_for_no_communicator(strategy: str) -> None:
    made = plan(gpus(1), strategy=strategy)
    libraries = made.memory.reserve - FRAGMENTATION * max(made.memory.allocated, made.memory.codec)
    assert libraries == pytest.approx(GIB, abs=1)
    assert bytes_to_be_free(made.memory, made.layout) == made.memory.total - GIB
