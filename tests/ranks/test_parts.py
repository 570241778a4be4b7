"""Training a part: the numbers of one process under every strategy, nothing frozen moves, any strategy continues."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.ranks.cases import GLOBAL_BATCH, LENGTHS, Numbers, differences, steps
from tests.ranks.harness import run_ranks
from tests.rounding import LOSS, NORM
from trainer.plan.layout import Layout, Workload
from trainer.plan.memory import expected_bytes
from trainer.spec.shapes import KNOWN
from trainer.spec.trainable import count, selection_of

pytestmark = pytest.mark.numbers
STEPS = 20
EPOCHS = -(-STEPS * GLOBAL_BATCH // len(LENGTHS))
MODES: dict[str, dict[str, Any]] = {"freeze": {"freeze": "embeddings,layers.0"}, "lora": {"lora_rank": 4}}
STRATEGIES = ("ddp", "zero2", "zero3", "fsdp")
QUICK = {("freeze", "fsdp"), ("lora", "ddp")}
CASES = [(mode, strategy) for mode in MODES for strategy in STRATEGIES]
# Saved under the first on 2 ranks, continued under the second on so many.
ELASTIC_QUICK = {("lora", "fsdp", "zero2", 2)}
ELASTIC = [
    (mode, before, after, n)
    for mode in MODES
    for before in STRATEGIES
    for after, n in [("single", 1), *((strategy, n) for strategy in STRATEGIES for n in (2, 3))]
]


def trained(mode: str, world_size: int, strategy: str, **named: Any) -> list[Numbers]:
    # With weight decay, as `steps` has it, and an average of the weights.
    return run_ranks(world_size, steps, strategy, 1, flags=MODES[mode], epochs=EPOCHS, ema_decay=0.9, **named)


@cache
def reference(mode: str) -> Numbers:
    return trained(mode, 1, "single", count=STEPS)[0]


def marked(cases: list[Any], quick: set[Any]) -> list[Any]:
    return [case if case in quick else pytest.param(*case, marks=pytest.mark.full) for case in cases]


@pytest.mark.parametrize("mode,strategy", marked(CASES, QUICK))
def test_twenty_steps_have_the_losses_of_one_process_and_move_nothing_frozen(mode, strategy):
    found = trained(mode, 2, strategy, count=STEPS)
    assert len(found[0].losses) == STEPS and found[0].losses[-1] < found[0].losses[0]
    loss, norm = differences(found[0], reference(mode))
    assert loss <= LOSS and norm <= NORM
    for numbers in (reference(mode), *found):
        assert numbers.frozen > 0 and numbers.moved == []
    assert_bytes_as_planned(mode, strategy, found)


def assert_bytes_as_planned(mode: str, strategy: str, found: list[Numbers]) -> None:
    """Gradients and optimizer state are held for what is trained and for nothing else, as the plan says."""
    selection = selection_of(**MODES[mode])
    counts = count(KNOWN["debug"], selection)
    layout = Layout(
        workload=Workload(segment_frames=40, selection=selection),
        strategy=strategy,  # type: ignore[arg-type]
        world_size=2,
        on_gpu=False,
        mixed_precision="no",
        micro_batch=4,
        accumulation=1,
    )
    memory = expected_bytes(KNOWN["debug"], layout)
    shards, optimizer = 1 if strategy == "ddp" else 2, 12 if strategy in ("zero2", "zero3") else 8
    assert memory.optimizer == pytest.approx(optimizer * counts.trained / shards, rel=0.01)
    for numbers in found:
        assert numbers.weight_bytes == pytest.approx(memory.weights, rel=0.05)
        assert numbers.gradient_bytes == pytest.approx(memory.gradients, rel=0.05)
        assert numbers.optimizer_bytes == pytest.approx(memory.optimizer, rel=0.05)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Folders with a checkpoint after step 3, by mode and strategy that saved it on 2 ranks."""

    @cache
    def folder(mode: str, strategy: str) -> Path:
        made = tmp_path_factory.mktemp(f"{mode}-{strategy}")
        trained(mode, 2, strategy, count=3, folder=str(made), save_at=3)
        return made

    return folder


@pytest.mark.parametrize("mode,before,after,world_size", marked(ELASTIC, ELASTIC_QUICK))
def test_any_strategy_continues_what_another_saved(mode, before, after, world_size, saved):
    found = trained(mode, world_size, after, count=3, folder=str(saved(mode, before)))[0]
    undisturbed = Numbers(losses=reference(mode).losses[3:6], norms=reference(mode).norms[3:6])
    loss, norm = differences(found, undisturbed)
    assert len(found.losses) == 3 and loss <= LOSS and norm <= NORM
