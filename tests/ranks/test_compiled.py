"""Compiled layers give the numbers of one eager process, under every strategy that compiles and whatever is recomputed.

The clips are ragged, some without a caption, and the last step has a single one: each changes what is compiled for.
"""

from __future__ import annotations

from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import rounding
from tests.ranks.cases import LENGTHS, Numbers, differences, part_of, steps, undisturbed
from tests.ranks.harness import run_ranks
from trainer.engine.compiled import MOST_GRAPHS
from trainer.plan.layout import Checkpointing
from trainer.spec.shapes import KNOWN

pytestmark = pytest.mark.numbers
STRATEGIES = ("single", "ddp", "zero2", "fsdp")
WAYS: tuple[Checkpointing, ...] = (False, "selective", True)
# What else than the whole model is trained.
PARTS: dict[str, dict[str, Any]] = {
    "adapters": {"lora_rank": 4},
    "adapters beside 4 bits": {"lora_rank": 4, "base_bits": 4},
    "a word": {"tune_text": True, "placeholder_vectors": 4, "lr": 0.5},
}
COUNT = 11
UNEVEN = (40, 39, 20, 5, 6, 4, 5, 7, 6)  # frames of few long clips and many short ones
CAPTIONED = 10  # steps before the last, whose single clip has no caption: of a word its gradient is 0
# Fused kernels add in another order, and leave out or add roundings between operations.
LOSS, NORM = 3 * rounding.LOSS, 3 * rounding.NORM


@cache
def eager(part: str | None = None, model: str = "debug") -> Numbers:
    if part is None:
        return undisturbed(model=model)[0]
    return run_ranks(1, steps, "single", 1, model=model, count=count_of(part), flags=PARTS[part])[0]


def count_of(part: str | None) -> int:
    return CAPTIONED if part == "a word" else COUNT


def assert_the_same(
    strategy: str,
    recomputed: Checkpointing,
    part: str | None = None,
    count: int | None = None,
    model: str = "debug",
) -> list[Numbers]:
    """The numbers of compiled layers, on one process or two, are those of one eager process; returns them."""
    ranks, count, flags = 1 if strategy == "single" else 2, count or count_of(part), PARTS.get(part or "")
    layout = {"compiled": True, "checkpointing": recomputed}
    found = run_ranks(ranks, steps, strategy, 1, model=model, count=count, flags=flags, **layout)
    assert len(found[0].losses) == count
    assert all(numbers.losses == found[0].losses for numbers in found)
    loss, norm = differences(found[0], part_of(eager(part, model), 0, count))
    assert loss <= LOSS and norm <= NORM
    assert eager(part, model).graphs == 0 and all(numbers.graphs > 0 for numbers in found), "nothing was compiled"
    assert all(numbers.moved == [] for numbers in found)
    return found


def test_ten_ragged_steps_need_one_graph_and_have_the_numbers_of_an_eager_process() -> None:
    """The eleventh step of the matrix below, of a single clip, needs a second, whose compiling takes as long again."""
    [found] = assert_the_same("single", "selective", count=CAPTIONED)
    assert found.graphs == 1


@pytest.mark.full
def test_unequal_micro_batches_need_a_graph_for_one_row_and_for_several_and_not_for_each_number_of_rows() -> None:
    """Four micro-batches of 8 rows in each of ten steps. The kinds are at most eight: one row or several, one text
    token or several, with and without a mask; lengths and numbers of rows add none."""
    [found] = run_ranks(1, steps, "single", 4, count=CAPTIONED, lengths=UNEVEN, compiled=True)
    shapes = {count for counts in found.row_counts for count in counts}
    assert 1 in shapes and len(shapes) >= 3
    assert found.graphs <= 8 < MOST_GRAPHS


@pytest.mark.full
@pytest.mark.parametrize(
    "strategy,model", [("single", "debug-stereo"), *((strategy, "debug-melody") for strategy in STRATEGIES)]
)
def test_stereo_and_melody_models_have_them_too_and_need_no_more_graphs(strategy: str, model: str) -> None:
    found = assert_the_same(strategy, "selective", model=model, count=CAPTIONED)
    if strategy == "single":
        assert found[0].graphs == 1


@pytest.mark.full
@pytest.mark.parametrize("part", PARTS)
def test_a_part_of_a_melody_model_has_them_too(part: str) -> None:
    if "bits" in part:
        pytest.importorskip("bitsandbytes")
    assert_the_same("single", "selective", part, model="debug-melody")


class CompiledParts:
    """Writes how many graphs this rank found, and of how many parts the compiler made code, to a file of the rank."""

    def __init__(self, folder: Path):
        self._folder = folder

    def __call__(self, engine: Any) -> None:
        counters = torch._dynamo.utils.counters
        text = f"{counters['stats']['unique_graphs']} {counters['aot_autograd']['ok']}"
        (self._folder / str(engine.ranks.rank)).write_text(text)


# No micro-batch needs a mask over its text: layers with one are another graph, and which has one differs by rank.
ALIKE = ["two words"] * len(LENGTHS)


def steps_in_small_buckets(watch: Any) -> Numbers:
    """Two steps of compiled layers under ddp, which sends gradients whenever 1 MB of them is there."""
    from trainer.engine import accelerator

    plain = accelerator.DistributedDataParallelKwargs
    accelerator.DistributedDataParallelKwargs = partial(plain, bucket_cap_mb=1)  # type: ignore[assignment,misc]
    return steps("ddp", 1, count=2, compiled=True, watch=watch, captions=ALIKE)


@pytest.mark.full
def test_ddp_has_the_graphs_of_one_process_where_a_bucket_is_smaller_than_a_layer(tmp_path: Path) -> None:
    assert 4 * KNOWN["debug"].layer_parameters > 2**20
    folders = one, two = tmp_path / "one", tmp_path / "two"
    for folder in folders:
        folder.mkdir()
    run_ranks(1, partial(steps, captions=ALIKE), "single", 1, count=2, compiled=True, watch=CompiledParts(one))
    run_ranks(2, steps_in_small_buckets, CompiledParts(two))
    alone = (one / "0").read_text()
    assert alone == "1 1" and [(two / str(rank)).read_text() for rank in range(2)] == [alone, alone]


@pytest.mark.full
@pytest.mark.parametrize("recomputed", WAYS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_losses_and_norms_are_those_of_one_eager_process(strategy: str, recomputed: Checkpointing) -> None:
    assert_the_same(strategy, recomputed)


@pytest.mark.full
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("strategy", ["single", "ddp", "fsdp"])
def test_a_part_that_is_trained_alone_has_them_too(strategy: str, part: str) -> None:
    if "bits" in part:
        pytest.importorskip("bitsandbytes")
        if strategy == "fsdp":
            pytest.skip("such a base is never sharded")
    assert_the_same(strategy, "selective", part)
