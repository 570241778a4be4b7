"""The formula of what is sent in a step, against what the libraries really give to the process groups."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from scripts.traffic_table import by_the_libraries_defaults
from tests.plans import plan_for
from tests.ranks.collectives import sent_in_a_step
from tests.ranks.harness import run_ranks
from trainer.flags.config import Config
from trainer.plan import communication
from trainer.plan.communication import Traffic, traffic
from trainer.spec.shapes import KNOWN

# Which collectives each strategy sends each kind of traffic by.
COLLECTIVES = {
    "ddp": {"reduced": "allreduce"},
    "zero2": {"reduced": "reduce", "returned": "gather"},
    "zero3": {"gathered": "gather", "reduced": "scatter"},
    "fsdp": {"gathered": "gather", "reduced": "scatter"},
    "hsdp": {"gathered": "gather", "reduced": "scatter", "spread": "allreduce"},
}
ALL_REDUCED = {"use_multi_rank_bucket_allreduce": True}  # DeepSpeed's default
TO_EACH_OWNER = {"use_multi_rank_bucket_allreduce": False, "overlap_comm": False}
LORA = {"lora_rank": 3}  # of 4 ranks: the adapters' first dimension is padded
TOP_LAYER = {"freeze": "embeddings,projection,layers.0-3"}  # of 5
# The engine's sums and norms, and DeepSpeed's signs of overflow, have at most 16 values each.
FEW_BYTES = 256
WITHIN = 0.02


@dataclass(frozen=True, kw_only=True)
class Case:
    """A step: on how many ranks, by which strategy, in how many micro-batches; the rest as `sent_in_a_step` has it."""

    ranks: int
    strategy: str
    accumulation: int = 1
    model: str = "debug"
    layers: int | None = None
    flags: dict[str, Any] = field(default_factory=dict)
    once: tuple[str, ...] = ()
    zero: dict[str, Any] | None = None
    planned: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        parts = [self.strategy, f"{self.ranks}x{self.accumulation}", *self.once, *self.flags, *self.planned]
        return "-".join([*parts, self.model.removeprefix("debug-"), *(self.zero or {})])

    def counted(self) -> list[dict[str, float]]:
        """Bytes by kind of collective, of each rank."""
        named = {"model": self.model, "layers": self.layers, "flags": self.flags, "zero": self.zero}
        once = {name: True for name in self.once}
        return run_ranks(self.ranks, sent_in_a_step, self.strategy, self.accumulation, **named, **once, **self.planned)

    def expected(self) -> Traffic:
        """By the formula; by that of DeepSpeed's default where the case has it."""
        plan = plan_for(self.strategy, world_size=self.ranks, accumulation=self.accumulation, **self.planned)
        selection = Config(dataset_path="unused", **self.flags).selection
        workload = replace(plan.layout.workload, selection=selection)
        layout = replace(plan.layout, workload=workload, **{name: True for name in self.once})
        shape = KNOWN[self.model] if self.layers is None else replace(KNOWN[self.model], layers=self.layers)
        return (by_the_libraries_defaults if self.zero == ALL_REDUCED else traffic)(shape, layout)


BOTH = ("gathers_once", "reduces_once")
BF16 = {"precision": "bf16"}
TWO_NODES = {"nodes": 2}
QUICK = [
    Case(ranks=2, strategy="zero2", accumulation=2, once=("reduces_once",)),
    Case(ranks=2, strategy="fsdp", accumulation=2, once=BOTH, planned=BF16),
]
FULL = [
    *(Case(ranks=ranks, strategy="ddp", accumulation=2) for ranks in (2, 4)),
    *(Case(ranks=ranks, strategy="zero2", accumulation=2, zero=ALL_REDUCED) for ranks in (2, 4)),
    *(Case(ranks=4, strategy="zero2", accumulation=times, zero=TO_EACH_OWNER, planned=BF16) for times in (1, 2)),
    *(Case(ranks=ranks, strategy="zero3", accumulation=2, planned=BF16) for ranks in (2, 4)),
    Case(ranks=4, strategy="zero3", planned={"checkpointing": True}),
    *(Case(ranks=4, strategy="fsdp", accumulation=times) for times in (1, 2)),
    Case(ranks=2, strategy="fsdp", planned={"checkpointing": True}),
    Case(ranks=4, strategy="hsdp", planned=TWO_NODES),
    # What is not trained: frozen parts, all but adapters, all but a word; melody and stereo.
    *(Case(ranks=2, strategy=name, layers=5, flags=TOP_LAYER) for name in ("ddp", "zero3", "fsdp")),
    Case(ranks=2, strategy="zero2", layers=5, flags=TOP_LAYER, zero=TO_EACH_OWNER),
    Case(ranks=4, strategy="zero2", flags=LORA, zero=TO_EACH_OWNER, planned=BF16),
    *(Case(ranks=4, strategy=name, flags=LORA, planned=BF16) for name in ("ddp", "zero3", "fsdp")),
    *(Case(ranks=2, strategy=name, flags={"tune_text": True}) for name in ("ddp", "fsdp")),
    *(Case(ranks=4, strategy=name, model="debug-stereo-melody", planned=BF16) for name in ("zero3", "fsdp")),
    *(Case(ranks=ranks, strategy="zero2", accumulation=2, planned=BF16) for ranks in (2, 4)),
    Case(ranks=2, strategy="fsdp", accumulation=2, planned=BF16),
    Case(ranks=4, strategy="zero2", accumulation=2, once=("reduces_once",)),
    *(Case(ranks=2, strategy="fsdp", accumulation=2, once=(name,)) for name in BOTH),
    Case(ranks=4, strategy="fsdp", accumulation=2, once=BOTH, planned=BF16),
    Case(ranks=4, strategy="fsdp", once=("gathers_once",)),
    Case(ranks=4, strategy="hsdp", accumulation=2, planned=TWO_NODES),
    Case(ranks=4, strategy="hsdp", accumulation=2, once=BOTH, planned=TWO_NODES),
]


@pytest.mark.parametrize(
    "case",
    [
        *QUICK,
        *(pytest.param(case, marks=pytest.mark.full) for case in FULL),
    ],
    ids=str,
)
def test_a_step_sends_the_bytes_of_the_formula(case):
    expected = {name: sent.by_gpu for name, sent in case.expected().kinds.items() if sent.by_gpu}
    names = COLLECTIVES[case.strategy] | ({"reduced": "allreduce"} if case.zero == ALL_REDUCED else {})
    for found in case.counted():
        assert found.pop("few") <= FEW_BYTES
        assert found == {names[name]: pytest.approx(size, rel=WITHIN) for name, size in expected.items()}
        if case.strategy != "zero3":  # whose gathers ahead end at a whole parameter
            assert found == {names[name]: pytest.approx(size, abs=1) for name, size in expected.items()}


@pytest.mark.full
@pytest.mark.parametrize("live", [0, 800_000])
def test_zero3_gathers_for_both_passes_what_it_may_not_keep(live, monkeypatch):
    """As for the published sizes; of the debug model the trainer's own limit would hold all."""
    case = Case(
        ranks=2,
        strategy="zero3",
        zero={"stage3_max_live_parameters": live, "stage3_prefetch_bucket_size": live // 4},
    )
    monkeypatch.setattr(communication, "ZERO_LIVE_PARAMETERS", live)
    for found in case.counted():
        assert found["gather"] == pytest.approx(case.expected().gathered.by_gpu, rel=WITHIN)
