"""Every strategy on several ranks that share one GPU gives the numbers of one process; without a GPU over gloo."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import pytest

from tests.gpu.one_card import backend, run_ranks, say_figure
from tests.ranks.cases import Numbers, differences, steps
from tests.rounding import LOSS, NORM

pytestmark = [pytest.mark.numbers, pytest.mark.timeout(600)]
STEPS = 6


@dataclass(frozen=True, kw_only=True)
class Case:
    """A strategy on `ranks` ranks of `nodes` machines, with a debug model of some kind."""

    strategy: str
    kind: str = ""
    ranks: int = 2
    nodes: int = 1
    compiled: bool = False
    precision: str = "no"
    once: bool = False  # whether weights are gathered, and gradients reduced, once for a step

    def __str__(self) -> str:
        layout = [f"{self.ranks} ranks", "compiled" * self.compiled, self.precision.replace("no", "")]
        return " ".join(filter(None, [self.strategy, self.kind, *layout, "once" * self.once]))

    @property
    def model(self) -> str:
        return f"debug-{self.kind}" if self.kind else "debug"


CASES = [
    Case(strategy="ddp"),
    Case(strategy="fsdp"),
    Case(strategy="zero2"),
    Case(strategy="zero3"),
    Case(strategy="fsdp", kind="stereo-melody"),
    Case(strategy="zero2", kind="melody"),
    Case(strategy="ddp", kind="stereo"),
    Case(strategy="zero3", kind="melody", precision="bf16"),
    Case(strategy="fsdp", kind="melody", compiled=True, precision="bf16"),
    Case(strategy="fsdp", precision="bf16"),
    Case(strategy="zero2", precision="bf16"),
    Case(strategy="ddp", precision="bf16"),
    Case(strategy="zero3", precision="bf16"),
    Case(strategy="fsdp", compiled=True),
    Case(strategy="ddp", compiled=True),
    Case(strategy="zero2", compiled=True),
    Case(strategy="hsdp", ranks=4, nodes=2),
    Case(strategy="hsdp", ranks=4, nodes=2, precision="bf16"),
    Case(strategy="fsdp", ranks=4),
    Case(strategy="zero2", ranks=4),
    Case(strategy="fsdp", once=True),
    Case(strategy="fsdp", precision="bf16", once=True),
    Case(strategy="fsdp", compiled=True, precision="bf16", once=True),
    Case(strategy="hsdp", ranks=4, nodes=2, once=True),
    Case(strategy="zero2", once=True),
    Case(strategy="zero2", precision="bf16", once=True),
    Case(strategy="zero2", compiled=True, precision="bf16", once=True),
]
# On a CPU tests/ranks shows the same at length: here one case, so that the check itself is known to work.
QUICK = ("fsdp 2 ranks",)


@cache
def one_process(model: str) -> Numbers:
    return run_ranks(1, steps, "single", 1, model=model, count=STEPS)[0]


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=() if str(case) in QUICK else pytest.mark.full, id=str(case)) for case in CASES]
)
def test_ranks_that_share_a_card_give_the_numbers_of_one_process(case: Case) -> None:
    if case.strategy.startswith("zero"):
        pytest.importorskip("deepspeed")
    accumulation = 2 if case.ranks == 2 or case.once else 1
    layout = {"model": case.model, "nodes": case.nodes, "compiled": case.compiled, "precision": case.precision}
    layout |= {"gathers_once": case.once, "reduces_once": case.once}
    found = run_ranks(case.ranks, steps, case.strategy, accumulation, count=STEPS, **layout)
    assert all(numbers.losses == found[0].losses and numbers.norms == found[0].norms for numbers in found)
    loss, norm = differences(found[0], one_process(case.model))
    held = ", ".join(
        f"{name} {[getattr(numbers, name + '_bytes') for numbers in found]}" for name in ("weight", "optimizer")
    )
    say_figure(f"{backend()}: losses within {loss:.1e} nats, norms within {norm:.1e}; bytes of each rank: {held}")
    # bf16 has 8 bits of mantissa: 0.4 % a product, as in tests/ranks/test_equal_numbers.py.
    most_loss, most_norm = (LOSS, NORM) if case.precision == "no" else (2e-3, 1e-2)
    assert loss <= most_loss and norm <= most_norm
    if case.strategy in ("fsdp", "hsdp"):
        shards = case.ranks // case.nodes
        assert found[0].optimizer_bytes <= 1.1 * one_process(case.model).optimizer_bytes / shards, "nothing is sharded"
    if case.compiled:
        assert found[0].graphs >= 1
