"""Between steps a rank holds what the plan says, inside Engine.sampling_model the copy besides, after it no more."""

from __future__ import annotations

from typing import Any

import pytest

from tests.allocations import allocated_bytes
from tests.plans import plan_for
from tests.ranks.cases import steps
from tests.ranks.harness import run_ranks
from trainer.engine import Engine
from trainer.model.source import open_model
from trainer.plan.layout import Samples
from trainer.plan.sampling import copy_bytes, sampling_bytes
from trainer.spec.shapes import KNOWN
from trainer.spec.trainable import count, selection_of

SAMPLES = Samples(sound_frames=100)
SHAPE = KNOWN["debug"]
POSITIONS = 4 * 2048 * SHAPE.width  # no part of the plan: 8 MiB of small
# What else is there. After three steps, 1.1 MB of tensors: examples, and the source's own table of positions. Besides
# 1.2 to 2.4 MB of modules loaded late and the libraries' own, most of it before the second step, then 0.03 MB a step;
# 0.2 MB in one block (2026-11-27). A gradient of all that a rank trains would be 5 or 10 MB.
REST, REST_OF_A_BLOCK = 4.5e6, 0.6e6


class Held:
    """Bytes before, inside and after the block, at the start and after each step."""

    def __init__(self) -> None:
        self.found: list[tuple[int, int, int]] = []

    def __call__(self, engine: Engine) -> None:
        before = allocated_bytes()
        with engine.sampling_model():
            inside = allocated_bytes()
        self.found.append((before, inside, allocated_bytes()))


def held(strategy: str, **named: Any) -> tuple[int, int, int]:
    """After two steps, over what was there before the engine and its source."""
    open_model("debug")  # whatever that loads for good
    watch, start = Held(), allocated_bytes()
    steps(strategy, 2, count=2, watch=watch, **named)
    before, inside, after = watch.found[-1]
    return before - start, inside - start, after - start


CASES: dict[str, tuple[str, int, dict[str, Any]]] = {
    "single": ("single", 1, {}),
    "ddp": ("ddp", 2, {}),
    "zero2": ("zero2", 2, {}),
    "zero3": ("zero3", 2, {}),
    "fsdp": ("fsdp", 2, {}),
    "single bf16": ("single", 1, {"precision": "bf16"}),
    "zero2 bf16": ("zero2", 2, {"precision": "bf16"}),
    "lora": ("fsdp", 2, {"flags": {"lora_rank": 4}}),
    "ema": ("zero2", 2, {"ema_decay": 0.9}),
}
QUICK = ("fsdp",)


@pytest.mark.parametrize(
    "case", [case if case in QUICK else pytest.param(case, marks=pytest.mark.full) for case in CASES]
)
def test_a_rank_holds_between_steps_and_while_sampling_what_the_plan_says(case: str) -> None:
    strategy, world_size, named = CASES[case]
    selection, precision = selection_of(**named.get("flags", {})), named.get("precision", "no")
    plan = plan_for(
        strategy,
        world_size=world_size,
        micro_batch=4 // world_size,
        accumulation=2,
        precision=precision,
        selection=selection,
        ema="ema_decay" in named,
        samples=SAMPLES,
    )
    counts = count(SHAPE, selection)
    while_sampling = sampling_bytes(SHAPE, plan.layout, counts, SAMPLES)
    staying = plan.memory.samples - plan.memory.checkpoint - while_sampling
    source = sum(tensor.numel() * tensor.element_size() for tensor in open_model("debug").weights.values())
    for before, inside, after in run_ranks(world_size, held, strategy, **named):
        copy = copy_bytes(SHAPE, plan.layout, counts)
        assert inside - before == pytest.approx(copy, abs=REST_OF_A_BLOCK) and copy <= while_sampling
        assert after == pytest.approx(before, abs=REST_OF_A_BLOCK)
        if precision == "no":  # in bf16 oneDNN keeps megabytes of its own
            frozen = plan.memory.weights if selection.lora else 0  # of which `steps` keeps a copy
            assert before == pytest.approx(staying + source + POSITIONS + frozen, abs=max(REST, 0.02 * staying))
