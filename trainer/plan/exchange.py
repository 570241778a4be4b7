"""How often in a step processes gather whole weights and sum gradients: what a layout may choose, and in words."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

from trainer.plan.layout import Layout


def exchanges(layout: Layout) -> Iterator[Layout]:
    """The layout in every way to gather weights and to sum gradients that its strategy has.

    layout  with neither gathers_once nor reduces_once; it comes last
    """
    sharded = layout.strategy in ("fsdp", "hsdp")
    may_gather = layout.world_size > 1 and sharded
    may_sum = layout.world_size > 1 and layout.accumulation > 1
    may_sum = may_sum and (sharded or (layout.strategy == "zero2" and not layout.offload_optimizer))
    for gathers_once, reduces_once in product([True, False] if may_gather else [False], [True, False]):
        if may_sum or not reduces_once:
            yield replace(layout, gathers_once=gathers_once, reduces_once=reduces_once)


def plain(layout: Layout) -> Layout:
    """The layout that gathers and sums most often, and keeps nothing whole for it."""
    return replace(layout, gathers_once=False, reduces_once=False)


def exchange_in_words(layout: Layout) -> str:
    """When weights and gradients travel between processes; empty where there is one process."""
    if layout.world_size == 1:
        return ""
    weights = "weights gathered once a step" if layout.gathers_once else "weights gathered for every pass"
    once = layout.reduces_once or layout.accumulation == 1 or layout.strategy == "ddp"
    gradients = f"gradients summed {'once a step' if once else 'after every micro-batch'}"
    if layout.strategy == "hsdp" and layout.nodes > 1 and not once:
        gradients += " (once a step between machines)"
    return f"{weights}, {gradients}" if layout.strategy in ("fsdp", "hsdp", "zero3") else gradients
